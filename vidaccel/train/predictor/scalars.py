"""Scalars fitted to a model's own runs, and which lists of full steps are worth fitting.

A list of full steps is fitted as it serves: from the first step on, over all runs at once, each predicted step takes
the numbers that bring the state nearest to the model's own, and the next step goes on from what they leave. Full steps
run the model there, which is all that a fit costs.

Which lists are tried: the cost of a stretch from full step i, after the full step h, up to the next one j is what is
left of the own state at j outside the span of the velocities and latents of i and h on the own run, times what such
errors grow to in the end (search.py). Of two transformers a stretch looks back on full steps of its own and ends where
the other begins.

N runs, S steps
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from vidaccel.forecasters.multistep import (
    HISTORY,
    RIDGE,
    FittedList,
    fit_coefficients,
    multistep_velocity,
    share_of,
)
from vidaccel.progress import Progress
from vidaccel.train.predictor.lists import run_lists
from vidaccel.train.predictor.runs import Beneath, Left, Runs

SMALLEST = 1e-8
"""Ridge of the estimates: enough to solve, too little to count."""


@dataclass(frozen=True)
class Served:
    """Runs under a list of full steps, up to a step."""

    x: Tensor
    """[N, C, T, H, W]"""
    us: tuple[Tensor, ...] = ()
    xs: tuple[Tensor, ...] = ()
    """Of the last full steps, newest first."""
    coefficients: Mapping[int, Tensor] | None = None
    """Of the predicted steps so far."""
    left: Left = ()
    """What the network beneath looks back on, if there is one."""


def _full_step(runs: Runs, state: Served, step: int, beneath: Beneath | None) -> Served:
    if step in runs.firsts:  # of its transformer, which knows nothing of the other's
        state = replace(state, us=(), xs=(), left=())
    if beneath is None:
        u, left = runs.velocity(step, state.x), ()
    else:
        u, left = beneath.full(runs, step, state.x, state.left)
    us, xs = ((new, *old)[:HISTORY] for new, old in ((u, state.us), (state.x, state.xs)))
    return replace(state, x=runs.after(step, state.x, u), us=us, xs=xs, left=left)


def fit_lists(
    runs: Runs,
    lists: Sequence[tuple[int, ...]],
    fitted: int,
    ridge: float = RIDGE,
    beneath: Beneath | None = None,
) -> list[tuple[FittedList, Tensor]]:
    """Scalars for each list of full steps, fitted as served to the first `fitted` runs, with the final latents
    [N - fitted, ...] that they lead to on the others. With a network beneath its answer is one more term.

    Raises:
        UserError: as `fit_coefficients` does.
    """
    grid, made = runs.sampler.grid, []
    span = _varied(runs, fitted, beneath is not None)
    share = None if span is None or runs.g is None else share_of(runs.g, span)

    def full(state: Served, step: int) -> Served:
        progress.advance()
        return _full_step(runs, state, step, beneath)

    def predicted(state: Served, step: int) -> Served:
        dt = float(runs.times[step] - runs.times[step + 1])
        us, xs = ([each[:fitted] for each in kept] for kept in (state.us, state.xs))
        x = state.x[:fitted]
        target = (x.float() - runs.states[step + 1][:fitted].float()) / dt
        network = beneath.answer(runs, step, state.x, state.left) if beneath else None
        known = None if network is None else network[:fitted], None if share is None else share[:fitted]
        numbers = fit_coefficients(us, xs, x, target, ridge, *known)
        there = numbers if share is None else (numbers[0] + share[:, None] * (numbers[1] - numbers[0])).mT
        u = multistep_velocity(there, state.us, state.xs, state.x, network)
        return replace(
            state, x=runs.after(step, state.x, u), coefficients={**(state.coefficients or {}), step: numbers}
        )

    nodes = {each[: k + 1] for each in lists for k in range(len(each))}
    with Progress("lists as served", total=len(nodes)) as progress:
        for each, state in run_lists(lists, grid.steps, Served(runs.states[0]), full, predicted):
            rows = (state.coefficients or {}).items()
            numbers, *highest = (
                {step: tuple(both.reshape(-1, both.shape[-1])[end].tolist()) for step, both in rows}
                for end in ((0,) if share is None else (0, 1))
            )
            error = relative_error(state.x[fitted:], runs.states[-1][fitted:]) if fitted < len(runs) else None
            on = each, numbers, grid.steps, grid.shift, grid.times, error
            found = FittedList(*on, network=beneath is not None, boundary=runs.boundary)
            if highest:
                found = replace(found, guidance_range=span, at_highest=highest[0])
            made.append((found, state.x[fitted:]))
    return made


def _varied(runs: Runs, fitted: int, network: bool) -> tuple[float, float] | None:
    """The scales between which numbers are fitted that change with guidance, where runs differ in it and are twice as
    many as the unknowns that there then are."""
    if runs.g is None or fitted < 4 * (2 * HISTORY + 1 + network):
        return None
    low, high = float(runs.g.min()), float(runs.g.max())
    return (low, high) if low < high else None


def relative_error(x: Tensor, own: Tensor, whole: Tensor | None = None) -> float:
    """Root of the mean, over runs, of the squared error of latents [N, ...] as a share of the square of the own ones,
    or of `whole`."""
    apart = (x.double() - own.double()).flatten(1).square().sum(1)
    return math.sqrt(float((apart / (own if whole is None else whole).double().flatten(1).square().sum(1)).mean()))


def served_final(runs: Runs, made: FittedList, beneath: Beneath | None = None) -> Tensor:
    """Final latents [N, C, T, H, W] of runs that are served by these numbers, with a network beneath where they have
    one."""
    state = Served(runs.states[0])
    for step in range(made.steps):
        if step in made.full_steps:
            state = _full_step(runs, state, step, beneath)
        else:
            network = beneath.answer(runs, step, state.x, state.left) if beneath else None
            u = made.velocity(step, state.us, state.xs, state.x, network, runs.g)
            state = replace(state, x=runs.after(step, state.x, u))
    return state.x


def newest_alone(made: FittedList, network: bool = False) -> FittedList:
    """The list with numbers that give the last full step's velocity again, or the network's answer as it is."""
    rows = {step: (1.0, *[0.0] * (len(row) - made.network + network - 1)) for step, row in made.coefficients.items()}
    return replace(made, coefficients=rows, network=network, guidance_range=None, at_highest=None)


def compared(runs: Runs, lists: Sequence[FittedList]) -> list[dict[str, Any]]:
    """What run.json says of lists that were tried on these runs: the error as served, and its share of that of reuse,
    which gives the last full step's velocity again."""
    reuse = {each.full_steps: relative_error(served_final(runs, newest_alone(each)), runs.states[-1]) for each in lists}
    return [
        {
            "steps": each.steps,
            "full_steps": list(each.full_steps),
            "error": each.error,
            "of_reuse": (each.error or 0.0) / reuse[each.full_steps] if reuse[each.full_steps] else None,
        }
        for each in lists
    ]


