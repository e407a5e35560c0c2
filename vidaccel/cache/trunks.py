"""The trunks of several denoisers in the place of one: a pass is of the trunk whose times it lies in."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack

from torch import Tensor

from vidaccel.cache.trunk import DEFAULT_CONTEXT, Trunk
from vidaccel.forecasters.base import Cached, Forecaster
from vidaccel.models.grid import denoiser_at


class Trunks:
    """What schedule search asks of a `Trunk`."""

    def __init__(self, trunks: Sequence[Trunk], boundaries: Sequence[float]):
        """`boundaries` are the times below which the next one's begin."""
        self._trunks, self._boundaries = trunks, boundaries
        self._last = trunks[0]
        self._attached = ExitStack()

    def full(self, t: Tensor) -> AbstractContextManager[None]:
        """As of the `Trunk` of time t []."""
        return self._at(t).full(t)

    def predicted(
        self, forecaster: Forecaster, t: Tensor, memory: tuple[Cached, ...] | None = None
    ) -> AbstractContextManager[None]:
        """As of the `Trunk` of time t []."""
        return self._at(t).predicted(forecaster, t, memory)

    def memory(self, context: str = DEFAULT_CONTEXT) -> tuple[Cached, ...]:
        """What full passes of the trunk that was asked for last have left, newest first."""
        return self._last.memory(context)

    def reset(self) -> None:
        """Forget everything."""
        for trunk in self._trunks:
            trunk.reset()

    def __enter__(self) -> "Trunks":
        with ExitStack() as stack:
            for trunk in self._trunks:
                stack.enter_context(trunk)
            self._attached = stack.pop_all()
        return self

    def __exit__(self, *error) -> None:
        self._attached.close()

    def _at(self, t: Tensor) -> Trunk:
        self._last = self._trunks[denoiser_at(t, self._boundaries)]
        return self._last
