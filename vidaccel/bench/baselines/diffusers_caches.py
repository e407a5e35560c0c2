"""diffusers' own training-free caches, switched on for a row.

Which of them can do what is found out by trying, and what it raises stands in the row. Three things that no exception
would tell are checked here: PAB and FasterCache keep one state for both passes of guidance, a cache that hooks nothing
computes everything, and SeaCache does so too where it lacks something ("fail-open"), which it only logs. Where sampling
is and what the latents are, which HunyuanVideo's pipelines do not tell it, it is told here.
"""

import dataclasses
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from diffusers import DiffusionPipeline, MagCacheConfig
from diffusers.hooks import sea_cache
from torch import nn

from vidaccel.bench.baselines.parts import Unsupported
from vidaccel.compat.diffusers import hook_registry, hook_states
from vidaccel.config.benchmark import MethodConfig
from vidaccel.families.base import DiTFamily
from vidaccel.families.walk import blocks_of, denoisers_of
from vidaccel.models.grid import step_of
from vidaccel.models.loading import LoadedPipeline

ONE_AT_A_TIME = ("first_block", "seacache")
"""Caches that decide by what they see: videos of one batch would share their decisions."""
ONE_STATE = ("pab", "fastercache")
"""Caches that do not keep the passes of guidance apart."""


def calibrated(loaded: LoadedPipeline, method: MethodConfig, generate: Callable[[], None]) -> dict[str, Any]:
    """The row's settings with those that are the model's own; `generate` makes a video to find them on."""
    if method.cache != "magcache" or "mag_ratios" in method.settings or len(loaded.family.denoisers) > 1:
        return method.settings
    return method.settings | {"mag_ratios": _magnitudes(loaded, method.steps, generate)}


def _magnitudes(loaded: LoadedPipeline, steps: int, generate: Callable[[], None]) -> list[float]:
    """MagCache's ratios, step by step, from its own calibration, of the pass with the prompt.

    It prints and forgets them with the last step, so it is told of one more and asked at the end of each pass.
    """
    (transformer,) = denoisers_of(loaded.pipe, loaded.family)
    ratios: list[float] = []

    def ask(module: nn.Module, inputs: tuple, output: Any) -> None:
        head = hook_registry(blocks_of(module, loaded.family)[0][1]).get_hook("mag_cache_leader_block_hook")
        state = next(iter(hook_states(head.state_manager).values()))
        ratios[:] = state.calibration_ratios

    asking = MagCacheConfig(calibrate=True, num_inference_steps=steps + 1)
    with _enabled(transformer, asking):
        handle = transformer.register_forward_hook(ask)
        try:
            generate()
        finally:
            handle.remove()
    return ratios


@contextmanager
def enabled(cls: type, loaded: LoadedPipeline, method: MethodConfig, settings: Mapping[str, Any]) -> Iterator[None]:
    """The row's cache, configured by `cls`, for the time of a `with` block; errors of `registry.switched_on`."""
    if method.two_pass and method.cache in ONE_STATE:
        raise Unsupported(f"{cls.__name__} keeps one state for both passes of guidance")
    transformer, *others = denoisers_of(loaded.pipe, loaded.family)
    if others:
        raise Unsupported(f"{cls.__name__} is set on one transformer, and {loaded.family.title} has more")
    before = _hook_count(transformer)
    with (
        _enabled(transformer, _config(cls, loaded, method, dict(settings))),
        _told_of_steps(loaded.pipe, transformer),
        _complaints(sea_cache.logger) as complaints,
    ):
        if _hook_count(transformer) == before:
            raise Unsupported(f"{cls.__name__} finds nothing in a {type(transformer).__name__}")
        yield
        if complaints:
            raise Unsupported(complaints[0])


def _config(cls: type, loaded: LoadedPipeline, method: MethodConfig, settings: dict[str, Any]) -> Any:
    """diffusers' configuration, with what follows from the model and the row."""
    known = {field.name for field in dataclasses.fields(cls)}
    derived = {
        "current_timestep_callback": _current_timestep(loaded.pipe),
        "is_guidance_distilled": not method.two_pass,
        "num_inference_steps": method.steps,
        "raw_vision_callback": lambda module, args, kwargs: list(kwargs["hidden_states"].unbind(0)),
        "taylor_factors_dtype": denoisers_of(loaded.pipe, loaded.family)[0].dtype,
    }
    if method.cache == "taylorseer" and "cache_identifiers" not in settings:
        settings |= branch_identifiers(loaded.family)
    return cls(**{key: value for key, value in derived.items() if key in known} | settings)


def branch_identifiers(family: DiTFamily) -> dict[str, list[str]]:
    """TaylorSeer on every residual branch of every block, as published; diffusers' default is attention alone."""
    lists = family.block_lists
    return {
        "cache_identifiers": [rf"{kind.name}\.\d+\.({'|'.join(kind.branches)})" for kind in lists],
        "skip_predict_identifiers": [
            rf"{kind.name}\.\d+\.({'|'.join(kind.feeding)})" for kind in lists if kind.feeding
        ],
    }


def _current_timestep(pipe: DiffusionPipeline) -> Callable[[], float]:
    """Read from the device once a step: these caches ask in every attention of every block."""
    last: tuple[Any, float] = (None, 0.0)

    def read() -> float:
        nonlocal last
        if pipe.current_timestep is not last[0]:
            last = pipe.current_timestep, float(pipe.current_timestep)
        return last[1]

    return read


@contextmanager
def _enabled(transformer: nn.Module, config: Any) -> Iterator[None]:
    transformer.enable_cache(config)
    try:
        yield
    finally:
        transformer.disable_cache()


@contextmanager
def _told_of_steps(pipe: DiffusionPipeline, transformer: nn.Module) -> Iterator[None]:
    """Contexts say where sampling is, whether the pipeline that opens them does so or not."""
    open_context = transformer.cache_context

    def told(name: str, **known: Any) -> AbstractContextManager[None]:
        step = step_of(pipe)
        where = {"step_index": step.index, "sigma": step.t, "num_inference_steps": step.count}
        return open_context(name, **where | known)

    transformer.cache_context = told
    try:
        yield
    finally:
        del transformer.cache_context


def _hook_count(transformer: nn.Module) -> int:
    return sum(len(registry.hooks) for m in transformer.modules() if (registry := hook_registry(m)))


@contextmanager
def _complaints(logger: logging.Logger) -> Iterator[list[str]]:
    """Warnings of a logger of diffusers, which are then not shown."""
    said: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: said.append(record.getMessage())
    level, passes_on = logger.level, logger.propagate
    logger.setLevel(logging.WARNING)
    logger.propagate = False
    logger.addHandler(handler)
    try:
        yield said
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
        logger.propagate = passes_on
