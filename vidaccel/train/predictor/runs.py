"""A model's own full runs, latents and velocities only, and its velocity at any other state of them.

Fitted scalars learn from them and are tried on others of them. Runs differ in caption, noise and, over a range,
guidance. They are kept on the CPU in the model's dtype: two latents a run and step.

N runs, S steps, C channels, T frames, H and W latent pixels
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from torch import Tensor

from vidaccel.cache.trunk import Trunk
from vidaccel.cache.trunks import Trunks
from vidaccel.collect.encode import encode_prompts
from vidaccel.collect.trajectories import TrajectorySampler
from vidaccel.errors import UserError
from vidaccel.forecasters.base import Cached, Forecaster
from vidaccel.models.velocity import Text
from vidaccel.progress import Progress
from vidaccel.sampling import sample
from vidaccel.train.objective import generator_for

Prompt = tuple[str, np.ndarray | None]
"""A caption, and the image that its video begins with, uint8 [H, W, 3], where there is one."""
GUIDANCE_INDEX = 10**9 + 1
"""Of the generator that scales are drawn by: further than any training goes."""


@dataclass(frozen=True)
class Runs:
    """`states` and `velocities` of N runs, and what it takes to run them otherwise."""

    sampler: TrajectorySampler
    states: list[Tensor]
    """S + 1 of [N, C, T, H, W]: what each step began with, and the final latents."""
    velocities: list[Tensor]
    """S of [N, C, T, H, W]."""
    text: dict[str, Tensor]
    """[N, ...] by stored name."""
    g: Tensor | None
    """[N] guidance scales; None for a model that takes none."""
    batch_size: int
    """Runs that go through the model together."""
    boundary: float | None = None
    """Time below which the second of two transformers takes over; None: it is one."""

    def __len__(self) -> int:
        return len(self.states[0])

    def part(self, rows: slice) -> "Runs":
        """Some of them."""
        return replace(
            self,
            states=[x[rows] for x in self.states],
            velocities=[u[rows] for u in self.velocities],
            text={name: tensor[rows] for name, tensor in self.text.items()},
            g=None if self.g is None else self.g[rows],
        )

    @property
    def times(self) -> Tensor:
        """[S + 1]"""
        return self.sampler.grid.tensor

    @property
    def firsts(self) -> tuple[int, ...]:
        """Positions of the steps with which the transformers begin."""
        return (0,) if self.boundary is None else self.sampler.grid.firsts([self.boundary])

    def begin(self, step: int) -> int:
        """The first step of the transformer that takes this one."""
        return max(first for first in self.firsts if first <= step)

    def velocity(self, step: int, x: Tensor) -> Tensor:
        """What the model gives at a step that begins with x [N, C, T, H, W] in place of `states[step]`."""
        if x is self.states[step]:
            return self.velocities[step]
        return torch.cat([give() for give in self.passes(step, x)])

    def passes(self, step: int, x: Tensor) -> Iterator[Callable[[], Tensor]]:
        """The passes that this takes, some runs at a time, each made when it is called."""
        device, times = self.sampler.device, self.times
        for first in range(0, len(x), self.batch_size):
            rows = slice(first, first + self.batch_size)
            part = x[rows].to(device)
            t, r = (times[i].to(device).expand(len(part)) for i in (step, step + 1))
            text = {name: tensor[rows].to(device) for name, tensor in self.text.items()}
            g = None if self.g is None else self.g[rows].to(device)
            yield partial(self._give, part, t, text, r, g)

    @torch.no_grad()
    def _give(self, x: Tensor, t: Tensor, text: dict[str, Tensor], r: Tensor, g: Tensor | None) -> Tensor:
        return self.sampler.guided(x, t, text, r=r, g=g).cpu()

    def after(self, step: int, x: Tensor, u: Tensor) -> Tensor:
        """The state that a step with velocity u leads to, as the sampler takes it; its own where it is its own."""
        if x is self.states[step] and u is self.velocities[step]:
            return self.states[step + 1]
        dt = self.times[step] - self.times[step + 1]
        return (x.float() - dt * u).to(x.dtype)


Left = tuple[tuple[Cached, ...], ...]
"""What full steps have left, newest first, for each batch of runs; tokens on the CPU."""


@dataclass(frozen=True)
class Beneath:
    """A network in the place of a model's trunk, asked at the states of runs."""

    trunk: Trunk | Trunks
    """Of the model that the runs are of, attached."""
    forecaster: Forecaster

    def full(self, runs: Runs, step: int, x: Tensor, before: Left) -> tuple[Tensor, Left]:
        """The model's velocities [N, C, T, H, W] at a step from x, and what that leaves."""
        us, left = [], []
        for index, give in enumerate(runs.passes(step, x)):
            with self.trunk.full(runs.times[step]):
                us.append(give())
            (cached, *_) = self.trunk.memory()
            self.trunk.reset()
            earlier = before[index] if before else ()
            left.append((_moved(cached, torch.device("cpu")), *earlier)[: self.forecaster.history])
        return (runs.velocities[step] if x is runs.states[step] else torch.cat(us)), tuple(left)

    def answer(self, runs: Runs, step: int, x: Tensor, left: Left) -> Tensor:
        """The network's velocities [N, C, T, H, W] at a step from x."""
        us = []
        for give, memory in zip(runs.passes(step, x), left, strict=True):
            here = tuple(_moved(cached, runs.sampler.device) for cached in memory)
            with self.trunk.predicted(self.forecaster, runs.times[step], here):
                us.append(give())
        return torch.cat(us)


