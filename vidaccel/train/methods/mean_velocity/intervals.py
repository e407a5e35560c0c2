"""Over which intervals a mean velocity is learnt: t - r of at most the restrict factor R (method.md, section 2)."""

import torch
from torch import Tensor

from vidaccel.models.grid import Grid
from vidaccel.train.methods.mean_velocity.settings import MeanVelocityTraining


def widest_interval(steps: int, shift: float) -> float:
    """The largest t - r of the step grid that a student is sampled on."""
    return Grid.shifted(steps, shift).widest


def restrict_at(config: MeanVelocityTraining, widest: float, progress: float) -> float:
    """R at a share `progress` in [0, 1] of the training; `widest` is the step grid's widest interval."""
    first = widest if config.restrict is None else config.restrict
    last = first if config.restrict_end is None else config.restrict_end
    return first + (last - first) * progress


def sample_interval_ends(t: Tensor, restrict: float, r_equals_t_share: float, generator: torch.Generator) -> Tensor:
    """r [B] for t [B]: max(0, t - T) with T ~ U(0, R), and t itself for a share of the samples."""
    given = {"generator": generator, "device": generator.device}
    r = (t - restrict * torch.rand(len(t), **given)).clamp(min=0.0)
    return torch.where(torch.rand(len(t), **given) < r_equals_t_share, t, r)
