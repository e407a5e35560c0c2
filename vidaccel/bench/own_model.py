"""A benchmark's settings made to fit the model that they name: what is its own is read from it, and what belongs to
another world is left out. Whatever changes is said.
"""

import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from vidaccel.artefacts import refuse_unfinished
from vidaccel.bench.baselines.registry import lacks
from vidaccel.bench.measures.quality import prompts_of
from vidaccel.bench.models import Models
from vidaccel.bench.sizes import planned_family
from vidaccel.cache.schedule import schedules_of
from vidaccel.config.benchmark import BenchmarkConfig, MethodConfig
from vidaccel.config.checks import SIZE
from vidaccel.errors import UserError
from vidaccel.families.base import DiTFamily
from vidaccel.families.registry import FAMILIES
from vidaccel.forecasters.checkpoint import SCHEDULE_FILE
from vidaccel.models.calling import guidance_in_force, second_guidance
from vidaccel.models.files import local_path
from vidaccel.models.folder import family_of_index, read_json
from vidaccel.models.grid import Grid
from vidaccel.models.lineage import lora_of_root, recorded, teachers
from vidaccel.models.loading import LoadedPipeline
from vidaccel.sampling import warn_of_unknown_words
from vidaccel.worlds import WORLDS, shipped_models, world

log = logging.getLogger(__name__)

OF_A_WORLD = ("student", "distilled", "predictor", "decoder", "scorer")
"""Settings that may name what a world ships."""


def with_ancestors(config: BenchmarkConfig) -> BenchmarkConfig:
    """With the model that the student was distilled from, by way of which other, where it is not named.

    Raises:
        UserError: neither is named, or what the student came from is not to be found.
    """
    if config.model is not None:
        return _as_distilled(config)
    if config.student is None:
        raise UserError(
            "no model is named", "set model=FOLDER (or student=FOLDER), or time random weights: --random-weights"
        )
    found = teachers(config.student, "name it: model=FOLDER")
    if not found:
        refuse_unfinished(local_path(config.student))
        raise UserError(f"{config.student} is no student", "name it as model=, or set model=FOLDER beside it")
    changes: dict[str, Any] = {"model": found[-1]}
    if config.lora is None and (lora := lora_of_root(config.student, found)):
        changes["lora"] = lora
    if config.distilled is None and len(found) > 1 and _is_cfg(found[-2]) and not _is_half(found[-2]):
        changes["distilled"] = found[-2]
    shown = {key: f"[{','.join(value)}]" if key == "lora" else value for key, value in changes.items()}
    said = " ".join(f"{key}={value}" for key, value in shown.items())
    log.info("%s, which %s was distilled from", said, config.student)
    return replace(config, **changes)


def _as_distilled(config: BenchmarkConfig) -> BenchmarkConfig:
    """With the LoRA files that `model` had when the student was distilled from it, where nobody says any."""
    try:
        found = teachers(config.student, "") if config.student and config.lora is None else []
    except UserError:  # another model is held against the student
        return config
    lora = lora_of_root(config.student or "", found) if found and found[-1] == config.model else None
    if lora is None:
        return config
    log.info("lora=[%s], with which %s was distilled from %s", ",".join(lora), config.student, config.model)
    return replace(config, lora=lora)


def fitted(config: BenchmarkConfig, models: Models) -> BenchmarkConfig:
    """With the family of the model, the size that it or the student is made for where none is said, and as many scored
    prompts as there are; without shipped student, predictor, decoder and scorer where the model is not of their
    world."""
    assert config.model is not None
    planned_family(config)  # whose name is one, whatever the model's is
    loaded = models.pipeline(MethodConfig(model=config.model))
    if loaded.family.name != config.family:
        log.info("family=%s, which %s is of", loaded.family.name, config.model)
        config = replace(config, family=loaded.family.name)
    if dropped := _foreign(config, loaded):
        log.info("%s is no model of %s: without %s", config.model, " or ".join(WORLDS), ", ".join(dropped))
        config = replace(config, **dict.fromkeys(dropped))
    if config.guidance_2 is not None:
        second_guidance(loaded, config.guidance, config.guidance_2, None)  # now, whether it has a second
    _say_of_students_negative_prompt(config)
    models.config = config
    if config.sizes is None:
        made_for = loaded if config.student is None else models.pipeline(MethodConfig())
        config = replace(config, sizes=[[made_for.default(name) for name in SIZE]])
    config = _of_one_size(config)
    if config.prompts:
        config = replace(config, scored_prompts=min(config.scored_prompts, len(config.prompts)))
    elif config.scorer:
        warn_of_unknown_words(loaded, " ".join(prompts_of(config, config.scored_prompts)))
    models.config = config
    return config


