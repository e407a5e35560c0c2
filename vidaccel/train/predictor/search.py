"""What each stretch of predicted steps costs, measured on the student's trajectories, and the cheapest schedules.

A stretch (i, j) is a full step i followed by predicted steps i + 1 ... j - 1. It begins on the student's own, all-full
trajectory; its error in the latent at j is amplified or damped by the rest of the sampling, and what counts is the
error in the final latent. So

    cost(i, j) = |x_j' - x_j|^2 / |x_S|^2 * growth(j),    growth(j) = |x_S' - x_S|^2 / |x_j' - x_j|^2

where growth(j) is measured once for each j, by full steps from what a stretch of `PROBE` steps left: S^2 / 2 full
passes in all, in place of S^3 / 6, and with `growth_every` n for each n-th j, with its logarithm linear in between:
S^2 / 2n. Squares are added because the errors of a schedule's stretches point in unrelated
directions. Of a forecaster that looks back on two full steps, cost(h, i, j) knows the one before as well (DPCache,
2602.22654); what full steps leave is then kept, one set of tokens a step, so that only predicted steps are S^3 / 6.

The sum is an estimate. The cheapest lists of each budget are run as they serve on other prompts, and the best is kept.

B prompts, S steps, C channels, T frames, H and W latent pixels
"""

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from vidaccel.cache.schedule import Schedule, candidates
from vidaccel.cache.trunk import Trunk
from vidaccel.cache.trunks import Trunks
from vidaccel.collect.encode import LATENT, batch
from vidaccel.config.predictor import PredictorConfig
from vidaccel.families.walk import stored_inputs
from vidaccel.forecasters.base import Cached, Forecaster
from vidaccel.models.grid import Grid
from vidaccel.models.velocity import GuidedVelocity, Text, Velocity
from vidaccel.processes import gathered
from vidaccel.progress import Progress
from vidaccel.sampling import sample
from vidaccel.train.objective import generator_for
from vidaccel.train.predictor.lists import run_lists
from vidaccel.train.predictor.task import PredictorTask

log = logging.getLogger(__name__)
Result = TypeVar("Result")
NOISE_INDEX = 10**9
"""Of the generator that the noise is drawn by: further than any training goes."""
PROBE = 3
"""Steps of the stretch whose error shows how errors grow: a full one and two predicted ones, as in good schedules."""


class Passes(NamedTuple):
    """Of a search, over all its prompts."""

    full: float
    predicted: float


def passes_of_search(config: PredictorConfig, steps: int, prompts: int, checked: int) -> Passes:
    """Those of stretches, how errors grow, and the cheapest lists run as they serve, at most: stretches on so many
    prompts, lists on so many others."""
    history = config.history if config.forecaster == "learned" else 2 if config.forecaster == "taylor" else 1
    growth = sum(steps - end for end in range(2, steps, config.growth_every))
    if history == 1:
        stretches = Passes(2 * steps, steps * (steps - 1) / 2)
    else:
        stretches = Passes(steps, sum(max(i, 1) * (steps - 1 - i) for i in range(steps)))
    lists = passes_of_lists(config, steps, range(1, steps + 1))
    full = prompts * (stretches.full + growth) + checked * (steps + lists.full)
    return Passes(full, prompts * stretches.predicted + checked * lists.predicted)


def passes_of_lists(config: PredictorConfig, steps: int, every: range) -> Passes:
    """Of a prompt under all lists that are tried, as if they had nothing in common."""
    budgets = [budget for budget in config.budgets or every if budget <= steps]
    counts = {budget: min(config.tried, math.comb(steps - 1, budget - 1)) for budget in budgets}
    full = min(sum(count * budget for budget, count in counts.items()), 2 ** (steps - 1))
    return Passes(full, sum(count * (steps - budget) for budget, count in counts.items()))


def search_schedules(task: PredictorTask, forecaster: Forecaster) -> list[Schedule]:
    """The best schedule of every budget that is wanted: of the cheapest lists by `measured_costs` the one whose final
    latents are nearest to those of full steps, run as it serves on prompts of their own, where there are any."""
    config, grid = task.config, task.sampling.grid
    prompts = min(config.search_prompts, len(task.samples))
    checked = min(config.checked_prompts, len(task.samples) - prompts)
    twice = 2 if isinstance(task.student, GuidedVelocity) else 1
    full, predicted = (twice * number for number in passes_of_search(config, grid.steps, prompts, checked))
    said = "the search takes %.0f full passes and %.0f predicted ones at most, on %d prompts (--plan says the hours)"
    log.info(said, full, predicted, prompts + checked)
    found = candidates(measured_costs(task, forecaster).tolist(), config.tried)
    kept = {budget: found[budget] for budget in config.budgets or found if budget in found}
    lists = [full for ways in kept.values() for _, full in ways]
    errors = served_errors(task, forecaster, lists)
    schedules = []
    for ways in kept.values():
        known = {full: errors.get(full, math.sqrt(cost)) for cost, full in ways}
        best = min(known, key=known.__getitem__)
        schedules.append(Schedule(grid.steps, best, "search", grid.shift, known[best], grid.times, task.boundary))
    return schedules


