"""Scalars on top of a trained network: its answer is one more term of the sum (forecasters/multistep.py).

They are fitted as scalars alone are, list by list and step after step on the states as served, after the network's
training: full steps run the model, predicted ones the network, both on all runs. Tried are the lists that a search for
either of the two finds and those that the network was trained with; the best of each budget is kept where it is better
than the network alone on the runs that nothing was fitted to.
"""

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from vidaccel.cache.schedule import Schedule, candidates
from vidaccel.forecasters.learned import Predictor
from vidaccel.forecasters.multistep import FittedList, Multistep, MultistepConfig
from vidaccel.models.weight_hashes import student_hash, student_hashes
from vidaccel.train.predictor.multistep import (
    estimated_costs,
    fit_lists,
    measured_growth,
    newest_alone,
    relative_error,
    runs_of,
    served_final,
)
from vidaccel.train.predictor.runs import Beneath, Runs, own_runs
from vidaccel.train.predictor.task import PredictorTask

log = logging.getLogger(__name__)


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

    def record(self) -> dict[str, Any]:
        """As run.json has it."""
        return {
            "steps": self.made.steps,
            "full_steps": list(self.made.full_steps),
            "error": self.error,
            "of_reuse": self.error / self.reuse if self.reuse else None,
            "scalars": self.scalars,
            "network": self.network,
        }

    def __str__(self) -> str:
        alone = f"scalars alone {self.scalars:.3f}, network alone {self.network:.3f}, reuse {self.reuse:.3f}"
        return f"{' '.join(map(str, self.made.full_steps))}: {self.error:.3f} ({alone})"


def fit_on_top(
    task: PredictorTask, predictor: Predictor, schedules: Sequence[Schedule], lists: Iterable[tuple[int, ...]]
) -> tuple[list[OnTop], Multistep | None]:
    """The best lists of a network on top of which scalars pay, one for each budget that is wanted, none for a model
    that makes two passes a step; and the scalars of these with what the network has for other grids.

    Args:
        predictor: as it serves, on the student of the task, whose trunk is attached.
        schedules: those that were searched for the network alone.
        lists: further ones to try.

    Raises:
        UserError: there are fewer runs than unknowns, or the fit is singular.
    """
    config, steps = task.config, task.sampling.grid.steps
    sampler, prompts, span = runs_of(config, task.loaded)
    if sampler.empty or sampler.grid.times != task.sampling.grid.times:
        why = "makes two passes a step" if sampler.empty else "is sampled on a grid that no shift makes"
        log.warning("no scalars are fitted on top of the network: the model %s", why)
        return [], None
    log.info("scalars on top of the network: %d runs, guidance from %g to %g", len(prompts), *span)
    runs = own_runs(sampler, prompts, config.seed, span, config.mse.batch_size)
    budgets = [budget for budget in config.budgets or range(1, steps // 2 + 1) if budget < steps]
    wanted = {schedule.full_steps for schedule in schedules} | set(lists)
    own = runs.part(slice(config.runs))
    found = candidates(estimated_costs(own, measured_growth(own, config.search_prompts, config.ridge)), config.tried)
    wanted |= {full for ways in found.values() for _, full in ways}
    beneath = Beneath(task.trunk, predictor)
    made = fit_lists(runs, sorted(full for full in wanted if len(full) in budgets), config.runs, config.ridge, beneath)
    best: dict[int, FittedList] = {}
    for each, _ in made:
        budget = len(each.full_steps)
        if budget not in best or _error(each) < _error(best[budget]):
            best[budget] = each
    compared = _compared(
        runs, sorted(best.values(), key=lambda each: each.full_steps), config.runs, config.ridge, beneath
    )
    for each in compared:
        log.info("error of the final latents on %d runs at %s", len(runs) - config.runs, each)
    kept = [each for each in compared if each.error < each.network]
    return kept, _with_other_grids(task, predictor, [each.made for each in kept], span)


def _compared(runs: Runs, best: Sequence[FittedList], fitted: int, ridge: float, beneath: Beneath) -> list[OnTop]:
    tried, found = runs.part(slice(fitted, None)), []
    own = tried.states[-1]
    alone = {each.full_steps: each for each, _ in fit_lists(runs, [each.full_steps for each in best], fitted, ridge)}
    for each in best:
        network = served_final(tried, newest_alone(each, network=True), beneath)
        reuse = served_final(tried, newest_alone(alone[each.full_steps]))
        errors = relative_error(network, own), relative_error(reuse, own)
        found.append(OnTop(each, _error(each), _error(alone[each.full_steps]), *errors))
    return found


def _error(made: FittedList) -> float:
    assert made.error is not None  # there are runs to try on
    return made.error


def _with_other_grids(
    task: PredictorTask, predictor: Predictor, lists: list[FittedList], span: tuple[float, float]
) -> Multistep | None:
    """These lists and those of other grids that go with them; None if there are none."""
    before = predictor.scalars.config if predictor.scalars is not None else None
    if before is not None and before.student in student_hashes(task.loaded) and before.guidance_range == span:
        lists = [*(each for each in before.lists if each.steps != task.sampling.grid.steps), *lists]
    elif before is not None:
        log.warning("the scalars that were on top of this network are for other guidance, and are replaced")
    if not lists:
        return None
    return Multistep(
        MultistepConfig(task.loaded.family.name, student_hash(task.loaded), span, two_pass=False, lists=tuple(lists))
    )
