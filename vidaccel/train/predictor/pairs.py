"""What a predictor learns from: predicted steps, each with what full steps before it left and the student's own answer.

clips        the full step at (t, r) and the predicted one at (t', r') see one clip and noise (method.md, section 3)
trajectory   the full step is one of the student's own sampling; predicted steps lead from it to the one that is learnt,
             so that the predictor is trained on the states that its own errors lead to. One that looks back on two full
             steps has another before it

B batch, S steps, C channels, T frames, H and W latent pixels
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from vidaccel.cache.trunk import Trunk
from vidaccel.cache.trunks import Trunks
from vidaccel.collect.encode import LATENT, batch
from vidaccel.collect.source import EncodedSource
from vidaccel.collect.trajectories import CACHES
from vidaccel.config.predictor import PredictorConfig
from vidaccel.data.shards import ShardFolder
from vidaccel.forecasters.base import Cached, Forecaster, Tokens
from vidaccel.models.grid import denoiser_at
from vidaccel.models.velocity import Text, Velocity, per_sample
from vidaccel.train.flow_matching import noised, sample_guidance
from vidaccel.train.methods.base import drawn
from vidaccel.train.methods.mean_velocity.intervals import sample_interval_ends
from vidaccel.train.objective import generator_for

Data = ShardFolder | EncodedSource
PER_STEP = ("x", "velocity", *CACHES.values())
"""What a stored trajectory has for each of its steps."""


class Times(NamedTuple):
    """A step from t down to r, [B] each."""

    t: Tensor
    r: Tensor


class Pair(NamedTuple):
    """A predicted step, and the student's answer to it."""

    x: Tensor
    """[B, C, T, H, W]."""
    times: Times
    text: Text
    g: Tensor | None
    """[B] for a student that embeds its guidance."""
    target: Tensor
    """u(x, r, t) of the student, [B, C, T, H, W]."""
    memory: tuple[Cached, ...]
    """What the full steps before left, newest first."""

    def stepped(self, u: Tensor) -> Tensor:
        """Where a sampler's step with u ends."""
        return stepped(self.x, self.times, u)


class FullStep(NamedTuple):
    """A full step of a trajectory that is stored."""

    index: Tensor
    """[B]."""
    x: Tensor
    """Latents that it starts from, [B, C, T, H, W]."""
    u: Tensor
    """Their velocity."""
    tokens: Tokens
    """What it left, where that is stored; else nothing, and it is run again."""


@dataclass(frozen=True)
class Pairs:
    """What the forward passes of a training learn from, as its settings say."""

    student: Velocity
    trunk: Trunk | Trunks
    predictor: Forecaster
    data: Data
    """Encoded clips, or trajectories."""
    config: PredictorConfig
    grid: Tensor
    """Times [S + 1] of the steps that the predictor is for."""
    guidance: float
    """Scale where the settings name no range of them."""
    restrict: float
    """Widest interval t - r."""
    seed: int
    """Of the order in which data is drawn."""
    boundary: float | None = None
    """Time below which the second of two transformers takes over; a pair is of one, which take turns."""
    further_restrict: float = 1.0
    """`restrict` of the second."""

    @cached_property
    def steps_of(self) -> dict[int, range]:
        """Of each transformer that has steps to predict its steps on the grid."""
        steps, boundaries = len(self.grid) - 1, [] if self.boundary is None else [self.boundary]
        taken = [denoiser_at(t, boundaries) for t in self.grid[:-1].cpu()]
        begun = [i for i in range(steps) if not i or taken[i] != taken[i - 1]]
        ranges = {taken[i]: range(i, j) for i, j in zip(begun, [*begun[1:], steps], strict=True)}
        return {which: own for which, own in ranges.items() if len(own) > 1}

    def draw(self, index: int, count: int, step: int, generator: torch.Generator) -> Pair:
        """B = `count` samples for forward pass `index` of optimiser step `step`."""
        samples = [tensors for tensors, _ in self.data.read(drawn(self.data, index, count, self.seed))]
        turns = [*self.steps_of.items()]
        which, own = turns[step % len(turns)]  # in all processes
        if self.config.pairs == "data":
            return self._from_clips(samples, generator, which, own)
        return self._from_trajectories(samples, step, generator, own)

    def _from_clips(self, samples: list[dict[str, Tensor]], generator: torch.Generator, which: int, own: range) -> Pair:
        text = batch(samples, self.grid.device, torch.float32)
        x_0 = text.pop(LATENT)
        eps = torch.randn(x_0.shape, generator=generator).to(x_0)
        count, lag = len(samples), self.config.lag
        if self.config.intervals == "grid":
            times = grid_times(count, self.grid.cpu(), lag, generator, own)
        else:
            restrict, span = self.restrict, (0.0, 1.0)
            if self.boundary is not None:
                restrict = (self.restrict, self.further_restrict)[which]
                span = ((self.boundary, 1.0), (0.0, self.boundary))[which]
            times = restricted_times(count, restrict, lag, generator, span)
        full, predicted = (Times(*(end.to(x_0) for end in step)) for step in times)
        return noised_pair(self.student, self.trunk, x_0, eps, text, self._scales(count, generator), full, predicted)

    def _from_trajectories(
        self, samples: list[dict[str, Tensor]], step: int, generator: torch.Generator, own: range
    ) -> Pair:
        steps = len(own)
        # All processes take as many passes in a step, or those that share weights would wait for each other.
        longest = min(self.config.max_skipped, steps - 1)
        # By numbers of its own: those of (seed, step) are a pass's, and the length would choose where that one starts.
        length = int(torch.randint(1, longest + 1, (), generator=generator_for(~self.seed, step)))
        first = own.start + torch.randint(steps - length, (len(samples),), generator=generator)
        starts = [first]
        if self.config.history > 1:
            before = first - torch.randint(1, longest + 1, first.shape, generator=generator)
            starts.append(before.clamp(min=own.start))
        g = self._scales(len(samples), generator)
        alike = [{n: x for n, x in sample.items() if n not in (*PER_STEP, "times")} for sample in samples]
        text = batch(alike, self.grid.device, torch.float32)
        full = [self._full_step(samples, start) for start in starts]
        return trajectory_pair(self.student, self.trunk, self.predictor, full, length, self.grid, text, g)

    def _full_step(self, samples: list[dict[str, Tensor]], index: Tensor) -> FullStep:
        """That of each trajectory at its own index."""
        taken = [{n: sample[n][i] for n in PER_STEP if n in sample} for sample, i in zip(samples, index, strict=True)]
        taken = batch(taken, self.grid.device, torch.float32)
        tokens = {name: taken[stored] for name, stored in CACHES.items() if stored in taken}
        return FullStep(index.to(self.grid.device), taken["x"], taken["velocity"], tokens)

    def _scales(self, count: int, generator: torch.Generator) -> Tensor | None:
        if not self.student.embeds("g"):
            return None
        low, high = self.config.guidance_range or (self.guidance, self.guidance)
        return sample_guidance(count, low, high, generator).to(self.grid.device)