def estimated_costs(runs: Runs, growth: Sequence[float]) -> list[list[list[float]]]:
    """costs[h][i][j] [S][S][S + 1] as `candidates` takes them, from inner products on the own runs alone.

    growth: [S + 1], what a squared error at j grows to in the final latents.
    """
    steps, gram = len(runs.velocities), _gram(runs)
    dt = (runs.times[:-1] - runs.times[1:]).double()
    states = torch.zeros(steps + 1, steps + 1, dtype=torch.float64)  # rows: x_i by x_0, u_0, ..., u_{S-1}
    states[:, 0] = 1
    for step in range(steps):
        states[step + 1 :, step + 1] = -dt[step]
    velocities = torch.eye(steps + 1, dtype=torch.float64)[1:]
    nothing = float("inf")
    costs = [[[nothing] * (steps + 1) for _ in range(steps)] for _ in range(steps)]
    for i in range(steps):
        end = next((first for first in runs.firsts if first > i), steps)
        for h in range(i) if i else [0]:
            before = [states[h], velocities[h]] if runs.begin(i) <= h < i else []
            known = torch.stack([states[i], velocities[i], *before])
            inner = known @ gram @ known.mT
            scale = inner.diagonal().sqrt()
            inner = inner / torch.outer(scale, scale) + SMALLEST * torch.eye(len(known), dtype=torch.float64)
            wanted = states[i + 1 :]
            moment = (known @ gram @ wanted.mT) / scale[:, None]
            explained = (moment * torch.linalg.solve(inner, moment)).sum(0)
            whole = (wanted @ gram * wanted).sum(1)
            left = (whole - explained).clamp(min=0)
            left[0] = 0  # the next step begins where the full one leads
            for j in range(i + 1, end + 1):
                costs[h][i][j] = float(left[j - i - 1]) * growth[j]
    return costs


def _gram(runs: Runs) -> Tensor:
    """[S + 1, S + 1] inner products of x_0 and the velocities, averaged over runs as shares of the final latents'."""
    total = torch.zeros(len(runs.velocities) + 1, len(runs.velocities) + 1, dtype=torch.float64)
    for run in range(len(runs)):
        rows = torch.stack([tensor[run].flatten() for tensor in (runs.states[0], *runs.velocities)]).double()
        total += rows @ rows.mT / runs.states[-1][run].double().square().sum()
    return total / len(runs)


def measured_growth(runs: Runs, count: int, ridge: float = RIDGE) -> list[float]:
    """[S + 1]: what a squared error in the state at j grows to in the final latents, on the first `count` runs.

    The error is that of one predicted step, of scalars over the two full steps before it, followed by full steps: S^2 /
    2 passes a run. Sums over runs are compared, because a run with next to no error would count most in a mean of
    ratios.
    """
    steps = len(runs.velocities)
    part = runs.part(slice(count))
    growth = [1.0] * (steps + 1)
    with Progress("how errors grow", total=max(0, steps - 2)) as progress:
        for j in range(2, steps):
            if j - 1 in runs.firsts:  # which is full
                progress.advance()
                continue
            before = range(j - 2, max(runs.begin(j - 1) - 1, j - 4), -1)
            us, xs = ([each[i] for i in before] for each in (runs.velocities, runs.states))
            numbers = fit_coefficients(us, xs, runs.states[j - 1], runs.velocities[j - 1], ridge)
            u = multistep_velocity(numbers, [u[:count] for u in us], [x[:count] for x in xs], part.states[j - 1])
            begun = x = part.after(j - 1, part.states[j - 1], u)
            for step in range(j, steps):
                x = part.after(step, x, part.velocity(step, x))
            at_j = relative_error(begun, part.states[j], part.states[-1])
            growth[j] = (relative_error(x, part.states[-1]) / at_j) ** 2 if at_j else 1.0
            progress.advance()
    return growth
