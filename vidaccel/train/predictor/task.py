"""What a predictor's training and the search of its schedules work on: the frozen student, data, and how it is sampled.

A predictor is trained at one guidance scale, the one that the student is sampled with, unless a range is asked for: it
is a few per cent of the student, and every other scale is another function to learn.
"""

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch

from vidaccel.artefacts import RUN_FILE, sha256_file
from vidaccel.cache.checks import check_pipeline
from vidaccel.cache.schedule import Schedule, read_schedules
from vidaccel.cache.trunk import Trunk
from vidaccel.cache.trunks import Trunks
from vidaccel.collect.bank import Bank
from vidaccel.collect.encode import encode_texts
from vidaccel.collect.features import called_like, check_tensors, open_features
from vidaccel.collect.source import OR_PROMPTS, EncodedPrompts, EncodedSource, Prompts, open_source
from vidaccel.config import loader as configuration
from vidaccel.config.checks import CLIP_SIZE
from vidaccel.config.collect import CollectConfig
from vidaccel.config.predictor import TWO_PASS, PredictorConfig
from vidaccel.data.shards import ShardFolder
from vidaccel.errors import UserError
from vidaccel.families.base import DiTFamily
from vidaccel.families.walk import boundaries_of, denoisers_of
from vidaccel.forecasters.checkpoint import SCHEDULE_FILE, NetworkConfig
from vidaccel.models.calling import guidance_in_force, require_whole, second_guidance, unwanted
from vidaccel.models.files import local_path
from vidaccel.models.folder import family_of_index, read_json
from vidaccel.models.grid import Grid, own_grid, require_trainable
from vidaccel.models.loading import LoadedPipeline
from vidaccel.models.velocity import GuidedVelocity, SwitchedVelocity, Velocity, velocity_of
from vidaccel.models.weight_hashes import student_hash
from vidaccel.prompts import prompts_in
from vidaccel.train.predictor.pairs import Data

log = logging.getLogger(__name__)
COMMAND = "vidaccel train-predictor"
SEARCHED = "searches"
"""In run.json: `search_of` what was found, by the steps of its grid."""
ADDED = {"prompts": None, "guidance_2": None, "scalars_every": 0, "growth_every": 1}
"""Settings that earlier versions did not have, and as what these searched."""
STAGES = ("mse", "adversarial")
"""Of a training: groups of settings."""
UNTRAINED = ("reuse", "taylor")
"""Forecasters that have nothing of a transformer's own."""
OF_SEVERAL = (*UNTRAINED, "multistep", "learned")
"""Those that serve models with several transformers."""


@dataclass(frozen=True)
class Sampling:
    """How the student is sampled where the predictor is to serve."""

    grid: Grid
    guidance: float

    def record(self) -> dict[str, Any]:
        """As files say it: the times only where no shift makes them."""
        times = {"times": self.grid.times} if self.grid.shift is None else {}
        return {"steps": self.grid.steps, "shift": self.grid.shift, "guidance": self.guidance} | times


@dataclass(frozen=True)
class PredictorTask:
    """A predictor's training or search: settings, student, data and the sampling that it is for."""

    config: PredictorConfig
    loaded: LoadedPipeline
    student: Velocity
    trunks: Trunk | Trunks
    """That of the student's transformer, or of several in the place of one."""
    data: Data | Bank
    provenance: Mapping[str, Any]
    """What tells the data from others."""
    sampling: Sampling

    @property
    def clips(self) -> Data:
        """The data, where they are no bank; clips may have several sizes."""
        if isinstance(self.data, Bank):
            raise ValueError("a bank is for pairs=served alone, without a search")
        return self.data

    @cached_property
    def samples(self) -> Data:
        """Those of them that have one size, which runs are made of: that which most have."""
        return self.clips.commonest()

    @property
    def boundary(self) -> float | None:
        """Time below which the second of two transformers takes over."""
        return next(iter(boundaries_of(self.loaded.pipe, self.loaded.family)), None)

    @property
    def firsts(self) -> tuple[int, ...]:
        """The steps with which each transformer begins."""
        return self.sampling.grid.firsts(boundaries_of(self.loaded.pipe, self.loaded.family))

    @property
    def velocities(self) -> list[Velocity]:
        """The student's, of each of its transformers."""
        further = self.student.further if isinstance(self.student, SwitchedVelocity) else ()
        return [self.student, *(cast(Velocity, each) for each in further)]

    @property
    def device(self) -> torch.device:
        return next(self.student.transformer.parameters()).device


