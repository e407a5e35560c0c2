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


PRECISIONS = ("float32", "bfloat16")
CLIP_SIZE = ("num_frames", "height", "width", "fps")
"""Settings of the size and rate that clips are brought to."""
