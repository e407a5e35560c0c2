"""The target `rollout`: (x_t - x_r) / (t - r), where x_r is where the frozen teacher leads from x_t by midpoint steps.

At r = t it is the teacher's velocity.

B batch, C channels, T frames, H and W latent pixels
"""

from collections.abc import Callable

import torch
from torch import Tensor

from vidaccel.models.velocity import per_sample
from vidaccel.train.methods.mean_velocity.settings import MeanVelocityTraining
from vidaccel.train.methods.mean_velocity.target import Interval, Target
from vidaccel.train.passes import Passes

Instantaneous = Callable[[Tensor, Tensor], Tensor]
"""The frozen teacher: (x [B, C, T, H, W], t [B]) -> v [B, C, T, H, W]."""


@torch.no_grad()
def rollout_target(teacher: Instantaneous, x: Tensor, t: Tensor, r: Tensor, substeps: int) -> Tensor:
    """Mean velocity [B, C, T, H, W] of the teacher's own trajectory from t down to r, in `substeps` midpoint steps."""
    length = (t - r) / substeps
    at, time, passed = x, t, torch.zeros_like(x)
    for _ in range(substeps):
        half = at - per_sample(length / 2, x) * teacher(at, time)
        v = teacher(half, time - length / 2)
        at, time, passed = at - per_sample(length, x) * v, time - length, passed + v
    return passed / substeps


def _target(at: Interval, settings: MeanVelocityTraining) -> Tensor:
    return rollout_target(lambda x, t: at.teacher(x, t, t), at.x, at.t, at.r, settings.substeps)


TARGET = Target(_target, passes=lambda settings: Passes(teacher=2 * settings.substeps))