def trainable_student(loaded: LoadedPipeline, config: PredictorConfig) -> tuple[Velocity, float, bool]:
    """The student of `config`, frozen, the scale that it is called with, and whether it makes two passes a step here.

    Raises:
        UserError: no predictor can be trained for it, or not as asked, whatever is learnt from.
    """
    require_trainable(loaded.family, "the training of a predictor")
    refuse_several(loaded.family, config)
    require_whole(loaded)
    check_pipeline(loaded.pipe, loaded.family)  # now, and not when what was trained is to be served
    student = velocity_of(loaded).requires_grad_(False).eval()
    own = None if student.embeds("g") else loaded.call.get("two_pass", True)
    twice = bool(own) and config.forecaster in UNTRAINED
    guidance = _guidance(loaded, config, student, twice)
    if not twice and (isinstance(student, SwitchedVelocity) or config.guidance_2 is not None):
        second = second_guidance(loaded, config.guidance, config.guidance_2, False if student.embeds("g") else None)
        if isinstance(student, SwitchedVelocity):  # over a range it is the first's, unless it has its own
            student.second = second if config.guidance_2 or not config.guidance_range else None
    return student, guidance, twice


def task_of(
    loaded: LoadedPipeline,
    config: PredictorConfig,
    made: NetworkConfig | None,
    opened: tuple[Bank, dict[str, Any]] | None = None,
) -> PredictorTask:
    """The student of `config`, frozen; `made` is the predictor, if there is one already, whose grid is then taken.

    `opened` are data, and what tells them from others, in place of those of `config`.

    Raises:
        UserError: no predictor can be trained for this student, or on these data, or not as asked.
    """
    student, guidance, twice = trainable_student(loaded, config)
    data, provenance = opened or _open_data(loaded, config)
    told = called_like(data, loaded) if twice and isinstance(data, ShardFolder) else loaded
    if twice:
        guidance, _ = guidance_in_force(told, config.guidance, None)
    grid = Grid.listed(config.timesteps, config.sigmas) or (made.grid if made else None)
    if grid is None:
        steps = loaded.default("steps")
        shifted = Grid.shifted(steps, config.shift) if config.shift else None
        grid = shifted or own_grid(loaded.pipe.scheduler, loaded.family, steps)
    sampling = _sampling(grid, guidance, config, data)
    _second_as_collected(student, config, data)
    student, guided = _guided(student, told, config, sampling.guidance, twice)
    provenance = provenance | guided
    if sampling.grid.steps < 2:
        raise UserError("a student of one step has nothing to predict from", "set steps to 2 or more")
    boundaries = boundaries_of(loaded.pipe, loaded.family)
    firsts = sampling.grid.firsts(boundaries)
    check_budgets(config.budgets, sampling.grid.steps, firsts)
    looks_back = {"reuse": 1, "linear": 1, "taylor": 2}  # as they are made by name
    history = made.history if made else looks_back.get(config.forecaster, config.history)
    if config.forecaster == "learned":
        require_predicted(sampling.grid.steps, firsts)
    trunks = [Trunk(each, loaded.family, history) for each in denoisers_of(loaded.pipe, loaded.family)]
    whole = Trunks(trunks, boundaries) if boundaries else trunks[0]
    return PredictorTask(config, loaded, student, whole, data, provenance, sampling)


def _guided(
    student: Velocity, loaded: LoadedPipeline, config: PredictorConfig, guidance: float, twice: bool
) -> tuple[Velocity, dict[str, Any]]:
    """The student in two passes where it makes some, called as `loaded` is; and what tells that from others.

    Raises:
        UserError: a negative prompt, and one pass a step; or a second scale that nothing takes.
    """
    second = second_guidance(loaded, config.guidance, config.guidance_2, True) if twice else None
    if not twice or guidance == 1:
        if config.negative_prompt:
            raise UserError(
                f"negative_prompt={config.negative_prompt!r} needs two passes a step, and {loaded.source} makes one",
                "leave it out; a student has the one inside that it was distilled with",
            )
        return student, {}
    away_from = unwanted(loaded) if config.negative_prompt is None else config.negative_prompt
    said = {"guidance": guidance, "negative_prompt": away_from}
    if second is not None:
        said["guidance_2"] = second
    log.info("two passes a step: %s", " ".join(f"{name}={value}" for name, value in said.items()))
    return GuidedVelocity(student, encode_texts(loaded, [away_from]), guidance, second), said


