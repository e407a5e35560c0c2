"""Scalars on top of a trained network: its answer is one more term of the sum (forecasters/multistep.py).

They are fitted as scalars alone are, list by list and step after step on the states as served, after the network's
training: full steps run the model, predicted ones the network, both on all runs. Tried are the lists that a search for
either of the two finds and those that the network was trained with; the best of each budget is kept where it is better
than the network alone on the runs that nothing was fitted to. These choose the list as well, so that its error
is a little too good; and scalars alone, fitted at that very list, may be better at another.
"""

import logging
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vidaccel.cache.schedule import Schedule, candidates
from vidaccel.collect.bank import Bank
from vidaccel.config.predictor import PredictorConfig
from vidaccel.forecasters.learned import Predictor
from vidaccel.forecasters.multistep import FittedList, Multistep, MultistepConfig
from vidaccel.models.grid import Grid
from vidaccel.models.weight_hashes import student_hash, student_hashes
from vidaccel.train.objective import generator_for, text_of
from vidaccel.train.predictor.multistep import runs_of, sampler_of
from vidaccel.train.predictor.runs import Beneath, Runs, own_runs, runs_from
from vidaccel.train.predictor.scalars import (
    estimated_costs,
    fit_lists,
    measured_growth,
    newest_alone,
    relative_error,
    served_final,
)
from vidaccel.train.predictor.served import Starts, relative_squares
from vidaccel.train.predictor.task import PredictorTask, default_budgets

log = logging.getLogger(__name__)
FITTED_INDEX = 10**9 + 3
"""Of the generators that runs from a bank are drawn by, those to fit to and those to try on: further than any training
goes."""


@dataclass(frozen=True)
class OnTop:
    """Errors of the final latents under a list of full steps, all on the same runs, which nothing was fitted to."""

    made: FittedList
    error: float
    scalars: float
    """Of scalars alone, fitted to the same runs."""
    network: float
    """Of the network alone."""
    reuse: float
    """Of the last full step's velocity given again."""
    than_network: tuple[float, float]
    """Mean over the runs of how much larger a run's error is than that of the network alone, and its standard error;
    NaN of a single run."""
    than_scalars: tuple[float, float]
    """Likewise than that of scalars alone."""

    def record(self) -> dict[str, Any]:
        """As run.json has it."""
        return {
            "steps": self.made.steps,
            "full_steps": list(self.made.full_steps),
            "error": self.error,
            "of_reuse": self.error / self.reuse if self.reuse else None,
            "scalars": self.scalars,
            "network": self.network,
            "than_network": [number if math.isfinite(number) else None for number in self.than_network],
            "than_scalars": [number if math.isfinite(number) else None for number in self.than_scalars],
        }

    def __str__(self) -> str:
        (network, network_off), (scalars, scalars_off) = self.than_network, self.than_scalars
        return (
            f"{' '.join(map(str, self.made.full_steps))}: {self.error:.3f} (scalars alone {self.scalars:.3f}, a run "
            f"{scalars:+.3f} +- {scalars_off:.3f}; network alone {self.network:.3f}, a run {network:+.3f} +- "
            f"{network_off:.3f}; reuse {self.reuse:.3f})"
        )


class Fitting(NamedTuple):
    """What scalars are fitted to and tried on."""

    runs: Runs
    """The first `PredictorConfig.runs` to fit to, the others to try on."""
    span: tuple[float, float]
    """Of their guidance."""
    second: float | None = None
    """Scale of the second of two transformers; None is that of the first."""


def fitting_runs(task: PredictorTask) -> Fitting:
    """The student's own, on the task's data and grid."""
    config, prompts = _on_grid(task.config, task.sampling.grid), None
    if isinstance(task.data, Bank):
        sampler, span = sampler_of(config, task.loaded)
    else:
        sampler, prompts, span = runs_of(config, task.loaded)
    wanted = config.runs + config.checked_prompts
    log.info("scalars on top of the network: %d runs, guidance from %g to %g", wanted, *span)
    if prompts is not None:
        return Fitting(own_runs(sampler, prompts, config.seed, span, config.mse.batch_size), span, sampler.second)
    tried, learnt = Starts.of(task, config.clips).apart(config.search_prompts)
    drawn = [
        starts.draw(count, generator_for(config.seed, FITTED_INDEX + i), task.device)
        for i, (starts, count) in enumerate(((learnt, config.runs), (tried, config.checked_prompts)))
    ]
    whole = {name: torch.cat([part[name] for part in drawn]) for name in drawn[0]}
    noise, text = whole.pop("noise"), text_of(whole)
    return Fitting(runs_from(sampler, noise, text, config.seed, span, config.mse.batch_size), span, sampler.second)


