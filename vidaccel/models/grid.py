"""Step grids: the times that the steps of a sampling go between, and where on its grid a running pipeline is.

A grid is a list of times; a shift is one way to make it. The scheduler is asked by position and not by the value of its
timestep: HunyuanVideo-1.5 casts timesteps to bfloat16, whose spacing is 4 above 512, so that neighbouring steps of a
fine grid look alike. `set_timesteps` puts the position back to the start, also after a generation that an exception
ended.

S steps, B samples
"""

import copy
import pkgutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Self, cast

import numpy as np
import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from torch import Tensor

from vidaccel.errors import UserError
from vidaccel.families.base import DiTFamily
from vidaccel.families.registry import family_of
from vidaccel.families.walk import boundaries_of

TOLERANCE = 0.1
"""How far, in steps, a time may lie from its place on a grid. UniPC's lie up to 0.001 S from those of a shift."""
ROUNDING = 2e-3
"""By how much a timestep may differ from 1000 sigma: UniPC rounds it to a whole number."""
OTHER_GRIDS = (
    "use_dynamic_shifting",
    "use_karras_sigmas",
    "use_exponential_sigmas",
    "use_beta_sigmas",
    "shift_terminal",
    "times",
)
"""Options of diffusers' schedulers under which times follow from more than a shift, and of `ListedScheduler`."""


def step_grid(steps: int, shift: float) -> Tensor:
    """[steps + 1] float32 times s k / (1 + (s - 1) k), k from 1 down to 0 in equal steps (method.md, section 0).

    Bit for bit the sigmas of diffusers' flow-match Euler, which rounds k to float32 first.
    """
    k = np.linspace(1, 0, steps + 1).astype(np.float32)
    return torch.from_numpy(shift * k / (1 + (shift - 1) * k))


@dataclass(frozen=True)
class Grid:
    """The times of a sampling."""

    times: tuple[float, ...]
    """[S + 1], falling, in [0, 1]: 1 is noise, 0 the video."""
    shift: float | None = None
    """The shift that makes them, where one does."""

    def __post_init__(self) -> None:
        times = tuple(float(time) for time in self.times)
        object.__setattr__(self, "times", times)
        falling = all(later < time for time, later in zip(times, times[1:], strict=False))
        if len(times) < 2 or not falling or not 0 <= times[-1] < times[0] <= 1 + 1e-6:
            raise UserError(f"the times {_shortened(times)} are no step grid", "list times that fall from 1 to 0")
        if self.shift is not None and not torch.allclose(self.tensor, step_grid(self.steps, self.shift), 0, 1e-6):
            raise UserError(
                f"the times {_shortened(times)} are not those of shift {self.shift:g}", "leave one of the two out"
            )

    @classmethod
    def shifted(cls, steps: int, shift: float) -> Self:
        """`step_grid` of them."""
        return cls(tuple(step_grid(steps, shift).tolist()), shift)

    @classmethod
    def listed(cls, timesteps: Sequence[float] | None, sigmas: Sequence[float] | None) -> Self | None:
        """Of timesteps from 1000 down, or sigmas from 1 down, each with or without the 0 that it ends in; None of
        neither.

        Raises:
            UserError: they do not fall, or both are given.
        """
        if timesteps is not None and sigmas is not None:
            raise UserError("timesteps= came with sigmas=", "either says the grid: leave one of the two out")
        if timesteps is None and sigmas is None:
            return None
        if sigmas and sigmas[0] > 1 + 1e-6:
            raise UserError(f"sigmas={list(sigmas)} are not in [0, 1]", "timesteps= takes numbers up to 1000")
        times = [float(t) / 1000 for t in timesteps] if timesteps is not None else [float(s) for s in sigmas or ()]
        return cls((*times, 0.0) if not times or times[-1] else tuple(times))

    @classmethod
    def recorded(cls, steps: int | None, shift: float | None, times: Sequence[float] | None) -> Self | None:
        """The grid that a file names by these; None if it names none. Files used to have only steps and shift.

        Raises:
            UserError: they contradict each other.
        """
        if times is not None:
            grid = cls(tuple(times), shift)
            if steps not in (None, grid.steps):
                raise UserError(f"{len(times)} times for {steps} steps", "list one more than there are steps")
            return grid
        if shift is None:
            return None
        if steps is None:
            raise UserError(f"a grid of shift {shift:g} of nobody knows how many steps", "say steps as well")
        return cls.shifted(steps, shift)

    @property
    def steps(self) -> int:
        return len(self.times) - 1

    @property
    def tensor(self) -> Tensor:
        """The times [S + 1] in float32."""
        return torch.tensor(self.times, dtype=torch.float32)

    @property
    def widest(self) -> float:
        """The largest t - r of a step."""
        return float(-self.tensor.diff().min())

    def firsts(self, boundaries: Sequence[float]) -> tuple[int, ...]:
        """Positions of the steps with which the denoisers begin whose times lie between these; 0 is one."""
        taken = [denoiser_at(t, boundaries) for t in self.tensor[:-1]]
        return tuple(i for i, which in enumerate(taken) if not i or which != taken[i - 1])

    def even(self, t: Tensor) -> Tensor:
        """The place of times along the list: 1 - i/S at the i-th, linear between neighbours; k where a shift makes it.

        On a grid of a shift this is a formula, and so the same for grids of any number of steps.
        """
        if self.shift is not None:
            return t / (self.shift - (self.shift - 1) * t)
        rising = self.tensor.flip(0).to(t.device)
        above = torch.searchsorted(rising, t.float(), right=True).clamp(1, self.steps)
        low, high = rising[above - 1], rising[above]
        return (above - 1 + (t - low) / (high - low)) / self.steps

    def fits(self, times: Sequence[float]) -> bool:
        """Whether a sampling at these times is one on this grid, if perhaps in another number of steps."""
        steps = len(times) - 1
        apart = self.even(torch.tensor(times, dtype=torch.float32)) - torch.linspace(1, 0, steps + 1)
        return bool(steps * apart.abs().max() <= TOLERANCE)

    def __str__(self) -> str:
        return f"shift {self.shift:g}" if self.shift is not None else f"the times {_shortened(self.times)}"