def check_student(config: PredictorConfig) -> None:
    """`refuse_several` of a folder's student, a `model` that is for none, and prompts that cannot be read, before any
    weight is read."""
    if config.prompts is not None:
        prompts_in(Path(config.prompts))
    if config.model is not None and not local_path(config.student).is_file():
        raise UserError(
            f"model={config.model} is for a student that is a file of released weights, and {config.student} is none",
            "name what the predictor is for as student=, and leave model= out",
        )
    index = local_path(config.student) / "model_index.json"
    family = family_of_index(read_json(index)) if index.is_file() else None
    if family is not None:
        refuse_several(family, config)


def refuse_several(family: DiTFamily, config: PredictorConfig) -> None:
    """`UserError` where a family denoises with several transformers, for what is trained on one."""
    if len(family.denoisers) == 1:
        return
    several = f"{family.title} denoises with {len(family.denoisers)} transformers"
    if config.forecaster not in OF_SEVERAL:
        raise UserError(
            f"{several}, and forecaster={config.forecaster} is fitted to one",
            f"take forecaster={'|'.join(OF_SEVERAL)}",
        )


def check_budgets(budgets: Sequence[int] | None, steps: int, firsts: Sequence[int]) -> None:
    """`UserError` for numbers of full steps, where some are asked for, that are none of so many steps, or are all fewer
    than `firsts`, the steps with which transformers begin; that some are is said."""
    if not budgets:
        return
    if budgets[-1] > steps:
        raise UserError(f"budgets={list(budgets)}, and there are {steps} steps", f"take {steps} or fewer")
    least, few = len(firsts), [budget for budget in budgets if budget < len(firsts)]
    why = f"the first step of each of {least} transformers is full"
    if len(few) == len(budgets):
        raise UserError(f"budgets={list(budgets)}, and {why}", f"take budgets=[{least}] or more")
    if few:
        log.warning("budgets=%s are left out: %s", few, why)


