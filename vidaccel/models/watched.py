"""The steps of a pipeline's scheduler, watched: what they give is what no pipeline tells of in the same way.

A pipeline may copy its scheduler, as one does that denoises sound beside its video: the copy's steps are let be.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any

from torch import Tensor


@contextmanager
def watched_steps(scheduler: Any, told: Callable[[Tensor], None]) -> Iterator[None]:
    """`told` is given the latents after each step of this scheduler, for the time of the block."""
    scheduler.step = _Watched(scheduler, told)
    try:
        yield
    finally:
        del scheduler.step


class _Watched:
    """In the place of a scheduler's `step`."""

    def __init__(self, scheduler: Any, told: Callable[[Tensor], None]):
        self._scheduler, self._step, self._told = scheduler, scheduler.step, told

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        result = self._step(*args, **kwargs)
        self._told(result[0])
        return result

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """The copied scheduler's own."""
        copied = memo[id(self._scheduler)]
        return MethodType(type(copied).step, copied)