def stepped(x: Tensor, times: Times, u: Tensor) -> Tensor:
    """x - (t - r) u: one step of the sampler."""
    return x - per_sample(times.t - times.r, x) * u


def restricted_times(
    count: int, restrict: float, lag: float, generator: torch.Generator, span: tuple[float, float] = (0.0, 1.0)
) -> tuple[Times, Times]:
    """Full and predicted step: t ~ U(0, 1), r = max(0, t - U(0, restrict)), and both U(0, lag) later, or at 0; of one
    of two transformers all of that in its `span` in place of [0, 1]."""
    low, high = span
    t = torch.rand(count, generator=generator)
    if span != (0.0, 1.0):
        t = (low + (high - low) * t).clamp(low, math.nextafter(high, 0.0))
    r = sample_interval_ends(t, restrict, 0.0, generator, low)
    passed = lag * torch.rand(count, generator=generator)
    return Times(t, r), Times((t - passed).clamp(min=low), (r - passed).clamp(min=low))


def grid_times(
    count: int, grid: Tensor, lag: float, generator: torch.Generator, own: range | None = None
) -> tuple[Times, Times]:
    """Full and predicted step: two of a grid [S + 1], neighbours or at most `lag` apart; all such are as likely. `own`
    are the steps of one of two transformers."""
    own = range(len(grid) - 1) if own is None else own
    at = grid.tolist()  # a difference in float32 would be rounded, and may pass for one that is no longer than `lag`
    near = [(i, j) for i in own for j in range(i + 1, own.stop) if j == i + 1 or at[i] - at[j] <= lag]
    full, predicted = torch.tensor(near)[torch.randint(len(near), (count,), generator=generator)].T
    return Times(grid[full], grid[full + 1]), Times(grid[predicted], grid[predicted + 1])


@torch.no_grad()
def noised_pair(
    student: Velocity,
    trunk: Trunk | Trunks,
    x_0: Tensor,
    eps: Tensor,
    text: Text,
    g: Tensor | None,
    full: Times,
    predicted: Times,
) -> Pair:
    """Clips x_0 under the noise eps, both [B, C, T, H, W], at the times of a full and of a predicted step."""
    with trunk.full(full.t):
        student(noised(x_0, eps, full.t), full.t, text, r=full.r, g=g)
    x = noised(x_0, eps, predicted.t)
    target = student(x, predicted.t, text, r=predicted.r, g=g)
    return Pair(x, predicted, text, g, target, trunk.memory())


@torch.no_grad()
def trajectory_pair(
    student: Velocity,
    trunk: Trunk | Trunks,
    forecaster: Forecaster,
    full: Sequence[FullStep],
    length: int,
    grid: Tensor,
    text: Text,
    g: Tensor | None,
) -> Pair:
    """The last of `length` predicted steps in a row.

    Args:
        full: the full steps behind which they come, newest first: that one, below S - length, and, where the forecaster
            looks back further, one before it. Where nothing came before, that is the same one again: nothing has
            changed between them.
        grid: the trajectories' times [S + 1].
    """
    first = full[0].index

    def at(step: int) -> Times:
        return Times(grid[first + step], grid[first + step + 1])

    memory = tuple(_remembered(student, trunk, step, grid, text, g) for step in full)
    x = stepped(full[0].x, at(0), full[0].u)
    for step in range(1, length):
        with trunk.predicted(forecaster, at(step).t, memory):
            x = stepped(x, at(step), student(x, at(step).t, text, r=at(step).r, g=g))
    times = at(length)
    target = student(x, times.t, text, r=times.r, g=g)
    # Autocast has kept the forecaster's weights as casts without gradients, and where PyTorch lacks its change 165068 a
    # training of this step would take those.
    torch.clear_autocast_cache()
    return Pair(x, times, text, g, target, memory)


def _remembered(
    student: Velocity, trunk: Trunk | Trunks, step: FullStep, grid: Tensor, text: Text, g: Tensor | None
) -> Cached:
    """What a full step leaves, from its stored tokens, or by running it again where they are not stored."""
    if step.tokens:
        return Cached(step.tokens, grid[step.index])
    with trunk.full(grid[step.index]):
        student(step.x, grid[step.index], text, r=grid[step.index + 1], g=g)
    return trunk.memory()[0]
