"""A full-size transformer without trained weights, and how many tokens a video of a size is to it."""

import inspect
import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import diffusers
import torch
from diffusers.models.modeling_utils import no_init_weights
from torch import nn

from vidaccel.bench.generation import Size
from vidaccel.compat.diffusers import built_with
from vidaccel.config.benchmark import BenchmarkConfig
from vidaccel.errors import UserError, nearest
from vidaccel.families.base import DiTFamily
from vidaccel.families.registry import FAMILIES
from vidaccel.families.walk import patch_of
from vidaccel.models.calling import refuse_misfits
from vidaccel.models.files import local_path
from vidaccel.models.folder import read_json
from vidaccel.models.loading import DTYPES

DEPTHS = ("num_layers", "num_single_layers")
"""Arguments of the transformer classes that number the blocks of a list."""


def planned_family(config: BenchmarkConfig) -> DiTFamily:
    """The record of `config.family`; `UserError` for a name that has none."""
    if config.family not in FAMILIES:
        raise UserError(f"no model family is called {config.family}", nearest(config.family, FAMILIES))
    return FAMILIES[config.family]


def meta_transformer(config: BenchmarkConfig) -> nn.Module:
    """The configured transformer on the meta device, in the configured dtype; errors of `new_transformer`."""
    return new_transformer(config, "meta")


def new_transformer(config: BenchmarkConfig, device: torch.device | str, depth: int | None = None) -> nn.Module:
    """The configured transformer with random weights, in the configured dtype.

    Args:
        depth: blocks in each list, in place of its own number; one more in a trunk with others beside it, whose last
            block none of them is added after.

    Raises:
        UserError: the class does not take one of the arguments, or not such a value.
    """
    cls = getattr(diffusers, planned_family(config).transformer)
    arguments = _arguments(config.model, cls) if config.model else config.transformer
    known = inspect.signature(cls.__init__).parameters.keys() - {"self"}
    for name in arguments:
        if name not in known:
            raise UserError(f"transformer: {cls.__name__} takes no {name}", nearest(name, known))
    if depth is not None:
        sides = planned_family(config).side_lists
        arguments = arguments | {name: depth + bool(sides) for name in DEPTHS if name in known}
        for kind in sides:
            if (key := kind.added_after) is not None:
                places = arguments.get(key, inspect.signature(cls.__init__).parameters[key].default)
                arguments[key] = [place for place in places if place < depth]
    without_numbers = torch.device(device).type == "meta"
    try:
        with (
            torch.device(device),
            _default_dtype(DTYPES[config.dtype]),
            no_init_weights() if without_numbers else nullcontext(),  # there is nothing to draw
        ):
            return cls(**arguments).to(DTYPES[config.dtype]).eval()
    except (TypeError, ValueError, RuntimeError, ZeroDivisionError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"transformer: {cls.__name__} cannot be built: {reason}", "mend those values") from error


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Weights are made in this type at once: in float32 first, large ones would not fit."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def rows(config: BenchmarkConfig, model: nn.Module, size: Size) -> dict[str, int]:
    """Rows of each stream (families/costs.py) for one video of `size`.

    Raises:
        UserError: the model makes no video of this size (the hint names the nearest), or a text's length is not set.
    """
    family = planned_family(config)
    _check_texts(family, config.text_tokens)
    frame_step, pixel_step = config.compression
    patch = patch_of(model)
    size_steps = (
        frame_step * family.latent_frame_step,
        math.lcm(family.size_multiple, pixel_step * patch[1], pixel_step * patch[2]),
    )
    frames, height, width = size
    refuse_misfits(family.title, size_steps, num_frames=frames, height=height, width=width)
    latent = (frames - 1) // frame_step + 1, height // pixel_step, width // pixel_step
    times, *sides = (-(-extent // step) for extent, step in zip(latent, patch, strict=True))
    frame = math.prod(sides)
    video = times * frame
    apart = {condition.tokens for condition in family.conditions if condition.counted}
    texts = config.text_tokens
    text = sum(count for name, count in texts.items() if name not in apart)
    return {"one": 1, "frame": frame, "frames": times, "video": video, "text": text, "all": video + text, **texts}


def _check_texts(family: DiTFamily, given: dict[str, int]) -> None:
    streams = family.costs.texts
    if given.keys() != streams:
        raise UserError(
            f"text_tokens is for {', '.join(given) or 'nothing'}; {family.title} has {', '.join(sorted(streams))}",
            "give the length of each: text_tokens: {" + ", ".join(f"{name}: 256" for name in sorted(streams)) + "}",
        )


def _arguments(model: str, cls: type) -> dict[str, Any]:
    """What the transformer of a model folder was built with."""
    file = local_path(model) / "transformer" / "config.json"
    settings = read_json(file)
    if settings.get("_class_name") != cls.__name__:
        raise UserError(
            f"{file} is of a {settings.get('_class_name')}, where the family has {cls.__name__}", "set family=..."
        )
    return built_with(settings)
