"""What every settings dataclass says of a value that it refuses."""

import math
from typing import Any

from vidaccel.errors import UserError


def require(holds: bool, key: str, value: Any, rule: str) -> None:
    if not holds:
        raise UserError(f"{key}={value!r} is not possible", f"{key} {rule}")


def require_clip_size(config: Any) -> None:
    """Of settings with `features` in place of clips: what only clips have is not set beside them."""
    given = {key: value for key in CLIP_SIZE if (value := getattr(config, key)) is not None}
    for key, value in given.items():
        require(0 < value < math.inf, key, value, "must be above 0 and finite")
        require(config.features is None, key, value, "goes without features, which have a size and a rate of their own")


def require_scales(config: Any) -> None:
    """Of settings with scales of guidance."""
    for key in ("guidance", "guidance_2"):
        g = getattr(config, key)
        require(g is None or 1 <= g < math.inf, key, g, "is a number from 1 up, or null")


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
CLIP_SIZE = ("num_frames", "height", "width", "fps")
"""Settings of the size and rate that clips are brought to."""