def _say_of_students_negative_prompt(config: BenchmarkConfig) -> None:
    inside = _recorded_call(config.student).get("negative_prompt")
    if config.negative_prompt is not None and config.student and config.negative_prompt != (inside or ""):
        log.warning(
            "negative_prompt=%r is that of rows of two passes, and %s was distilled away from %r",
            config.negative_prompt,
            config.student,
            inside or "",
        )


def _of_one_size(config: BenchmarkConfig) -> BenchmarkConfig:
    """With the size that `num_frames`, `height` and `width` say, where any does, in place of `sizes`."""
    said = [getattr(config, key) for key in SIZE]
    if said == [None] * 3:
        return config
    size = [own if given is None else given for given, own in zip(said, config.videos[0], strict=True)]
    return replace(config, sizes=[size], **dict.fromkeys(SIZE))


Resolved = tuple[dict[str, MethodConfig], dict[str, str]]
"""Rows by name, and of those that cannot run why."""


def resolved(methods: Mapping[str, MethodConfig], models: Models) -> Resolved:
    """The rows, those `as_called` with steps, passes and guidance of their models; and why some cannot run."""

    def fitting(method: MethodConfig) -> MethodConfig:
        if (key := models.missing(method)) is not None:
            raise _Lacking(f"no {key}= is named")
        if (package := lacks(method.cache)) is not None:
            raise _Lacking(package)
        row = _as_called(method, models) if method.as_called else method
        row = row if row.full_share is None else _of_a_share(row, models.predictor_folder(row))
        if row.budget is not None:
            models.searched(row)
        if row.decoder is not None:
            models.check_decoder(row)
        return row

    return _sorted_out(methods, fitting)


class _Lacking(Exception):
    """Why a row cannot run, to which there is no hint."""


def _sorted_out(methods: Mapping[str, MethodConfig], fitting: Callable[[MethodConfig], MethodConfig]) -> Resolved:
    """Each row as `fitting` makes it, and why it could not; of rows that a share of few steps makes one, the first."""
    rows, lacking = {}, {}
    for name, method in methods.items():
        rows[name] = method
        try:
            row = fitting(method)
        except _Lacking as error:
            lacking[name] = str(error)
            continue
        except UserError as error:
            lacking[name] = f"{error.message} ({error.hint})" if method.as_called else error.message
            continue
        same = [other for other, made in rows.items() if made == row and other != name]
        if method.full_share is not None and same:
            lacking[name] = f"the same row as {same[0]}: {row.full_count()} of {row.steps} steps full"
        rows[name] = row
    return rows, lacking


def _in_steps(method: MethodConfig, steps: int, two_pass: bool) -> MethodConfig:
    """The row in other steps and passes; `UserError` where they leave nothing to what stands in."""
    if method.budget is not None and method.budget >= steps:
        raise UserError(f"all of its {steps} steps would be full", f"take a budget below {steps}")
    if method.full_share is not None and steps == 1:
        raise UserError("its one step would be full", "take a student of more steps")
    return replace(method, steps=steps, two_pass=two_pass)


def _of_a_share(method: MethodConfig, folder: Path) -> MethodConfig:
    """The row with a number of full steps that the predictor in `folder` has a schedule for, near its share of them."""
    searched = schedules_of(folder)
    known = sorted({each.budget for each in searched if each.steps == method.steps and each.budget < method.steps})
    if not known:
        raise UserError(
            f"{folder} has no schedules for {method.steps} steps",
            f"search some: vidaccel train-predictor -o {folder} stage=search steps={method.steps}",
        )
    share = method.full_share or 0.0
    return replace(method, full_share=None, budget=min(known, key=lambda budget: abs(budget - share * method.steps)))


def _as_called(method: MethodConfig, models: Models) -> MethodConfig:
    loaded, config = models.pipeline(method), models.config
    guidance, two_pass = guidance_in_force(loaded, None, None)
    row = _in_steps(method, loaded.default("steps"), two_pass)
    if method.weights == "teacher" and config.student is not None and guidance != 1:
        student = models.pipeline(MethodConfig())  # whose guidance was distilled at one scale, away from one prompt
        for key in student.call.keys() & {"negative_prompt"} - loaded.call.keys():
            loaded.call = loaded.call | {key: student.call[key]}
        if method.guidance is None and config.guidance is None:
            second = config.guidance_2 if method.guidance_2 is None else method.guidance_2
            second = second_guidance(student, None, second, None)
            return replace(row, guidance=student.default("guidance"), guidance_2=second)
    return row


