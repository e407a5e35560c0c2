"""Scalars in the loop of a network's training: it learns to answer as one term of the sum that serves (on_top.py).

Fit and training take turns (2605.13724): every so many optimiser steps the scalars of all lists are fitted anew, as
served, with the network's present answer among the terms, and stay as they are until the next fit. What is trained so
is what is missing beside the last velocities and latents, not what those say already.

    folder/scalars-00000200.json    those in force from step 200 on, from which a training that was stopped goes on
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from vidaccel.artefacts import read_json, write_json
from vidaccel.forecasters.multistep import FittedList
from vidaccel.processes import on_first
from vidaccel.train.predictor.lists import FullSteps
from vidaccel.train.predictor.runs import Beneath, Runs
from vidaccel.train.predictor.scalars import fit_lists


@dataclass
class Fits:
    """The scalars in force at each optimiser step of a training, by list of full steps."""

    runs: Runs
    """What they are fitted to, all of them."""
    lists: Sequence[FullSteps]
    beneath: Beneath
    """The network in training, in the place of the trunk."""
    folder: Path
    every: int
    """Optimiser steps between fits."""
    ridge: float
    latest: dict[FullSteps, FittedList] = field(default_factory=dict)
    """Those that were asked for last."""
    _since: int = -1

    def __call__(self, step: int) -> Mapping[FullSteps, FittedList]:
        """Those of a step: fitted now where it is due, else those of the last fit."""
        since = step - step % self.every
        if since != self._since:
            file = self.folder / f"scalars-{since:08d}.json"
            if step > since and file.is_file():
                kept = read_json(file, "train again from the start")["lists"]
                self.latest = {made.full_steps: made for made in (FittedList(**each) for each in kept)}
            else:
                self.latest = self._fitted()
                on_first(partial(write_json, file, {"lists": [made.record() for made in self.latest.values()]}))
            self._since = since
        return self.latest

    def _fitted(self) -> dict[FullSteps, FittedList]:
        found = fit_lists(self.runs, sorted(set(self.lists)), len(self.runs), self.ridge, self.beneath)
        return {made.full_steps: made for made, _ in found}