def measured_costs(task: PredictorTask, forecaster: Forecaster) -> Tensor:
    """`stretch_costs` of the first prompts of the task's data, from noise of its seed, a training batch at a time."""
    count = min(task.config.search_prompts, len(task.samples))

    def costs(noise: Tensor, text: Text, g: Tensor | None) -> Tensor:
        grid = task.sampling.grid.tensor
        apart = task.config.growth_every
        found = stretch_costs(task.student, task.trunks, forecaster, noise, text, grid, g, task.firsts, apart)
        return len(noise) / count * found

    first, *others = _of_batches(task, 0, count, NOISE_INDEX, costs)
    return sum(others, first)


def served_errors(
    task: PredictorTask, forecaster: Forecaster, lists: Sequence[tuple[int, ...]]
) -> dict[tuple[int, ...], float]:
    """Error of the final latents of each list of full steps as it serves, root of the mean squared share of those of
    full steps, on the prompts that follow those of `measured_costs`; {} if there are none."""
    first = min(task.config.search_prompts, len(task.samples))
    count = min(task.config.checked_prompts, len(task.samples) - first)

    def errors(noise: Tensor, text: Text, g: Tensor | None) -> dict[tuple[int, ...], float]:
        grid, firsts = task.sampling.grid, task.firsts
        found = list_errors(task.student, task.trunks, forecaster, noise, text, grid, g, lists, firsts)
        return {full: float(wrong.sum()) / count for full, wrong in found}

    each = _of_batches(task, first, count, NOISE_INDEX + 1, errors)
    return {full: math.sqrt(sum(batch[full] for batch in each)) for full in dict.fromkeys(lists)} if each else {}


@torch.no_grad()
def list_errors(
    student: Velocity,
    trunk: Trunk | Trunks,
    forecaster: Forecaster,
    noise: Tensor,
    text: Text,
    grid: Grid,
    g: Tensor | None,
    lists: Sequence[tuple[int, ...]],
    firsts: Sequence[int] = (0,),
) -> Iterator[tuple[tuple[int, ...], Tensor]]:
    """(full steps, squared error [B] of the final latents as a share of those of full steps) of each list, which holds
    the steps of `firsts`, with which each denoiser begins."""
    own = sample(student, noise, text, grid.tensor, g)
    trajectory = _Trajectory(student, trunk, text, grid.tensor.to(noise.device), g)
    nodes = {each[: k + 1] for each in lists for k in range(len(each))}
    with Progress("lists as served", total=len(nodes)) as progress:

        def full(state: tuple[Tensor, tuple[Cached, ...]], step: int) -> tuple[Tensor, tuple[Cached, ...]]:
            x, memory = state
            memory = () if step in firsts else memory
            with trunk.full(trajectory.grid[step]):
                x = trajectory.step(step, x)
            progress.advance()
            return x, (trunk.memory()[0], *memory)[: forecaster.history]

        def predicted(state: tuple[Tensor, tuple[Cached, ...]], step: int) -> tuple[Tensor, tuple[Cached, ...]]:
            x, memory = state
            with trunk.predicted(forecaster, trajectory.grid[step], memory):
                return trajectory.step(step, x), memory

        start: tuple[Tensor, tuple[Cached, ...]] = noise, ()
        for each, (x, _) in run_lists(lists, grid.steps, start, full, predicted):
            yield each, _mean_square(x - own) / _mean_square(own)


def _of_batches(
    task: PredictorTask, first: int, count: int, index: int, of: Callable[[Tensor, Text, Tensor | None], Result]
) -> list[Result]:
    """`of` each batch of `_noised`, in their order; processes share the batches."""
    drawn = enumerate(_noised(task, first, count, index))
    numbers = range(math.ceil(count / task.config.mse.batch_size))
    return gathered(numbers, lambda number: of(*next(batch for place, batch in drawn if place == number)))


def _noised(task: PredictorTask, first: int, count: int, index: int) -> Iterator[tuple[Tensor, Text, Tensor | None]]:
    """Noise, text and scales of `count` prompts of the task's data from the first on, a training batch at a time."""
    config, student = task.config, task.student
    samples = [task.samples[first + i][0] for i in range(count)]
    generator = generator_for(config.seed, index)
    for start in range(0, count, config.mse.batch_size):
        chosen = samples[start : start + config.mse.batch_size]
        names = stored_inputs(student.transformer, student.family)
        text = [{name: sample[name] for name in names} for sample in chosen]
        shape = chosen[0]["x"].shape[1:] if "x" in chosen[0] else chosen[0][LATENT].shape
        noise = torch.randn((len(chosen), *shape), generator=generator).to(task.device, student.transformer.dtype)
        scale = task.sampling.guidance if student.embeds("g") else None
        g = None if scale is None else torch.full((len(chosen),), scale, device=task.device)
        yield noise, batch(text, task.device, student.transformer.dtype), g


