"""A benchmark's settings made to fit the model that they name: what is its own is read from it, and what belongs to
another world is left out. Whatever changes is said.
"""

import logging
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from vidaccel.bench.baselines.registry import lacks
from vidaccel.bench.models import Models
from vidaccel.bench.sizes import planned_family
from vidaccel.config.benchmark import BenchmarkConfig, MethodConfig
from vidaccel.errors import UserError
from vidaccel.families.base import DiTFamily
from vidaccel.families.registry import FAMILIES
from vidaccel.models.calling import guidance_in_force
from vidaccel.models.folder import read_json
from vidaccel.models.lineage import recorded, teachers
from vidaccel.models.loading import LoadedPipeline, local_path
from vidaccel.worlds import WORLDS, shipped_models, world

log = logging.getLogger(__name__)

OF_A_WORLD = ("student", "distilled", "predictor", "scorer")
"""Settings that may name what a world ships."""
SIZE = ("num_frames", "height", "width")


def with_ancestors(config: BenchmarkConfig) -> BenchmarkConfig:
    """With the model that the student was distilled from, by way of which other, where it is not named.

    Raises:
        UserError: neither is named, or what the student came from is not to be found.
    """
    if config.model is not None:
        return config
    if config.student is None:
        raise UserError(
            "no model is named", "set model=FOLDER (or student=FOLDER), or time random weights: --random-weights"
        )
    found = teachers(config.student, "name it: model=FOLDER")
    if not found:
        raise UserError(f"{config.student} is no student", "name it as model=, or set model=FOLDER beside it")
    changes = {"model": found[-1]}
    if config.distilled is None and len(found) > 1 and _is_cfg(found[-2]):
        changes["distilled"] = found[-2]
    said = " ".join(f"{key}={value}" for key, value in changes.items())
    log.info("%s, which %s was distilled from", said, config.student)
    return replace(config, **changes)


def fitted(config: BenchmarkConfig, models: Models) -> BenchmarkConfig:
    """With the family of the model, the size that it or the student is made for where none is said, and as many scored
    prompts as there are; without the shipped student, predictor and scorer where the model is not of their world."""
    assert config.model is not None
    planned_family(config)  # whose name is one, whatever the model's is
    loaded = models.pipeline(MethodConfig(model=config.model))
    if loaded.family.name != config.family:
        log.info("family=%s, which %s is of", loaded.family.name, config.model)
        config = replace(config, family=loaded.family.name)
    if dropped := _foreign(config, loaded):
        log.info("%s is no model of %s: without %s", config.model, " or ".join(WORLDS), ", ".join(dropped))
        config = replace(config, **dict.fromkeys(dropped))
    models.config = config
    if config.sizes is None:
        made_for = loaded if config.student is None else models.pipeline(MethodConfig())
        config = replace(config, sizes=[[made_for.default(name) for name in SIZE]])
    if config.prompts:
        config = replace(config, scored_prompts=min(config.scored_prompts, len(config.prompts)))
    models.config = config
    return config


def resolved(methods: Mapping[str, MethodConfig], models: Models) -> tuple[dict[str, MethodConfig], dict[str, str]]:
    """The rows, those `as_called` with steps, passes and guidance of their models; and why some cannot run."""
    rows, lacking = {}, {}
    for name, method in methods.items():
        rows[name] = method
        if (key := models.missing(method)) is not None:
            lacking[name] = f"no {key}= is named"
        elif (package := lacks(method.cache)) is not None:
            lacking[name] = package
        else:
            try:
                rows[name] = _as_called(method, models) if method.as_called else method
                if method.budget is not None:
                    models.searched(rows[name])
            except UserError as error:
                lacking[name] = f"{error.message} ({error.hint})" if method.as_called else error.message
    return rows, lacking


def _as_called(method: MethodConfig, models: Models) -> MethodConfig:
    loaded, config = models.pipeline(method), models.config
    guidance, two_pass = guidance_in_force(loaded, None, None)
    steps = loaded.default("steps")
    if method.budget is not None and method.budget >= steps:
        raise UserError(f"all of its {steps} steps would be full", f"take a budget below {steps}")
    row = replace(method, steps=steps, two_pass=two_pass)
    if method.weights == "teacher" and config.student is not None and guidance != 1:
        student = models.pipeline(MethodConfig())  # whose guidance was distilled at one scale, away from one prompt
        for key in student.call.keys() & {"negative_prompt"} - loaded.call.keys():
            loaded.call = loaded.call | {key: student.call[key]}
        if method.guidance is None and config.guidance is None:
            row = replace(row, guidance=student.default("guidance"))
    return row


def _is_cfg(model: str) -> bool:
    run = recorded(model)
    return run is not None and run["config"].get("method") == "cfg"


def _foreign(config: BenchmarkConfig, loaded: LoadedPipeline) -> list[str]:
    """Settings that name what a world ships whose words the model does not know."""
    named = {key: value for key in OF_A_WORLD if (value := getattr(config, key)) is not None}
    worlds = {key: value.split("/")[0] for key, value in named.items() if value in (*shipped_models(), *WORLDS)}
    strange = {name for name in set(worlds.values()) if not _is_of(loaded, name)}
    return [key for key, name in worlds.items() if name in strange]


def _is_of(loaded: LoadedPipeline, name: str) -> bool:
    size = {key: loaded.default(key) for key in SIZE}
    try:
        return world(name).clip_source(loaded, 1, 0, size, loaded.default("fps")) is not None
    except UserError:  # which is said of the size, to the world's own models alone
        return True


def planned(config: BenchmarkConfig) -> BenchmarkConfig:
    """For a plan, from what stands beside the weights: with the family of the model's transformer, the size that it or
    the student is made for where none is said, and the rows `as_called` so.

    Raises:
        UserError: the model's transformer is of no family that is known.
    """
    if config.model is None and config.student is not None:
        config = with_ancestors(config)
    planned_family(config)  # whose name is one, whatever the model's is
    arguments = {} if config.model is None else read_json(local_path(config.model) / "transformer" / "config.json")
    if arguments:
        config = replace(config, family=_family_of(str(arguments.get("_class_name")), config).name)
    family = planned_family(config)
    embeds = bool(family.g_config and arguments.get(family.g_config))
    teacher, student = (_recorded_call(name) for name in (config.model, config.student))
    if config.sizes is None:
        made_for = student or teacher
        config = replace(config, sizes=[[made_for.get(name, getattr(family.defaults, name)) for name in SIZE]])
    methods = dict(config.methods)
    for name, method in methods.items():
        if method.as_called and method.weights == "teacher" and config.model is not None:
            two_pass = teacher.get("two_pass", not embeds)
            methods[name] = replace(method, steps=teacher.get("steps", family.defaults.steps), two_pass=two_pass)
        elif method.as_called and student:
            methods[name] = replace(method, steps=student.get("steps", method.steps))
    return replace(config, methods=methods)


def _family_of(transformer: str, config: BenchmarkConfig) -> DiTFamily:
    for family in FAMILIES.values():
        if family.transformer == transformer:
            if family.name != config.family:
                log.info("family=%s, which %s is of", family.name, config.model)
            return family
    known = ", ".join(family.transformer for family in FAMILIES.values())
    raise UserError(f"{config.model} has a {transformer}, which is of no family that is known", f"supported: {known}")


def _recorded_call(model: str | None) -> dict[str, Any]:
    run = None if model is None else recorded(model)
    return {} if run is None else run.get("call", {})