def _is_cfg(model: str) -> bool:
    run = recorded(model)
    return run is not None and run["config"].get("method") == "cfg"


def _is_half(model: str) -> bool:
    """Whether it was made by distilling one of two transformers."""
    run = recorded(model)
    return run is not None and run["config"].get("denoiser") is not None


def _foreign(config: BenchmarkConfig, loaded: LoadedPipeline) -> list[str]:
    """Settings that name what a world ships whose words the model does not know."""
    named = {key: value for key in OF_A_WORLD if (value := getattr(config, key)) is not None}
    worlds = {key: value.split("/")[0] for key, value in named.items() if key == "scorer" or value in shipped_models()}
    strange = {name for name in set(worlds.values()) if not _is_of(loaded, name)}
    return [key for key, name in worlds.items() if name in strange]


def _is_of(loaded: LoadedPipeline, name: str) -> bool:
    size = {key: loaded.default(key) for key in SIZE}
    try:
        return world(name).clip_source(loaded, 1, 0, size, loaded.default("fps")) is not None
    except UserError:  # which is said of the size, to the world's own models alone
        return True


def planned(config: BenchmarkConfig) -> BenchmarkConfig:
    """For a plan, from what stands beside the weights: with the family of the model's transformer, and the size that it
    or the student is made for where none is said.

    Raises:
        UserError: the model's transformer is of no family that is known.
    """
    if config.model is None and config.student is not None:
        config = with_ancestors(config)
    planned_family(config)  # whose name is one, whatever the model's is
    if arguments := _transformer_arguments(config):
        config = replace(config, family=_family_of(str(arguments.get("_class_name")), config).name)
    if config.sizes is None:
        made_for, own = _recorded_call(config.student) or _recorded_call(config.model), planned_family(config).defaults
        config = replace(config, sizes=[[made_for.get(name, getattr(own, name)) for name in SIZE]])
    return _of_one_size(config)


def planned_rows(config: BenchmarkConfig) -> Resolved:
    """The wanted rows of settings that are `planned`, as `resolved` gives them."""
    family, arguments = planned_family(config), _transformer_arguments(config)
    embeds = bool(family.g_config and arguments.get(family.g_config))
    teacher, student = (_recorded_call(name) for name in (config.model, config.student))

    def fitting(method: MethodConfig) -> MethodConfig:
        if method.as_called and method.weights == "teacher" and config.model is not None:
            steps, two_pass = teacher.get("steps", family.defaults.steps), teacher.get("two_pass", not embeds)
            method = _in_steps(method, steps, two_pass)
        elif method.as_called and student:
            method = _in_steps(method, student.get("steps", method.steps), method.two_pass)
        method = _as_denoised(method, family)
        folder = method.predictor or config.predictor
        if method.full_share is None or folder is None or not _has_schedules(local_path(folder)):
            return method
        return _of_a_share(method, local_path(folder))

    return _sorted_out(config.wanted(), fitting)


def _as_denoised(method: MethodConfig, family: DiTFamily) -> MethodConfig:
    """The row with the first step of each further denoiser full, on the family's published grid unless it says one."""
    full, shift = method.schedule(), method.shift or family.defaults.shift
    if len(family.denoisers) == 1 or full is None or shift is None:
        return method
    grid = Grid.listed(method.timesteps, method.sigmas) or Grid.shifted(method.steps, shift)
    firsts = grid.firsts([each.until for each in family.denoisers[:-1]])
    return replace(method, every=None, full_steps=sorted({*full, *firsts}))


def _has_schedules(predictor: Path) -> bool:
    return predictor.is_file() or (predictor / SCHEDULE_FILE).is_file()


def _transformer_arguments(config: BenchmarkConfig) -> dict[str, Any]:
    """The config of the model's transformer, if a model is named."""
    return {} if config.model is None else read_json(local_path(config.model) / "transformer" / "config.json")


def _family_of(transformer: str, config: BenchmarkConfig) -> DiTFamily:
    """Of the families with that transformer the one of the folder's pipeline, which a student's folder may not name."""
    file = local_path(config.model or "") / "model_index.json"
    own = family_of_index(read_json(file)) if file.exists() else None
    for family in FAMILIES.values() if own is None else [own]:
        if family.transformer == transformer:
            if family.name != config.family:
                log.info("family=%s, which %s is of", family.name, config.model)
            return family
    known = ", ".join(family.transformer for family in FAMILIES.values())
    raise UserError(f"{config.model} has a {transformer}, which is of no family that is known", f"supported: {known}")


def _recorded_call(model: str | None) -> dict[str, Any]:
    run = None if model is None else recorded(model)
    return {} if run is None else run.get("call", {})
