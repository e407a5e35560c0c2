"""What each stretch of predicted steps costs, measured on the student's trajectories, and the cheapest schedules.

A stretch (i, j) is a full step i followed by predicted steps i + 1 ... j - 1. It begins on the student's own, all-full
trajectory; its error in the latent at j is amplified or damped by the rest of the sampling, and what counts is the
error in the final latent. So

    cost(i, j) = |x_j' - x_j|^2 / |x_S|^2 * growth(j),    growth(j) = |x_S' - x_S|^2 / |x_j' - x_j|^2

where growth(j) is measured once for each j, by full steps from what a stretch of `PROBE` steps left: S^2 / 2 full
passes in all, in place of S^3 / 6. Squares are added because the errors of a schedule's stretches point in unrelated
directions.

B prompts, S steps, C channels, T frames, H and W latent pixels
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from vidaccel.cache.schedule import Schedule, search
from vidaccel.cache.trunk import Trunk
from vidaccel.collect.encode import LATENT, batch
from vidaccel.forecasters.base import Forecaster
from vidaccel.models.grid import Grid
from vidaccel.models.velocity import Text, Velocity
from vidaccel.progress import Progress
from vidaccel.sampling import sample
from vidaccel.train.objective import generator_for
from vidaccel.train.predictor.task import PredictorTask

NOISE_INDEX = 10**9
"""Of the generator that the noise is drawn by: further than any training goes."""
PROBE = 3
"""Steps of the stretch whose error shows how errors grow: a full one and two predicted ones, as in good schedules."""


def measured_costs(task: PredictorTask, forecaster: Forecaster) -> Tensor:
    """`stretch_costs` of the first prompts of the task's data, from noise of its seed, a training batch at a time."""
    config, student = task.config, task.student
    count = min(config.search_prompts, len(task.data))
    samples = [task.data[i][0] for i in range(count)]
    generator = generator_for(config.seed, NOISE_INDEX)
    total = 0
    for first in range(0, count, config.mse.batch_size):
        chosen = samples[first : first + config.mse.batch_size]
        text = [{tensor.stored: sample[tensor.stored] for tensor in student.family.text_tensors} for sample in chosen]
        text = batch(text, task.device, student.transformer.dtype)
        shape = chosen[0]["x"].shape[1:] if "x" in chosen[0] else chosen[0][LATENT].shape
        noise = torch.randn((len(chosen), *shape), generator=generator).to(task.device, student.transformer.dtype)
        scale = task.sampling.guidance if student.embeds("g") else None
        g = None if scale is None else torch.full((len(chosen),), scale, device=task.device)
        costs = stretch_costs(student, task.trunk, forecaster, noise, text, task.sampling.grid.tensor, g)
        total = total + len(chosen) / count * costs
    return total


@torch.no_grad()
def stretch_costs(
    student: Velocity,
    trunk: Trunk,
    forecaster: Forecaster,
    noise: Tensor,
    text: Text,
    grid: Tensor,
    g: Tensor | None = None,
) -> Tensor:
    """cost(i, j) for 0 <= i < j <= S as [S, S + 1], on the CPU in float64: a relative squared error, averaged over
    prompts, and 0 where j = i + 1.

    Args:
        noise: latents [B, C, T, H, W] that the sampling begins with.
        grid: its times [S + 1].
    """
    steps = len(grid) - 1
    trajectory = _Trajectory(student, trunk, text, grid.to(noise.device), g)
    with Progress("measuring stretches", total=2 * steps - 1) as progress:
        states = [noise]
        for step in range(steps):
            states.append(trajectory.step(step, states[-1]))
        left = torch.zeros(steps, steps + 1, len(noise), dtype=torch.float64)
        drifted = {}
        for first in range(steps):
            for end, x in trajectory.stretches(forecaster, first, states):
                left[first, end] = _mean_square(x - states[end])
                if first == max(0, end - PROBE):
                    drifted[end] = x
            progress.advance()
        growth = torch.ones(steps + 1, len(noise), dtype=torch.float64)
        for end, x in drifted.items():
            begun = left[max(0, end - PROBE), end]
            final = _mean_square(sample(student, x, text, grid[end:], g) - states[-1])
            growth[end] = torch.where(begun > 0, final / begun, 1.0)
            progress.advance()
    return (left * growth / _mean_square(states[-1])).mean(-1)


def searched(costs: Tensor, grid: Grid) -> dict[int, Schedule]:
    """The cheapest schedule of every budget; what it is expected to cost is a relative error, not its square."""
    found = search(costs.tolist(), grid=grid)
    return {budget: replace(s, expected_error=math.sqrt(s.expected_error)) for budget, s in found.items()}


class _Trajectory:
    """The sampling of these prompts, one step at a time, from any state."""

    def __init__(self, student: Velocity, trunk: Trunk, text: Text, grid: Tensor, g: Tensor | None):
        self.student, self.trunk, self.text, self.grid, self.g = student, trunk, text, grid, g

    def step(self, index: int, x: Tensor) -> Tensor:
        """The state after a step from x, full or predicted as the trunk is set."""
        return sample(self.student, x, self.text, self.grid[index : index + 2], self.g)

    def stretches(self, forecaster: Forecaster, first: int, states: Sequence[Tensor]) -> Iterator[tuple[int, Tensor]]:
        """(j, state at j) of the stretches that begin with a full step `first`, shortest first; not (i, i + 1).

        A forecaster that looks back further has the full steps PROBE, 2 PROBE ... before, which schedules may not."""
        self.trunk.reset()
        for full in range(first - PROBE * (forecaster.history - 1), first + 1, PROBE):
            if full >= 0:
                with self.trunk.full(self.grid[full]):
                    x = self.step(full, states[full])
        for index in range(first + 1, len(self.grid) - 1):
            with self.trunk.predicted(forecaster, self.grid[index]):
                x = self.step(index, x)
            yield index + 1, x


def _mean_square(x: Tensor) -> Tensor:
    """[B] in float64 on the CPU."""
    return x.double().square().mean(dim=(1, 2, 3, 4)).cpu()