def _shortened(times: Sequence[float]) -> str:
    """1, 0.95, 0.9, ..., 0"""
    shown = [f"{time:.4g}" for time in times]
    return ", ".join(shown if len(shown) < 6 else [*shown[:3], "...", shown[-1]])


def denoiser_at(t: Tensor, boundaries: Sequence[float]) -> int:
    """Which denoiser takes the step that begins at t [], as pipelines choose: the next below each of the boundaries."""
    return sum(not bool(1000 * t >= 1000 * boundary) for boundary in boundaries)


def check_boundary(what: str, boundary: float | None, pipe: DiffusionPipeline, family: DiTFamily, hint: str) -> None:
    """`UserError` for what was made for another switch between transformers than the pipeline's, or for none."""
    own = next(iter(boundaries_of(pipe, family)), None)
    if boundary != own:
        made = "one transformer" if boundary is None else f"a second transformer below t = {boundary:g}"
        has = "no second transformer" if own is None else f"{'a second one below t = ' * (boundary is None)}{own:g}"
        raise UserError(f"{what} for {made}, and the pipeline has {has}", hint)


@dataclass(frozen=True)
class Step:
    """One step of the grid, from time `t` down to `r`, both in [0, 1]."""

    index: int
    """Counted from 0."""
    count: int
    """Steps of the whole grid."""
    t: float
    r: float


def current_step(scheduler: Any) -> Step:
    """The step that a flow-matching scheduler of diffusers will take next.

    Raises:
        UserError: it has taken all of its steps, so that whoever asks is not what it samples for.
    """
    index = scheduler.step_index
    if index is None:  # before the first step, which need not be the grid's first
        index = getattr(scheduler, "begin_index", None) or 0
    if index >= len(scheduler.timesteps):
        raise UserError(
            f"the transformer is called, and the {len(scheduler.timesteps)} steps of its pipeline's scheduler are over",
            "one pipeline at a time samples with a transformer: detach, or give the other the same scheduler",
        )
    t, r = (float(time) for time in times_of(scheduler)[index : index + 2])
    return Step(index, len(scheduler.timesteps), t, r)


def times_of(scheduler: Any) -> Tensor:
    """The times [S + 1], from 1 down to 0, that a flow-matching scheduler has set; some have them turned round."""
    return 1 - scheduler.sigmas if scheduler.config.get("invert_sigmas") else scheduler.sigmas


def step_of(pipe: DiffusionPipeline) -> Step:
    """The step that a pipeline is about to take.

    The schedulers of diffusion models that predict v do not count: it is where the timesteps have the one that the
    pipeline is at, and its times are shares of the training's.
    """
    scheduler = pipe.scheduler
    if hasattr(scheduler, "step_index"):
        return current_step(scheduler)
    times = [*_shares(scheduler), 0.0]
    now = pipe.current_timestep
    index = 0 if now is None else scheduler.timesteps.tolist().index(now.item())
    return Step(index, len(times) - 1, times[index], times[index + 1])


