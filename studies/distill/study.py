"""Which rows a study has, and in what order they are measured.

1. the teacher, 50 steps of two passes: the reference, whose latents stay in the working folder;
2. the teacher CFG-distilled for a set time, at 50 steps and, with r = t, at few;
3. students of that model, target x R, each trained equally long, at few steps.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from studies.distill.models import relative_errors, sampled, train_for, training
from studies.distill.results import Results
from vidaccel.config import loader as configuration
from vidaccel.config.distill import DistillConfig
from vidaccel.errors import TrainingFailed
from vidaccel.models.loading import load_pipeline
from vidaccel.models.weight_hashes import student_hash
from vidaccel.numbers import bootstrap

REFERENCE_STEPS = 50
FEW_STEPS = (20, 10, 8, 4)
GRID = {f"{target}-{R}": (target, R) for target in ("derivative", "rollout") for R in (0.2, 0.4, 1.0)}
NOT_SHAPING = ("teacher", "features", "on_damage", "data", "clips", "prompts")
"""Settings that say where things are, or change nothing that is measured."""


@dataclass(frozen=True)
class Student:
    """One training of the grid."""

    target: str
    restrict: float
    seed: int

    @property
    def name(self) -> str:
        return f"{self.target}-{self.restrict}-seed{self.seed}"


@dataclass
class Study:
    """What is measured into one results file."""

    cfg: DistillConfig
    student: DistillConfig
    work: Path
    """Folder for models and samples; of these settings alone."""
    results: Results

    def run(self, students: Iterable[Student]) -> None:
        """Measure every row that is not there yet."""
        self._measure_teacher()
        self._measure_cfg()
        for student in students:
            self._measure_student(student)

    def _measure_teacher(self) -> None:
        if self.results.missing([id := f"teacher-{REFERENCE_STEPS}"]):
            passes, scores = 2 * REFERENCE_STEPS, self._reference[0]
            row = {"model": "teacher", "restrict": None, "seed": None, "steps": REFERENCE_STEPS, "passes": passes}
            row |= {"trained": None, "scores": scores, "latent_error": None, "settings": None, "error": None}
            self.results.add(id, **row)

    def _measure_cfg(self) -> None:
        if missing := self._missing("cfg", (REFERENCE_STEPS, *FEW_STEPS)):
            row = {"model": "cfg", "restrict": None, "seed": self.cfg.seed, "settings": shaping(self.cfg)}
            self._sample(self._cfg_model, missing, row | {"trained": training(self._cfg_model, "cfg")})

    def _measure_student(self, student: Student) -> None:
        missing = self._missing(student.name, FEW_STEPS)
        if not missing:
            return
        own = replace(self.student.mean_velocity, target=student.target, restrict=student.restrict)
        config = replace(self.student, teacher=str(self._cfg_model), seed=student.seed, mean_velocity=own)
        row = {"model": student.target, "restrict": student.restrict, "seed": student.seed, "settings": shaping(config)}
        folder, failed = self.work / student.name, None
        try:
            train_for(self.results.made_of["minutes"], config, folder, student.target)
        except TrainingFailed as failure:
            failed = str(failure).replace(str(folder), student.name)
        row["trained"] = training(folder, student.target)
        if failed is None:
            self._sample(folder, missing, row)
            return
        for id, steps in missing.items():
            self.results.add(id, **row, steps=steps, passes=steps, scores=None, latent_error=None, error=failed)

    def _sample(self, folder: Path, rows: dict[str, int], row: dict[str, Any]) -> None:
        """Rows of one trained model: id -> steps."""
        loaded, (_, reference) = load_pipeline(folder), self._reference
        for id, steps in rows.items():
            scores, latents = sampled(loaded, steps, self.results.made_of["prompts"], self.work / "samples" / id)
            errors = relative_errors(latents, reference)
            low, high = bootstrap(errors).tolist()
            error = {"mean": sum(errors) / len(errors), "low": low, "high": high}
            self.results.add(id, **row, steps=steps, passes=steps, scores=scores, latent_error=error, error=None)

    @cached_property
    def _reference(self) -> tuple[dict[str, Any], Tensor]:
        """Scores and final latents of the teacher."""
        folder, prompts = self.work / "samples" / "teacher", self.results.made_of["prompts"]
        return sampled(load_pipeline(self.cfg.teacher), REFERENCE_STEPS, prompts, folder)

    @cached_property
    def _cfg_model(self) -> Path:
        """The CFG-distilled teacher, which is the teacher of all students."""
        folder = self.work / "cfg"
        train_for(self.results.made_of["cfg_minutes"], self.cfg, folder, "cfg")
        self.results.bind(student_hash(load_pipeline(folder)))
        return folder

    def _missing(self, name: str, steps: Iterable[int]) -> dict[str, int]:
        """Rows of a model that are not there: id -> steps."""
        return {f"{name}-{count}": count for count in steps if self.results.missing([f"{name}-{count}"])}


def shaping(config: DistillConfig) -> dict[str, Any]:
    """Settings without the places of things, or the number of steps, which follows from the time."""
    settings = {key: value for key, value in configuration.to_dict(config).items() if key not in NOT_SHAPING}
    settings["train"] = {key: value for key, value in settings["train"].items() if key != "steps"}
    return settings
