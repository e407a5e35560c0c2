"""How good a predictor is as it serves, when it is trained and on the way: errors of final latents beside reuse's."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from vidaccel.families.walk import denoisers_of
from vidaccel.forecasters.base import Forecaster
from vidaccel.forecasters.learned import Predictor
from vidaccel.forecasters.reuse import Reuse
from vidaccel.models.grid import Grid
from vidaccel.models.weight_hashes import student_hashes
from vidaccel.train.objective import generator_for, text_of
from vidaccel.train.predictor.in_loop import Fits
from vidaccel.train.predictor.lists import FullSteps
from vidaccel.train.predictor.search import list_errors
from vidaccel.train.predictor.served import (
    Serving,
    Starts,
    default_lists,
    drawn_as_sampled,
    in_numbers,
    leading,
    lists_of,
    numbers_of,
    relative_squares,
    serving_of,
)
from vidaccel.train.predictor.task import PredictorTask

log = logging.getLogger(__name__)

TRIED_INDEX = 10**9 + 2
"""Of the generator that runs are drawn by on which a predictor is compared: further than any training goes."""


class Compared(NamedTuple):
    """Errors of the final latents under a list of full steps, beside the student's own: root mean squares over runs."""

    full_steps: FullSteps
    error: float
    reuse: float
    """Of giving the cached tokens again."""

    @property
    def share(self) -> float:
        """1 for a forecaster that is no better than reuse, 0 for one that is exact."""
        return self.error / self.reuse if self.reuse else 1.0

    def record(self) -> dict[str, object]:
        """As run.json has it."""
        return {"full_steps": list(self.full_steps), "error": self.error, "of_reuse": self.share}

    def __str__(self) -> str:
        return f"{' '.join(map(str, self.full_steps))}: {self.error:.3f}, {self.share:.2f} of reuse"


def compared(
    serving: Serving,
    grid: Grid,
    forecaster: Forecaster,
    lists: Sequence[FullSteps],
    runs: Sequence[Mapping[str, Tensor]],
) -> list[Compared]:
    """A forecaster beside reuse under each list on its grid, on these runs (`Batch.tensors`), some at a time."""
    squares = {each: [0.0, 0.0] for each in lists}
    for tensors in runs:
        noise, text, g = tensors["noise"], text_of(tensors), tensors.get("g")
        for which, made in enumerate((forecaster, Reuse())):
            for each, wrong in list_errors(
                serving.student, serving.trunk, made, noise, text, grid, g, list(squares), serving.firsts
            ):
                squares[each][which] += float(wrong.sum())
    count = sum(len(tensors["noise"]) for tensors in runs)
    return [Compared(each, *((square / count) ** 0.5 for square in sums)) for each, sums in squares.items()]


def compare(task: PredictorTask, forecaster: Forecaster, starts: Starts, lists: Sequence[FullSteps]) -> list[Compared]:
    """`compared` on as many runs as the settings have prompts to search on, said in the log; warns of a forecaster that
    is worse than reuse."""
    config = task.config
    found = compared(serving_of(task), task.sampling.grid, forecaster, lists, _tried(task, starts))
    log.info(
        "error of the final latents on %d runs, as served at %s", config.search_prompts, "; ".join(map(str, found))
    )
    if worse := [each for each in found if each.share > 1]:
        log.warning(
            "the predictor is worse than giving the cached tokens again (predictor=reuse) at %s",
            "; ".join(" ".join(map(str, each.full_steps)) for each in worse),
        )
    return found


def _tried(task: PredictorTask, starts: Starts) -> list[dict[str, Tensor]]:
    """The runs (`Batch.tensors`) that a predictor is compared on, some at a time; the same every time."""
    config = task.config
    generator, left, batches = generator_for(config.seed, TRIED_INDEX), config.search_prompts, []
    while left:
        size = min(left, config.mse.batch_size)
        batches.append(drawn_as_sampled(task, starts, size, generator))
        left -= size
    return batches


@dataclass
class Shares:
    """Errors of the final latents beside those of reuse while a predictor is trained, under the scalars that are in
    force, by the names of curves (train/curves.py)."""

    task: PredictorTask
    forecaster: Forecaster
    starts: Starts
    """What the runs begin with that it is compared on."""
    fits: Fits | None = None
    _reuse: dict[FullSteps, float] = field(default_factory=dict)

    def __call__(self) -> dict[str, float]:
        served = self.task.config.pairs == "served"
        lists = lists_of(self.task) if served else default_lists(self.task.sampling.grid.steps, self.task.firsts)
        if not self._reuse:
            self._reuse = self._errors(Reuse(), lists)
        found = self._errors(self.forecaster, lists, self.fits)
        return {f"error_over_reuse/{' '.join(map(str, each))}": found[each] / self._reuse[each] for each in found}

    def _errors(self, forecaster: Forecaster, lists: Sequence[FullSteps], fits: Fits | None = None):
        """Roots of mean squares over the runs, by list."""
        serving, squares = serving_of(self.task), dict.fromkeys(lists, 0.0)
        with torch.no_grad():
            for tensors in _tried(self.task, self.starts):
                noise, text, g = tensors["noise"], text_of(tensors), tensors.get("g")
                own = serving.own(noise, text, g, kept=max(map(leading, squares)))
                for each in squares:
                    numbers = fits and numbers_of(in_numbers(fits.latest[each], g, noise.device))
                    x = serving.served(forecaster, each, own, text, g, numbers)[-1]
                    squares[each] += float(relative_squares(x, own[0][-1]).sum())
        return {each: (square / self.task.config.search_prompts) ** 0.5 for each, square in squares.items()}


def serving_predictor(task: PredictorTask, folder: Path) -> Predictor:
    """The one that was saved there, run as the student's blocks are."""
    transformers = denoisers_of(task.loaded.pipe, task.loaded.family)
    predictor = Predictor.from_pretrained(folder).to(task.device)
    predictor.check_fits(transformers[0], task.loaded.family, student_hashes(task.loaded), called=task.config.student)
    predictor.check_denoisers(task.loaded.pipe, task.loaded.family)
    return predictor.run_like(*transformers)
