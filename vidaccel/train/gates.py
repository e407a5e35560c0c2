"""How much of what a stage of distillation is to teach its student has learnt: 0 is an untrained one, 1 an exact one.

    guidance gap closed         1 - |u(r = t, g) - v_g| / |v_cond - v_g|
    mean-velocity gap closed    1 - |u(x, r, t) - u*| / |v - u*|

The first is what CFG distillation is for: v_g is the teacher's velocity in two passes, v_cond that in one. The second
is what the training on mean velocities is for: v is the frozen CFG-distilled teacher's velocity, and u* its mean over
the step, along its own run from noise. Norms are over all samples together, and a stage that ends under its gate has
not been trained for long enough. Means of single samples' ratios would count most where there is least to learn.

Everything here takes samples in batches, without gradients, under whichever autocast the caller has set.

B samples, C channels, T frames, H and W latent pixels
"""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from vidaccel.models.grid import step_grid
from vidaccel.models.velocity import Text, Velocity, per_sample
from vidaccel.train.flow_matching import noised
from vidaccel.train.methods.mean_velocity.rollout import rollout_target

SCALES = (1.5, 2.0, 3.0, 4.0)
"""Guidance scales g that the guidance gap is taken at."""
TIMES = (1.0, 0.95, 0.85, 0.7, 0.5, 0.3, 0.1)
"""Times t that it is taken at one by one."""
GRIDS = (20, 8, 4, 3)
"""Steps of the grids that the mean-velocity gap is taken on."""
RUN_GUIDANCE = 2.5
"""Scale of the run that it is taken along."""
GUIDANCE_GATES = {3.0: 0.45}
"""By scale: the least that CFG distillation has to close."""
MEAN_VELOCITY_GATES = {8: 0.5, 4: 0.5}
"""By steps: the least that the training on mean velocities has to close."""
ALL_TIMES = (0.0, 1.0)
RUN_SUBSTEPS = 4
"""Midpoint steps of the frozen teacher for each step of a grid."""
GUIDANCE_PASSES = 2 * (1 + len(TIMES)), 1 + len(SCALES) + len(TIMES) * len(GUIDANCE_GATES)
"""(teacher's, student's) that `guidance_gap` takes of a sample."""
MEAN_VELOCITY_PASSES = sum(GRIDS) * (2 * RUN_SUBSTEPS + 1), sum(GRIDS)
"""(teacher's, student's) that `mean_velocity_gap_closed` takes of a run."""


class Ratio:
    """The norm of what is still wrong, over that of what there is to learn, both over all samples that were added."""

    def __init__(self) -> None:
        self._squares: list[Tensor] = []

    def add(self, answer: Tensor, target: Tensor, untrained: Tensor) -> None:
        """Velocities [B, ...]: the student's, the right one, and the one that it starts from."""
        target = target.double()
        both = [(velocity.double() - target).square().sum() for velocity in (answer, untrained)]
        self._squares.append(torch.stack(both))

    def __float__(self) -> float:
        """NaN where there is nothing to learn."""
        wrong, whole = torch.stack(self._squares).sum(0).tolist()
        return (wrong / whole) ** 0.5 if whole else float("nan")

    @property
    def closed(self) -> float:
        return 1 - float(self)


class HeldOut(NamedTuple):
    """Clips that were not trained on, noise for each, and how many samples go through a model at once."""

    x_0: Tensor
    """[B, C, T, H, W]."""
    eps: Tensor
    """Like them."""
    text: Text
    generator: torch.Generator
    """Draws their times."""
    runs: int
    """Of them, those that costly numbers are computed on."""
    batch_size: int
    brief: bool = False
    """Whether what has no gate is left out, as in a look on the way."""


@dataclass(frozen=True)
class GuidanceGap:
    """What CFG distillation closes. At scale 1 there is no gap, and what is off is put against something else."""

    closed: dict[float, float]
    """By scale, over times that are uniform along the step grid."""
    by_time: dict[float, dict[float, float]]
    """By scale and time t, of the same samples at that time."""
    off_at_one: float
    """|u(r = t, 1) - v_cond| / |v_cond - v_uncond|: how far the student was shaken where there is nothing to learn."""


def guidance_gap_closed(
    student: Velocity,
    teacher: Velocity,
    x_0: Tensor,
    eps: Tensor,
    t: Tensor,
    text: Text,
    empty: Text,
    scales: Collection[float] = SCALES,
    batch_size: int = 32,
) -> dict[float, float]:
    """The share by scale, at the times t.

    Args:
        student: embeds g; one that embeds r as well is asked at r = t.
        teacher: guided in two passes.
        x_0: clean latents [B, C, T, H, W].
        eps: noise like them.
        t: times [B], one a sample.
        text: of the samples, [B, ...].
        empty: the unconditional text, [1, ...].
        scales: g, where 1 gives |u - v_cond| / |v_cond - v_uncond| and not a share: it leaves no gap to be closed.
        batch_size: samples that a model is given at once.
    """
    ratios = {g: Ratio() for g in scales}
    with torch.no_grad():
        for x_0_part, eps_part, t_part, text_part in _parts(batch_size, text, x_0, eps, t):
            x = noised(x_0_part, eps_part, t_part)
            without = {name: tensor.expand(len(x), *tensor.shape[1:]) for name, tensor in empty.items()}
            conditional, unconditional = (teacher(x, t_part, its).double() for its in (text_part, without))
            for g, ratio in ratios.items():
                guided = unconditional + g * (conditional - unconditional)
                answer = student(x, t_part, text_part, g=torch.full_like(t_part, g))
                # At 1 the guided velocity is the conditional one, whose distance is put against the other's.
                ratio.add(answer, guided, conditional if g != 1 else unconditional)
    return {g: float(ratio) if g == 1 else ratio.closed for g, ratio in ratios.items()}


