"""The trunks of several denoisers in the place of one: a pass is of the trunk whose times it lies in."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack

from torch import Tensor

from vidaccel.cache.trunk import DEFAULT_CONTEXT, Trunk
from vidaccel.forecasters.base import Cached, Forecaster, of_denoiser
from vidaccel.models.grid import denoiser_at


class Trunks:
    """What training and search ask of a `Trunk`."""

    def __init__(self, trunks: Sequence[Trunk], boundaries: Sequence[float]):
        """`boundaries` are the times below which the next one's begin."""
        self._trunks, self._boundaries = trunks, boundaries
        self._last = 0
        self._attached = ExitStack()

    def full(self, t: Tensor) -> AbstractContextManager[None]:
        """As of the `Trunk` of times t, [] or [B], which are all its own."""
        return self._trunks[self._at(t)].full(t)

    def predicted(
        self, forecaster: Forecaster, t: Tensor, memory: tuple[Cached, ...] | None = None
    ) -> AbstractContextManager[None]:
        """As of the `Trunk` of times t, [] or [B], which are all its own, by the forecaster's part for that."""
        which = self._at(t)
        return self._trunks[which].predicted(of_denoiser(forecaster, which), t, memory)

    def memory(self, context: str = DEFAULT_CONTEXT) -> tuple[Cached, ...]:
        """What full passes of the trunk that was asked for last have left, newest first."""
        return self._trunks[self._last].memory(context)

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

    def _at(self, t: Tensor) -> int:
        self._last = denoiser_at(t.flatten()[0], self._boundaries)
        return self._last