@torch.no_grad()
def stretch_costs(
    student: Velocity,
    trunk: Trunk | Trunks,
    forecaster: Forecaster,
    noise: Tensor,
    text: Text,
    grid: Tensor,
    g: Tensor | None = None,
    firsts: Sequence[int] = (0,),
    growth_every: int = 1,
) -> Tensor:
    """cost(i, j) for 0 <= i < j <= S as [S, S + 1], on the CPU in float64: a relative squared error, averaged over
    prompts, and 0 where j = i + 1. Of a forecaster that looks back on two full steps cost(h, i, j) as [S, S, S + 1],
    after the full step h; at h = 0 where there is none before.

    Args:
        noise: latents [B, C, T, H, W] that the sampling begins with.
        grid: its times [S + 1].
        firsts: the steps with which each denoiser begins. A stretch that goes past another's first has infinite cost.
        growth_every: steps from one end whose growth is measured to the next.
    """
    steps, looks_back = len(grid) - 1, forecaster.history > 1
    trajectory = _Trajectory(student, trunk, text, grid.to(noise.device), g)
    begin = [max(first for first in firsts if first <= step) for step in range(steps)]  # of the denoiser of each step
    befores = [(h, i) for i in range(steps) for h in (range(i) if i and looks_back else [i])]
    with Progress("measuring stretches", total=len(befores) + len(range(2, steps + 1, growth_every))) as progress:
        states, kept = [noise], []
        for step in range(steps):
            if looks_back:
                states.append(trajectory.remembered(step, states[-1], kept))
            else:
                states.append(trajectory.step(step, states[-1]))
        left = torch.zeros(steps, steps, steps + 1, len(noise), dtype=torch.float64)
        drifted = {}
        for before, first in befores:
            known = dict.fromkeys(i for i in (first, before) if i >= begin[first])
            memory = [kept[i] for i in known] if looks_back else None
            last = min((i for i in firsts if i > first), default=steps)
            for end, x in trajectory.stretches(forecaster, first, states, memory, last):
                left[before, first, end] = _mean_square(x - states[end])
                probe = max(begin[end - 1], end - PROBE)
                if first == probe and before == (max(0, first - PROBE) if looks_back else first):
                    drifted[end] = before, x
            progress.advance()
        growth = torch.ones(steps + 1, len(noise), dtype=torch.float64)
        measured = sorted(drifted)[::growth_every]
        for end in measured:
            before, x = drifted[end]
            begun = left[before, max(begin[end - 1], end - PROBE), end]
            final = _mean_square(sample(student, x, text, grid[end:], g) - states[-1])
            growth[end] = torch.where(begun > 0, final / begun, 1.0)
            progress.advance()
        for below, above in pairwise([*measured, steps]):
            for end in range(below + 1, above):
                share = (end - below) / (above - below)
                growth[end] = growth[below] ** (1 - share) * growth[above] ** share
    costs = (left * growth / _mean_square(states[-1])).mean(-1)
    for switch in firsts[1:]:
        costs[:, :switch, switch + 1 :] = math.inf
    return costs if looks_back else costs.diagonal().mT


class _Trajectory:
    """The sampling of these prompts, one step at a time, from any state."""

    def __init__(self, student: Velocity, trunk: Trunk | Trunks, text: Text, grid: Tensor, g: Tensor | None):
        self.student, self.trunk, self.text, self.grid, self.g = student, trunk, text, grid, g

    def step(self, index: int, x: Tensor) -> Tensor:
        """The state after a step from x, full or predicted as the trunk is set."""
        return sample(self.student, x, self.text, self.grid[index : index + 2], self.g)

    def remembered(self, index: int, x: Tensor, kept: list[Cached]) -> Tensor:
        """A full step, of which `kept` gets what it leaves."""
        with self.trunk.full(self.grid[index]):
            x = self.step(index, x)
        kept.append(self.trunk.memory()[0])
        return x

    def stretches(
        self,
        forecaster: Forecaster,
        first: int,
        states: Sequence[Tensor],
        memory: Sequence[Cached] | None,
        last: int,
    ) -> Iterator[tuple[int, Tensor]]:
        """(j, state at j) of the stretches that begin with a full step `first`, shortest first, to j = `last`, without
        (i, i + 1).

        `memory` is what that and the one before left; None runs it, for a forecaster that looks back on one."""
        if memory is None:
            self.trunk.reset()
            with self.trunk.full(self.grid[first]):
                x = self.step(first, states[first])
            given = {}
        else:
            x, given = states[first + 1], {"memory": tuple(memory)}
        for index in range(first + 1, last):
            with self.trunk.predicted(forecaster, self.grid[index], **given):
                x = self.step(index, x)
            yield index + 1, x


def _mean_square(x: Tensor) -> Tensor:
    """[B] in float64 on the CPU."""
    return x.double().square().mean(dim=(1, 2, 3, 4)).cpu()