def guidance_gap(
    student: Velocity,
    teacher: Velocity,
    x_0: Tensor,
    eps: Tensor,
    text: Text,
    empty: Text,
    shift: float,
    generator: torch.Generator,
    scales: Collection[float] = SCALES,
    times: Collection[float] = TIMES,
    timed_scales: Collection[float] = tuple(GUIDANCE_GATES),
    batch_size: int = 32,
    span: tuple[float, float] = ALL_TIMES,
) -> GuidanceGap:
    """The whole of it, of samples that were not trained on; arguments as in `guidance_gap_closed`.

    Args:
        shift: of the step grid that the student is sampled on. Times are t = s k / (1 + (s - 1) k), k uniform, one from
            each of as many equal parts of [0, 1] as there are samples: the gap is not as wide at all
            times, and where samples happen to lie would say more than the student does.
        generator: draws them.
        times: at which all samples are taken once more, for `timed_scales` alone; none of them costs nothing.
        span: times that the student takes, where another transformer takes the rest: k and `times` are of them alone.
    """
    count = len(x_0)
    k = ((torch.arange(count) + torch.rand(count, generator=generator)) / count).to(x_0)
    if span != ALL_TIMES:
        low, high = (end / (shift - (shift - 1) * end) for end in span)
        k, times = low + (high - low) * k, [time for time in times if span[0] <= time <= span[1]]
    t = shift * k / (1 + (shift - 1) * k)
    at = partial(guidance_gap_closed, student, teacher, x_0, eps, text=text, empty=empty, batch_size=batch_size)
    overall = at(t=t, scales=(1.0, *scales))
    single = {time: at(t=torch.full_like(t, time), scales=timed_scales) for time in times}
    by_time = {g: {time: closed[g] for time, closed in single.items()} for g in timed_scales}
    return GuidanceGap({g: overall[g] for g in scales}, by_time, overall[1.0])


def mean_velocity_gap_closed(
    student: Velocity,
    frozen: Velocity,
    eps: Tensor,
    text: Text,
    shift: float,
    g: float = RUN_GUIDANCE,
    grids: Sequence[int] = GRIDS,
    substeps: int = RUN_SUBSTEPS,
    batch_size: int = 32,
    span: tuple[float, float] = ALL_TIMES,
    x_0: Tensor | None = None,
) -> dict[int, float]:
    """The share by steps of the grid, errors of all its steps together.

    Where the student takes the times of `span` alone, they are the steps that begin there, and one that leads out of
    them ends where they do; a grid with none is left out. Runs of the later transformer begin with x_0 under the noise.

    It takes 2 `substeps` + 2 passes a sample and step: some 350 for the grids of 20, 8, 4 and 3.

    Args:
        student: embeds r.
        frozen: the teacher that it learnt from, instantaneous; both are told the scale if they embed one.
        eps: noise [B, C, T, H, W] that the runs begin with.
        text: of the runs, [B, ...].
        shift: of the grids.
        g: scale of the runs.
        grids: their numbers of steps.
        substeps: midpoint steps of the frozen teacher for each step of a grid.
        batch_size: runs at once.
        span: times that the student takes.
        x_0: clean latents like `eps`, for a student that does not begin at t = 1.
    """
    closed = {}
    with torch.no_grad():
        for steps in grids:
            ratio, times = Ratio(), _within(step_grid(steps, shift).tolist(), span)
            if not times:
                continue
            begun = eps if x_0 is None or times[0] == 1 else noised(x_0, eps, x_0.new_full((len(x_0),), times[0]))
            for part, text_part in _parts(batch_size, text, begun):
                _along(ratio, student, frozen, part, text_part, g, times, substeps)
            closed[steps] = ratio.closed
    return closed


def _within(times: Sequence[float], span: tuple[float, float]) -> list[float]:
    """Of a grid the times of the steps that begin in the span, and where the last ends; [] if there are none."""
    low, high = span
    own = [i for i, t in enumerate(times[:-1]) if low <= t < high or t == high == 1]
    return [*(times[i] for i in own), max(times[own[-1] + 1], low)] if own else []