def _shares(scheduler: Any) -> list[float]:
    """Timesteps, which may end at 0, as times in (0, 1]."""
    return [(timestep + 1) / scheduler.config.num_train_timesteps for timestep in scheduler.timesteps.tolist()]


def require_flow(family: DiTFamily, what: str) -> None:
    """`UserError` for `what` unless the family predicts flow velocities."""
    if family.predicts != "flow":
        raise UserError(
            f"{family.title} predicts {family.predicts} of a diffusion process, and {what} is for flow velocities",
            "what works with it: generate, predictor=reuse or taylor, encoded features, and benchmark",
        )


def require_trainable(family: DiTFamily, what: str) -> None:
    """`UserError` for `what` unless the family predicts flow velocities, and is of nothing but clips and captions."""
    require_flow(family, what)
    refuse_untrained(family, what)


def refuse_untrained(family: DiTFamily, what: str) -> None:
    """`UserError` for `what`, which is made of clips and captions, where the family is of more than these."""
    if family.untrained:
        raise UserError(
            f"{family.title} {family.untrained}, and {what} is of clips and captions alone",
            "what works with it: generate, predictor=reuse or taylor, and benchmark",
        )


def require_steps(family: DiTFamily, steps: int) -> None:
    """`UserError` for fewer steps than the family's pipeline takes."""
    if steps < (least := family.least_steps):
        raise UserError(f"steps={steps}, and the pipeline of {family.title} takes {least} or more", "take more")


def shift_of(scheduler: Any, family: DiTFamily) -> float | None:
    """Shift of the step grid that a pipeline's scheduler has, else the family's; None if no shift makes its grid."""
    if any(scheduler.config.get(option) for option in OTHER_GRIDS):
        return None
    if family.times and not isinstance(scheduler, GridScheduler):
        return None
    return scheduler.config.get("shift") or scheduler.config.get("flow_shift") or family.defaults.shift


def fixed_shift(scheduler: Any, family: DiTFamily) -> float:
    """`shift_of`, where something has to be trained on that grid, which the size of a video cannot change: there it is
    the family's; `UserError` if there is none."""
    shift = shift_of(scheduler, family)
    if shift is None and scheduler.config.get("use_dynamic_shifting"):
        shift = family.defaults.shift
    if shift is None:
        raise UserError(f"no shift makes the step grid of this {_named(scheduler)}", "set shift=, such as shift=3")
    return shift


def own_grid(scheduler: Any, family: DiTFamily, steps: int) -> Grid:
    """The grid that a pipeline's scheduler makes in so many steps, read off a copy of it where no shift makes it.

    Raises:
        UserError: it takes its grid from the size of the video, has another number of steps, or none of flow matching.
    """
    shift = shift_of(scheduler, family)
    if shift is not None:
        return Grid.shifted(steps, shift)
    if scheduler.config.get("use_dynamic_shifting"):
        raise UserError(
            f"the grid of this {_named(scheduler)} follows from the size of the video",
            "set shift=, such as shift=3, or list its times: sigmas=[1, 0.9, ...]",
        )
    asked = copy.deepcopy(scheduler)
    if family.times and not asked.config.get("times"):
        require_steps(family, steps)
        asked.set_timesteps(sigmas=pkgutil.resolve_name(family.times)(steps), device="cpu")
    else:
        asked.set_timesteps(steps, device="cpu")
    return running_grid(asked, family)


def running_grid(scheduler: Any, family: DiTFamily) -> Grid:
    """The grid of the generation that a pipeline has begun, by the times that its scheduler has set; those of
    `step_of` for a diffusion model.

    Raises:
        UserError: they are no times of flow matching, or not those that the model is told.
    """
    hint = "sample with a flow-matching scheduler and its own times, or with predictor=reuse and full steps of your own"
    if family.predicts != "flow":
        return Grid((*_shares(scheduler), 0.0))
    if getattr(scheduler, "sigmas", None) is None:
        raise UserError(f"the {_named(scheduler)} has no times of flow matching", hint)
    try:
        grid = Grid(tuple(times_of(scheduler).tolist()))
    except UserError as error:
        raise UserError(f"{error.message}, and they are those of the {_named(scheduler)}", hint) from error
    told = scheduler.timesteps.cpu().float() / scheduler.config.num_train_timesteps
    told = 1 - told if scheduler.config.get("invert_sigmas") else told
    if len(told) != grid.steps or (told - grid.tensor[:-1]).abs().max() > ROUNDING:
        raise UserError(f"the {_named(scheduler)} has timesteps that are not those of its sigmas", hint)
    shift = shift_of(scheduler, family)
    own = None if shift is None else Grid.shifted(grid.steps, shift)
    return own if own and own.fits(grid.times) else grid


