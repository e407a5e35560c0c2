"""What a target of a mean velocity is given, and what one is.

B batch, C channels, T frames, H and W latent pixels
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from vidaccel.train.methods.mean_velocity.jvp import MeanVelocity
from vidaccel.train.methods.mean_velocity.settings import MeanVelocityTraining
from vidaccel.train.passes import Passes


class Interval(NamedTuple):
    """Where u(x, r, t) is to be learnt in one forward pass."""

    x: Tensor
    """x_t, [B, C, T, H, W]."""
    t: Tensor
    """[B]."""
    r: Tensor
    """[B], at most t."""
    v: Tensor
    """eps - x_0 of the data, [B, C, T, H, W]."""
    teacher: MeanVelocity
    """Frozen, with this pass's text and guidance."""
    student: MeanVelocity
    """The one that is trained, likewise."""
    step: Tensor
    """Optimiser steps made, []; with accumulation, parts of one count."""
    span: tuple[float, float] = (0.0, 1.0)
    """Times that the transformer takes, where others take the rest."""


@dataclass(frozen=True)
class Target:
    """What u(x, r, t) is trained towards, as the line of it in `TARGETS` names it."""

    mean_velocity: Callable[[Interval, MeanVelocityTraining], Tensor]
    """[B, C, T, H, W], without gradients; samples that are not finite are left out of the loss."""
    preflight: Callable[[Interval, MeanVelocityTraining], None] | None = None
    """Called before the training on the first batch, over the widest intervals."""
    passes: Callable[[MeanVelocityTraining], Passes] = lambda settings: Passes()
    """Those that it takes of a sample."""