def _along(
    ratio: Ratio,
    student: Velocity,
    frozen: Velocity,
    x: Tensor,
    text: Text,
    g: float,
    times: Sequence[float],
    substeps: int,
) -> None:
    """Adds every step of a run of the frozen teacher, from noise x."""
    scale = x.new_full((len(x),), g)

    def velocity(model: Velocity, x: Tensor, t: Tensor, r: Tensor) -> Tensor:
        return model(x, t, text, r=r, g=scale if model.embeds("g") else None)

    def instantaneous(x: Tensor, t: Tensor) -> Tensor:
        return velocity(frozen, x, t, t).to(x)  # autocast gives less than the run is kept in

    for start, end in zip(times, times[1:], strict=False):
        t, r = (torch.full_like(scale, time) for time in (start, end))
        mean = rollout_target(instantaneous, x, t, r, substeps)
        ratio.add(velocity(student, x, t, r), mean, instantaneous(x, t))
        x = x - per_sample(t - r, x) * mean


def _parts(size: int, text: Text, *tensors: Tensor) -> Iterator[tuple]:
    """The tensors and the text, up to `size` samples at a time."""
    for start in range(0, len(tensors[0]), size):
        part = slice(start, start + size)
        yield *(tensor[part] for tensor in tensors), {name: tensor[part] for name, tensor in text.items()}


@dataclass(frozen=True)
class Gate:
    """A number of a stage, and the least that it has to be."""

    name: str
    """What is closed, where: "of the guidance gap at g = 3"."""
    value: float
    at_least: float

    @property
    def passed(self) -> bool:
        return self.value >= self.at_least

    def said(self, stage: str) -> str:
        """One sentence about a stage, "the CFG stage"."""
        closes = f"{stage} closes {self.value:.2f} {self.name}"
        if self.passed:
            return f"{closes}: its gate is {self.at_least:.2f}"
        return f"{closes}, below its gate of {self.at_least:.2f}: train it longer, or go on from its weights (start=)"


def guidance_gates(closed: dict[float, float]) -> list[Gate]:
    """Those of `GuidanceGap.closed`, for the scales that have one."""
    named = ((g, f"of the guidance gap at g = {g:g}") for g in GUIDANCE_GATES if g in closed)
    return [Gate(name, closed[g], GUIDANCE_GATES[g]) for g, name in named]


def mean_velocity_gates(closed: dict[int, float]) -> list[Gate]:
    """Those of `mean_velocity_gap_closed`, for the grids that have one."""
    named = ((steps, f"of the mean-velocity gap in {steps} steps") for steps in MEAN_VELOCITY_GATES if steps in closed)
    return [Gate(name, closed[steps], MEAN_VELOCITY_GATES[steps]) for steps, name in named]


@dataclass(frozen=True)
class Measured:
    """Numbers of a student."""

    guidance: GuidanceGap | None = None
    mean_velocity: dict[int, float] = field(default_factory=dict)

    @property
    def gates(self) -> list[Gate]:
        return [
            *guidance_gates(self.guidance.closed if self.guidance else {}),
            *mean_velocity_gates(self.mean_velocity),
        ]

    def curves(self) -> dict[str, float]:
        """What can be followed through a training, by quantity and where it was taken (curves.py)."""
        by_scale = self.guidance.closed if self.guidance else {}
        return {f"guidance_gap_closed/g={g:g}": share for g, share in by_scale.items()} | {
            f"mean_velocity_gap_closed/{steps} steps": share for steps, share in self.mean_velocity.items()
        }

    def __str__(self) -> str:
        """Rows of numbers, each with what it is."""
        rows: list[tuple[str, list[tuple[str, float]]]] = []
        if self.guidance:
            rows.append(("guidance gap closed", [(f"g = {g:g}", x) for g, x in self.guidance.closed.items()]))
            rows += [
                (f"at g = {g:g}", [(f"t = {t:g}", share) for t, share in shares.items()])
                for g, shares in self.guidance.by_time.items()
            ]
            rows.append(("|u - v| / |v_cond - v_uncond|", [("g = 1", self.guidance.off_at_one)]))
        if closed := self.mean_velocity:
            rows.append(("mean-velocity gap closed", [(f"{steps} steps", share) for steps, share in closed.items()]))
        return "\n".join(
            f"{name:30}" + "  ".join(f"{at}: {value:.3f}" for at, value in cells) for name, cells in rows if cells
        )

    def as_json(self) -> dict[str, object]:
        """The numbers and their gates, for a file."""
        gates = [{"name": gate.name, "value": gate.value, "at_least": gate.at_least} for gate in self.gates]
        own: dict[str, object] | None = None
        if gap := self.guidance:
            shares = {f"{g:g}": share for g, share in gap.closed.items()}
            by_time = {f"{g:g}": {f"{t:g}": x for t, x in shares.items()} for g, shares in gap.by_time.items()}
            own = {"closed": shares, "by_time": by_time, "off_at_one": gap.off_at_one}
        closed = {str(steps): share for steps, share in self.mean_velocity.items()}
        return {"guidance_gap": own, "mean_velocity_gap": closed, "gates": gates}