def default_budgets(steps: int, firsts: Sequence[int]) -> range:
    """Numbers of full steps of those who fit scalars: up to half of the steps, or those that have to be full."""
    return range(len(firsts), max(steps // 2, len(firsts)) + 1)


def require_predicted(steps: int, firsts: Sequence[int]) -> None:
    """`UserError` where transformers begin with every step."""
    if len(firsts) == steps:
        raise UserError(
            f"each of {steps} steps is the first of a transformer, and leaves nothing to predict",
            "set steps= to more",
        )


def search_of(config: PredictorConfig, student: str, data: object) -> str:
    """SHA-256 of all that decides what a search finds, by which one that is asked for again is known as done.

    Args:
        config: its settings, as they are given.
        student: `student_hash` of the model.
        data: what tells its captions from others.
    """
    given = {key: value for key, value in configuration.to_dict(config).items() if key != "stage"}
    given = {key: value for key, value in given.items() if key not in ADDED or value != ADDED[key]}
    for stage in STAGES:
        del given[stage]["gates_every"]  # which finds nothing, and which earlier versions did not have
    text = json.dumps({"settings": given, "student": student, "data": data}, sort_keys=True, default=list)
    return hashlib.sha256(text.encode()).hexdigest()


def search_asked(task: PredictorTask, config: PredictorConfig) -> str:
    """`search_of` the settings as they were given."""
    return search_of(config, student_hash(task.loaded), task.provenance)


def schedules_found(task: PredictorTask, output: Path) -> list[Schedule]:
    """The schedules that are there for the task's grid."""
    return [s for s in read_schedules(output / SCHEDULE_FILE) if s.steps == task.sampling.grid.steps]


def described(task: PredictorTask, config: PredictorConfig, started: datetime) -> dict[str, Any]:
    """What run.json says of a training: the settings as they were given, and what was learnt from."""
    given, parents = configuration.to_dict(config), parents_of(task.loaded, task.config)
    return {"config": given, "seed": config.seed, "started": started.isoformat(), "parents": parents}


def parents_of(loaded: LoadedPipeline, config: PredictorConfig) -> dict[str, str]:
    """SHA-256 of the run.json of what a predictor is made of, where it has one."""
    folders = {"student": loaded.source} | ({"features": config.features} if config.features else {})
    files = {role: Path(folder) / RUN_FILE for role, folder in folders.items()}
    return {role: sha256_file(file) for role, file in files.items() if file.is_file()}


def _guidance(loaded: LoadedPipeline, config: PredictorConfig, student: Velocity, twice: bool) -> float:
    guidance, two_pass = guidance_in_force(loaded, config.guidance, False if student.embeds("g") else None)
    if two_pass and guidance > 1 and not twice:
        raise UserError(
            f"{loaded.source} makes two passes a step, and a predictor is trained for one",
            f"distil its guidance first (vidaccel distill --conf cfg), take forecaster={'|'.join(TWO_PASS)}, or set "
            "guidance=1",
        )
    if config.guidance_range and not student.embeds("g"):
        raise UserError(
            f"guidance_range={config.guidance_range} is for a student that embeds its guidance",
            "set guidance_range=null",
        )
    return guidance


def _open_data(loaded: LoadedPipeline, config: PredictorConfig) -> tuple[Data, dict[str, Any]]:
    if config.features is not None:
        # Only the texts are wanted for a search and for served runs, and both kinds have them.
        kind = None if config.stage == "search" else {"data": "encoded", "trajectory": "trajectory"}.get(config.pairs)
        several = kind == "encoded" and config.forecaster == "learned"  # batches of one size each
        features = open_features(config.features, kind, loaded.hashes, config.on_damage, several)
        check_tensors(features, loaded)
        if features.buckets is not None:
            log.info("clips of %d sizes, batches of one each", len(features.buckets.groups))
        return features, {"features": sha256_file(features.folder / RUN_FILE), "samples": len(features)}
    own = {name: getattr(config, name) for name in ("data", "clips", "seed", *CLIP_SIZE)}
    clips = CollectConfig(model=config.student, **own)
    if config.prompts is not None:
        prompts = Prompts(tuple(prompts_in(Path(config.prompts))))
        return EncodedPrompts(loaded, prompts, clips), {"clips": len(prompts)} | prompts.fingerprint
    source = open_source(loaded, clips, "" if config.forecaster == "learned" else OR_PROMPTS)
    return EncodedSource(loaded, source), {"clips": len(source)} | source.fingerprint


def _sampling(grid: Grid, guidance: float, config: PredictorConfig, data: Data | Bank) -> Sampling:
    """What the settings say, or else the trajectories that are learnt from, or else the student itself."""
    own = {"steps": grid.steps, "shift": grid.shift, "guidance": guidance}
    asked = {name: getattr(config, name) for name in own if getattr(config, name) is not None}
    run, fixed = _run_of(config, data), []
    if "guidance" in run:  # a search may have encoded clips, and is of any grid, whatever was learnt from
        fixed = list(own) if config.stage == "all" else ["guidance"]
    own |= {name: run[name] for name in fixed}
    changed = [name for name in fixed if asked.get(name, own[name]) != own[name]]
    if changed:
        differing = [f"{name}={_shown(own[name])}, not {_shown(asked[name])}" for name in changed]
        raise UserError(
            f"the trajectories in {config.features} are of {'; '.join(differing)}",
            "leave these settings out, or collect trajectories with them",
        )
    steps, shift, guidance = (own | asked).values()
    if "steps" in fixed and not isinstance(data, Bank) and "times" in data[0][0] and run.get("shift") is None:
        grid = _same_times(Grid(tuple(data[0][0]["times"].tolist())), config)
    if (steps, shift) != (grid.steps, grid.shift):
        if shift is None:
            raise UserError(f"no shift makes {grid}, and steps={steps} is another grid", "set shift= as well")
        grid = Grid.shifted(steps, shift)
    return Sampling(grid, guidance)


def _run_of(config: PredictorConfig, data: Data | Bank) -> Mapping[str, Any]:
    """What is recorded of the trajectories that are learnt from, if it is trajectories."""
    return data[0][1] if config.pairs == "trajectory" and not isinstance(data, Bank) else {}


def _second_as_collected(student: Velocity, config: PredictorConfig, data: Data | Bank) -> None:
    """Have the second of two transformers told the scale that it had in the trajectories that are learnt from;
    `UserError` if another one is asked for."""
    run = _run_of(config, data)
    if not isinstance(student, SwitchedVelocity) or "guidance_2" not in run:
        return
    if config.guidance_2 not in (None, run["guidance_2"]):
        differing = f"guidance_2={_shown(run['guidance_2'])}, not {_shown(config.guidance_2)}"
        raise UserError(
            f"the trajectories in {config.features} are of {differing}",
            "leave it out, or collect trajectories with it",
        )
    if not config.guidance_range:
        student.second = run["guidance_2"]


def _same_times(run: Grid, config: PredictorConfig) -> Grid:
    """The grid of trajectories that no shift makes; `UserError` if another one is asked for."""
    asked = Grid.listed(config.timesteps, config.sigmas)
    if asked is not None and not (asked.steps == run.steps and run.fits(asked.times)):
        raise UserError(
            f"the trajectories in {config.features} are of {run}, not {asked}",
            "leave these settings out, or collect trajectories with them",
        )
    return run


def _shown(number: float | None) -> str:
    return "none" if number is None else f"{number:g}"
