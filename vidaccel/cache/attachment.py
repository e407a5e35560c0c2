"""A pipeline whose steps a forecaster stands in for, until it is let go; attach.py says by which rules one is made.

Which step a pass belongs to is asked of the pipeline's scheduler, by position. A generation begins where the scheduler
has new timesteps, so whatever ended the one before, nothing of it is used; the cache of a context is freed with its
last step, before the video is decoded.
"""

import logging
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from vidaccel.cache.checks import check_pipeline
from vidaccel.cache.policy import FullSteps
from vidaccel.cache.trunk import Mode, Trunk
from vidaccel.errors import UserError
from vidaccel.families.base import DiTFamily
from vidaccel.families.walk import denoisers_of, passes_of_call
from vidaccel.forecasters.base import Forecaster, of_denoiser
from vidaccel.forecasters.learned import Predictor
from vidaccel.models.grid import Grid, running_grid, step_of
from vidaccel.models.own_call import keep_transformers

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Bound:
    """Something that was made for one grid."""

    what: str
    grid: Grid
    hint: str
    """What may be done other than to sample on that grid."""
    remedy: str = "vidaccel train-predictor stage=search shift={shift:g} on a copy of the predictor"
    """What makes it for another shift."""

    def check(self, running: Grid) -> None:
        """`UserError` unless a sampling on that grid is one on this."""
        if not self.grid.fits(running.times):
            its = "" if self.grid.shift is None else f" (shift={self.grid.shift:g})"
            how = "" if running.shift is None else f": {self.remedy.format(shift=running.shift)}"
            raise UserError(
                f"{self.what} is for the grid of {self.grid}, and the pipeline is on that of {running}",
                f"sample on its grid{its}, {self.hint}{how}",
            )


class Attachment:
    """A pipeline under a list of full steps, until `detach()`; also a context manager."""

    def __init__(
        self,
        pipe: DiffusionPipeline,
        family: DiTFamily,
        forecaster: Forecaster,
        policy: FullSteps,
        bound: Bound | None = None,
    ):
        """Raises `UserError` as `Trunk.attach` does. A generation on another grid than that of `bound` is refused."""
        self.policy, self.leaving = policy, ExitStack()
        """Which steps are full; and what is undone after the hooks."""
        self._pipe, self._family, self._forecaster, self._bound = pipe, family, forecaster, bound
        self._timesteps: Tensor | None = None
        self._scheduler = pipe.scheduler  # the last one that was checked
        self._index, self._unnamed = 0, 0
        self._running: Trunk | None = None  # that of the denoiser under way
        self._seen: set[str] = set()
        self._told = False  # that the first step of a further denoiser is full
        transformers = denoisers_of(pipe, family)
        self._trunks = [Trunk(transformer, family, forecaster.history) for transformer in transformers]
        with ExitStack() as stack:
            for trunk in self._trunks:
                stack.enter_context(trunk)
                trunk.choose = partial(self._choose, trunk)
            stack.callback(keep_transformers(pipe, family))
            self._attached = stack.pop_all()

    @property
    def full_passes(self) -> int:
        """Passes that ran the trunk since it was attached; two a step under two-pass guidance."""
        return sum(trunk.full_passes for trunk in self._trunks)

    @property
    def predicted_passes(self) -> int:
        """Passes that the forecaster answered since it was attached."""
        return sum(trunk.predicted_passes for trunk in self._trunks)

    def detach(self) -> None:
        """Leave the pipeline as it was; a second call does nothing."""
        self._attached.close()
        self.leaving.close()

    def __enter__(self) -> "Attachment":
        return self

    def __exit__(self, *error) -> None:
        self.detach()

    def _choose(self, trunk: Trunk) -> Mode:
        """The mode of the pass that is about to begin."""
        step = step_of(self._pipe)
        self._follow(self._pipe.scheduler.timesteps, step.index)
        context = trunk.open.name
        if context is None:
            # Guidance by two passes in a pipeline that opens no contexts: they are told apart by their order.
            context = f"pass {self._unnamed}"
            self._unnamed += 1
        if context in self._seen:
            raise UserError(
                f"a second pass of context {context} in step {step.index}: the scheduler of the pipeline stands still",
                "one pipeline at a time samples with a transformer: detach, or give the other the same scheduler",
            )
        self._seen.add(context)
        listed = self.policy(step)
        if trunk is not self._running:
            self._switch(trunk, step.index, listed)
        full = listed or not trunk.memory(context)  # which has nothing to look back on
        forecaster = None if full else of_denoiser(self._forecaster, self._trunks.index(trunk))
        passes = passes_of_call(self._pipe, self._family, trunk.open.name)
        return Mode(forecaster, torch.tensor(step.t), None, context, step.index == step.count - 1, passes)

    def _switch(self, trunk: Trunk, index: int, listed: bool) -> None:
        """To the denoiser of this trunk, at a step that is `listed` as full or not; what the one before remembers is
        freed."""
        if self._running is not None:
            self._running.reset()
            if not listed and not self._told:
                self._told = True
                name = self._family.denoisers[self._trunks.index(trunk)].attribute
                log.warning("step %d runs in full as well: it is the first of %s", index, name)
        self._running = trunk

    def _follow(self, timesteps: Tensor, index: int) -> None:
        """Start anew with a generation, which has timesteps of its own, and count anew with a step."""
        if timesteps is not self._timesteps or index < self._index:
            if self._pipe.scheduler is not self._scheduler:
                check_pipeline(self._pipe, self._family)
                self._scheduler = self._pipe.scheduler
            self._check_grid()
            if isinstance(self._forecaster, Predictor):
                self._forecaster.attend_like(*(trunk.transformer for trunk in self._trunks))
            for trunk in self._trunks:
                trunk.reset()
            self._timesteps, self._index, self._unnamed = timesteps, index, 0
            self._running = None
            self._seen.clear()
        if index != self._index:
            self._index, self._unnamed = index, 0
            self._seen.clear()

    def _check_grid(self) -> None:
        """Of a generation that begins; whatever needs no grid takes any."""
        follow = getattr(self._forecaster, "follow", None)
        if self._bound is None and follow is None:
            return
        grid = running_grid(self._pipe.scheduler, self._family)
        if self._bound is not None:
            self._bound.check(grid)
        if follow is not None:
            follow(grid)
