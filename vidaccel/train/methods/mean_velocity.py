"""Mean velocity over short intervals (Restricted MeanFlow; method.md, section 2).

A target says what u(x_t, r, t) should be, for t - r of at most the restrict factor R:

derivative   v - (t - r) Du/Dt, the MeanFlow identity, with Du/Dt of the student itself
rollout      (x_t - x_r) / (t - r), where x_r is the frozen teacher integrated from t to r by midpoint steps; v at r = t

B batch, C channels, T frames, H and W latent pixels
"""

from collections.abc import Callable

import torch
from torch import Tensor

from vidaccel.config.distill import MeanVelocityTraining
from vidaccel.models.grid import step_grid
from vidaccel.train.methods import jvp
from vidaccel.train.methods.jvp import MeanVelocity

Instantaneous = Callable[[Tensor, Tensor], Tensor]
"""The frozen teacher: (x [B, C, T, H, W], t [B]) -> v [B, C, T, H, W]."""


def widest_interval(steps: int, shift: float) -> float:
    """The largest t - r of the step grid that a student is sampled on."""
    return float(-step_grid(steps, shift).diff().min())


def restrict_at(config: MeanVelocityTraining, widest: float, progress: float) -> float:
    """R at a share `progress` in [0, 1] of the training; `widest` is the step grid's widest interval."""
    first = widest if config.restrict is None else config.restrict
    last = first if config.restrict_end is None else config.restrict_end
    return first + (last - first) * progress


def sample_interval_ends(t: Tensor, restrict: float, r_equals_t_share: float, generator: torch.Generator) -> Tensor:
    """r [B] for t [B]: max(0, t - T) with T ~ U(0, R), and t itself for a share of the samples."""
    r = (t - restrict * torch.rand(len(t), generator=generator)).clamp(min=0.0)
    return torch.where(torch.rand(len(t), generator=generator) < r_equals_t_share, t, r)


@torch.no_grad()
def rollout_target(teacher: Instantaneous, x: Tensor, t: Tensor, r: Tensor, substeps: int) -> Tensor:
    """Mean velocity [B, C, T, H, W] of the teacher's own trajectory from t down to r, in `substeps` midpoint steps."""
    length = (t - r) / substeps
    at, time, passed = x, t, torch.zeros_like(x)
    for _ in range(substeps):
        half = at - _per_sample(length / 2) * teacher(at, time)
        v = teacher(half, time - length / 2)
        at, time, passed = at - _per_sample(length) * v, time - length, passed + v
    return passed / substeps


def derivative_target(
    u: MeanVelocity, v: Tensor, x: Tensor, t: Tensor, r: Tensor, config: MeanVelocityTraining, warmup: float
) -> Tensor:
    """v - (t - r) Du/Dt, with the derivative clipped and multiplied by `warmup` in [0, 1] as configured."""
    if config.derivative == "exact":
        derivative = jvp.exact(u, x, t, r, v, config.kernels, config.attention_precision)
    else:
        derivative = jvp.finite_difference(u, x, t, r, v, config.difference_step)
    if config.tangent_clip is not None:
        size = derivative.square().mean(dim=(1, 2, 3, 4), keepdim=True).sqrt()
        derivative = derivative / (size + config.tangent_clip)
    return v - _per_sample(t - r) * warmup * derivative


def weighted_error(predicted: Tensor, target: Tensor, power: float, constant: float) -> tuple[Tensor, Tensor]:
    """Loss, and how many samples were left out because their target is not finite.

    The mean squared error of each sample, over its squared error plus `constant` to the `power` (MeanFlow's adaptive
    weight, arXiv 2505.13447); power 0 is the plain mean squared error. NaN if no target is finite.
    """
    finite = target.isfinite().flatten(1).all(dim=1)
    error = (predicted.float() - torch.where(_per_sample(finite), target, predicted.detach()).float()).square()
    error = error.mean(dim=(1, 2, 3, 4))
    weight = (error.detach() + constant) ** -power
    return (weight * error * finite).sum() / finite.sum(), (~finite).sum()


def _per_sample(number: Tensor) -> Tensor:
    return number.view(-1, 1, 1, 1, 1)
