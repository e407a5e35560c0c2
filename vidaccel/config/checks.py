"""What every settings dataclass says of a value that it refuses."""

import math
import os
from collections.abc import Iterator
from dataclasses import MISSING, Field, fields, is_dataclass
from typing import Any

from vidaccel.errors import UserError


def require(holds: bool, key: str, value: Any, rule: str) -> None:
    if not holds:
        raise UserError(f"{key}={value!r} is not possible", f"{key} {rule}")


def expand_paths(config: Any) -> None:
    """`~` and `~user` in settings that name a file or a folder: a shell leaves it as it is behind an equals sign."""
    for each in fields(config):
        value = getattr(config, each.name)
        if each.name in PATHS and isinstance(value, str) and value.startswith("~"):
            setattr(config, each.name, os.path.expanduser(value))


def changed(config: Any) -> Iterator[tuple[str, Any]]:
    """Settings that have another value than where nobody says one, those of a group as "train.steps"."""
    for each in fields(config):
        yield from _changed(each.name, getattr(config, each.name), default(each))


def _changed(name: str, value: Any, usual: Any) -> Iterator[tuple[str, Any]]:
    if value == usual:
        return
    if not is_dataclass(value):
        yield name, value
        return
    for each in fields(value):
        yield from _changed(f"{name}.{each.name}", getattr(value, each.name), getattr(usual, each.name))


def default(field: Field) -> Any:
    """Of a setting, made anew."""
    return field.default if field.default_factory is MISSING else field.default_factory()


def require_clip_size(config: Any) -> None:
    """Of settings with `features` in place of clips: what only clips have is not set beside them."""
    given = {key: value for key in CLIP_SIZE if (value := getattr(config, key)) is not None}
    for key, value in given.items():
        require(0 < value < math.inf, key, value, "must be above 0 and finite")
        require(config.features is None, key, value, "goes without features, which have a size and a rate of their own")


def require_sizes(config: Any, fits: bool, rule: str) -> None:
    """Of settings with several `sizes` in place of one: `fits` says whether the others go with them, by this rule."""
    sizes = config.sizes
    if sizes is None:
        return
    alone = all(getattr(config, key) is None for key in SIZE)
    require(alone and fits, "sizes", sizes, f"goes with {rule}, without num_frames, height and width")
    each = bool(sizes) and all(len(size) == 3 and min(size) >= 1 for size in sizes)
    require(each, "sizes", sizes, "is a list of [frames, height, width]: sizes=[[81,480,832],[49,832,480]]")


def require_scales(config: Any) -> None:
    """Of settings with scales of guidance."""
    for key in ("guidance", "guidance_2"):
        g = getattr(config, key)
        require(g is None or 1 <= g < math.inf, key, g, "is a number from 1 up, or null")


def require_seed(config: Any, key: str = "seed") -> None:
    """Of what generators, and orders of samples, are seeded by."""
    seed = getattr(config, key)
    require(0 <= seed < 2**63, key, seed, "must be in 0 .. 2^63 - 1")


def settle_times(config: Any, unless: int | None = None) -> None:
    """Of settings with `timesteps` and `sigmas`, a grid's times in place of `steps` and `shift`: they fall, and `steps`
    becomes their number; it may not be another, `unless` it is this one."""
    given = [key for key in ("timesteps", "sigmas") if getattr(config, key) is not None]
    if not given:
        return
    (key, *others), most = given, {"timesteps": 1000, "sigmas": 1}
    times = getattr(config, key)
    require(not others, key, times, "goes without sigmas: either says the grid")
    require(config.shift is None, "shift", config.shift, f"goes without {key}, which are taken as they are")
    falls = bool(times) and all(later < time for time, later in zip(times, times[1:], strict=False))
    inside = falls and times[-1] >= 0 and 0 < times[0] <= most[key]
    require(inside, key, times, f"falls, from {most[key]} or less, to above 0 or to 0")
    steps = len(times) - (times[-1] == 0)
    require(config.steps in (unless, steps), "steps", config.steps, f"is {steps} or left out: {key} says it")
    config.steps = steps


PRECISIONS = ("float32", "bfloat16")
PATHS = (
    *("model", "student", "teacher", "distilled", "start", "compare_to", "size_of"),
    *("predictor", "schedule", "decoder", "features", "data", "prompts", "images", "vbench"),
)
"""Settings that are, or may be, the path of a file or folder, whichever command has them; a LoRA's has a scale
behind it (models/adapters.py)."""
DTYPES = ("float32", "bfloat16", "float16")
SIZE = ("num_frames", "height", "width")
"""Of a video: settings, in the order of `sizes`."""
CLIP_SIZE = (*SIZE, "fps")
"""Settings of the size and rate that clips are brought to."""
