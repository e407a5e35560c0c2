"""What every settings dataclass says of a value that it refuses."""

from typing import Any

from vidaccel.errors import UserError


def require(holds: bool, key: str, value: Any, rule: str) -> None:
    if not holds:
        raise UserError(f"{key}={value!r} is not possible", f"{key} {rule}")


PRECISIONS = ("float32", "bfloat16")