def _moved(cached: Cached, device: torch.device) -> Cached:
    return cached._replace(tokens={name: tokens.to(device) for name, tokens in cached.tokens.items()})


def own_runs(
    sampler: TrajectorySampler,
    prompts: Sequence[Prompt],
    seed: int,
    guidance_range: tuple[float, float],
    batch_size: int,
) -> Runs:
    """Full runs on these prompts, run i from the noise of seed + i, with scales drawn uniformly from the range.

    Raises:
        UserError: a run is not finite.
    """

    def begin(rows: slice) -> tuple[Tensor, Text]:
        captions = [caption for caption, _ in prompts[rows]]
        images = [image for _, image in prompts[rows] if image is not None] or None
        text = encode_prompts(sampler.loaded, captions, images, sampler.size["num_frames"])
        return sampler.noise([seed + i for i in range(rows.start, rows.stop)]), text

    return _runs(sampler, len(prompts), begin, seed, guidance_range, batch_size)


def runs_from(
    sampler: TrajectorySampler,
    noise: Tensor,
    text: Text,
    seed: int,
    guidance_range: tuple[float, float],
    batch_size: int,
) -> Runs:
    """As `own_runs`, from this noise [N, C, T, H, W] and text [N, ...]."""

    def begin(rows: slice) -> tuple[Tensor, Text]:
        return noise[rows], {name: tensor[rows] for name, tensor in text.items()}

    return _runs(sampler, len(noise), begin, seed, guidance_range, batch_size)


def _runs(
    sampler: TrajectorySampler,
    count: int,
    begin: Callable[[slice], tuple[Tensor, Text]],
    seed: int,
    guidance_range: tuple[float, float],
    batch_size: int,
) -> Runs:
    """`begin` gives noise and text of some of them."""
    low, high = guidance_range
    drawn = low + (high - low) * torch.rand(count, generator=generator_for(seed, GUIDANCE_INDEX))
    g = None if sampler.g is None else drawn
    kept: list[list[tuple[Tensor, Tensor]]] = [[] for _ in range(sampler.steps)]
    ends, texts = [], []
    with Progress("the model's own runs", total=math.ceil(count / batch_size)) as progress:
        for first in range(0, count, batch_size):
            rows = slice(first, min(first + batch_size, count))
            noise, text = begin(rows)
            scales = None if g is None else g[rows].to(noise.device)

            def keep(step: int, x: Tensor, u: Tensor) -> None:
                kept[step].append((x.cpu(), u.cpu()))

            ends.append(sample(sampler.guided, noise, text, sampler.grid.tensor, scales, keep).cpu())
            texts.append({name: tensor.cpu() for name, tensor in text.items()})
            progress.advance()
    states = [torch.cat([x for x, _ in parts]) for parts in kept] + [torch.cat(ends)]
    velocities = [torch.cat([u for _, u in parts]) for parts in kept]
    if not all(tensor.isfinite().all() for tensor in (*states, *velocities)):
        raise UserError("runs of the model are not finite", "try dtype=float32; if that fails too, it is broken")
    text = {name: torch.cat([part[name] for part in texts]) for name in texts[0]}
    return Runs(sampler, states, velocities, text, g, batch_size, next(iter(sampler.boundaries), None))