def _on_grid(config: PredictorConfig, grid: Grid) -> PredictorConfig:
    """Settings that say the grid which a network is for, where the network or its trajectories did."""
    if grid.shift is not None:
        return replace(config, steps=grid.steps, shift=grid.shift, timesteps=None, sigmas=None)
    return replace(config, steps=grid.steps, shift=None, timesteps=None, sigmas=list(grid.times))


def fit_on_top(
    task: PredictorTask,
    predictor: Predictor,
    schedules: Sequence[Schedule],
    lists: Iterable[tuple[int, ...]],
    fitting: Fitting | None = None,
) -> tuple[list[OnTop], Multistep | None]:
    """The best lists of a network on top of which scalars pay, one for each budget that is wanted; and the scalars of
    these with what the network has for other grids.

    Args:
        predictor: as it serves, on the student of the task, whose trunk is attached.
        schedules: those that were searched for the network alone.
        lists: further ones to try.
        fitting: the runs, if they are there already.

    Raises:
        UserError: there are fewer runs than unknowns, or the fit is singular.
    """
    config, steps = task.config, task.sampling.grid.steps
    runs, span, second = fitting or fitting_runs(task)
    budgets = [budget for budget in config.budgets or default_budgets(steps, task.firsts) if budget < steps]
    wanted = {schedule.full_steps for schedule in schedules} | set(lists)
    own = runs.part(slice(config.runs))
    found = candidates(estimated_costs(own, measured_growth(own, config.search_prompts, config.ridge)), config.tried)
    wanted |= {full for ways in found.values() for _, full in ways}
    beneath = Beneath(task.trunks, predictor)
    made = fit_lists(runs, sorted(full for full in wanted if len(full) in budgets), config.runs, config.ridge, beneath)
    best: dict[int, tuple[FittedList, Tensor]] = {}
    for each in made:
        budget = len(each[0].full_steps)
        if budget not in best or _error(each[0]) < _error(best[budget][0]):
            best[budget] = each
    ordered = sorted(best.values(), key=lambda each: each[0].full_steps)
    compared = _compared(runs, ordered, config.runs, config.ridge, beneath)
    for each in compared:
        log.info("error of the final latents on %d runs at %s", len(runs) - config.runs, each)
        if each.than_scalars[0] >= 0:
            places = " ".join(map(str, each.made.full_steps))
            log.warning("at %s the network adds nothing to scalars alone, which cost no pass (multistep)", places)
    kept = [each for each in compared if each.error < each.network]
    return kept, _with_other_grids(task, predictor, [each.made for each in kept], (span, second))


def _compared(
    runs: Runs, best: Sequence[tuple[FittedList, Tensor]], fitted: int, ridge: float, beneath: Beneath
) -> list[OnTop]:
    """`best` with the final latents that each leads to on the runs that nothing was fitted to."""
    tried, found = runs.part(slice(fitted, None)), []
    own, lists = tried.states[-1], [each.full_steps for each, _ in best]
    alone = {each.full_steps: (each, x) for each, x in fit_lists(runs, lists, fitted, ridge)}
    for each, x in best:
        scalars, by_scalars = alone[each.full_steps]
        network = served_final(tried, newest_alone(each, network=True), beneath)
        reuse = served_final(tried, newest_alone(scalars))
        errors = _error(each), _error(scalars), relative_error(network, own), relative_error(reuse, own)
        found.append(OnTop(each, *errors, *(_run_by_run(x, other, own) for other in (network, by_scalars))))
    return found


def _run_by_run(x: Tensor, other: Tensor, own: Tensor) -> tuple[float, float]:
    """Mean over runs of the error of latents x [N, ...] less that of others, and its standard error."""
    mine, theirs = (relative_squares(each, own).double().sqrt() for each in (x, other))
    differences = mine - theirs
    spread = float(differences.std()) if len(differences) > 1 else math.nan
    return float(differences.mean()), spread / math.sqrt(len(differences))


def _error(made: FittedList) -> float:
    assert made.error is not None  # there are runs to try on
    return made.error


def _with_other_grids(
    task: PredictorTask,
    predictor: Predictor,
    lists: list[FittedList],
    guided: tuple[tuple[float, float], float | None],
) -> Multistep | None:
    """These lists and those of other grids that go with them, of the same guidance (`Fitting`); None if there are
    none."""
    before, (span, second) = predictor.scalars.config if predictor.scalars is not None else None, guided
    same = before is not None and (before.guidance_range, before.guidance_2) == guided
    if before is not None and before.student in student_hashes(task.loaded) and same:
        lists = [*(each for each in before.lists if each.steps != task.sampling.grid.steps), *lists]
    elif before is not None:
        log.warning("the scalars that were on top of this network are for other guidance, and are replaced")
    if not lists:
        return None
    return Multistep(
        MultistepConfig(task.loaded.family.name, student_hash(task.loaded), span, False, tuple(lists), second)
    )