def _named(scheduler: Any) -> str:
    """UniPCMultistepScheduler (use_karras_sigmas)"""
    options = [option for option in OTHER_GRIDS if scheduler.config.get(option)]
    return type(scheduler).__name__ + (f" ({', '.join(options)})" if options else "")


@contextmanager
def on_grid(pipe: DiffusionPipeline, shift: float | None = None, grid: Grid | None = None) -> Iterator[None]:
    """The pipeline on listed times, else on the step grid of a shift, for the time of the block; None leaves it its
    own.

    Raises:
        UserError: its scheduler can be given no shift, or its model predicts no flow.
    """
    own = pipe.scheduler
    if grid is not None:
        require_flow(family_of(pipe), "a list of times")
        pipe.scheduler = ListedScheduler.of(grid, own)
    elif shift is not None:
        pipe.scheduler = _shifted(own, shift)
    try:
        yield
    finally:
        pipe.scheduler = own


def _shifted(own: Any, shift: float) -> Any:
    if isinstance(own, ListedScheduler):
        config = cast(Any, own.config)
        return GridScheduler(config.num_train_timesteps, shift, invert_sigmas=config.invert_sigmas)
    if own.config.get("invert_sigmas"):  # whose pipeline gives times of its own to any other
        return GridScheduler.from_config(own.config, shift=shift)
    key = next((key for key in ("shift", "flow_shift") if key in own.config), None)
    if own.config.get("use_dynamic_shifting") and isinstance(own, FlowMatchEulerDiscreteScheduler):
        return GridScheduler(own.config.get("num_train_timesteps", 1000), shift)
    if key is None or own.config.get("use_dynamic_shifting"):
        why = "takes it from the size of the video" if key else "knows none"
        raise UserError(f"shift={shift:g}, and the model's {type(own).__name__} {why}", "leave shift= out")
    return type(own).from_config(own.config, **{key: shift})


class GridScheduler(FlowMatchEulerDiscreteScheduler):
    """Flow-match Euler on `step_grid`, also for a pipeline that leaves the grid to its scheduler, as Wan's does.

    The stock one would then shift its smallest sigma twice and spend a last step on the hundredth part that remains. Of
    a pipeline whose times rise, as Mochi's, only the number of times that it gives is taken: they are in no even steps.
    """

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        sigmas: list[float] | None = None,
        mu: float | None = None,
        timesteps: list[float] | None = None,
    ) -> None:
        if sigmas is not None and cast(Any, self.config).invert_sigmas:
            sigmas, num_inference_steps = None, len(sigmas)
        if sigmas is None and timesteps is None:
            sigmas = np.linspace(1, 0, num_inference_steps + 1)[:-1]
        super().set_timesteps(num_inference_steps, device, sigmas, mu, timesteps)


class ListedScheduler(FlowMatchEulerDiscreteScheduler):
    """Flow-match Euler on listed times, whatever a pipeline asks for but their number."""

    stands_for: Any
    """The scheduler whose place it takes, with the shift that it has."""

    @classmethod
    def of(cls, grid: Grid, own: Any) -> Self:
        """In the place of a pipeline's own, with its training timesteps."""
        rises = own.config.get("invert_sigmas", False)
        made = cls(num_train_timesteps=own.config.get("num_train_timesteps", 1000), shift=1.0, invert_sigmas=rises)
        made.register_to_config(times=list(grid.times))
        made.stands_for = own
        return made

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        sigmas: list[float] | None = None,
        mu: float | None = None,
        timesteps: list[float] | None = None,
    ) -> None:
        """Raises `UserError` for another number of steps than the list has."""
        times = cast(Any, self.config).times
        asked = [len(each) for each in (sigmas, timesteps) if each is not None] or [num_inference_steps]
        if asked[0] not in (None, len(times) - 1):
            raise UserError(
                f"{asked[0]} steps, and the times {_shortened(times)} are a grid of {len(times) - 1}",
                f"take {len(times) - 1} (num_inference_steps= of a pipeline), or set shift= for another grid",
            )
        super().set_timesteps(sigmas=times[:-1], device=device or "cpu")
