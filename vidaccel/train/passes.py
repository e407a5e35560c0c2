"""Forward passes that parts of a training take, as numbers: a plan of what it costs multiplies them."""

from typing import NamedTuple


class Passes(NamedTuple):
    """Forward passes without gradients of each sample, of which a target or a gate is made."""

    teacher: int = 0
    student: int = 0
    in_float32: int = 0
    """Of the student, whatever the training's precision is."""
    tangents: int = 0
    """Of the student with its derivative along one direction, in float32."""
