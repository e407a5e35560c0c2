"""The target `derivative`: v - (t - r) Du/Dt, the MeanFlow identity, with Du/Dt of the student itself (jvp.py).

B batch, C channels, T frames, H and W latent pixels
"""

import logging

import torch
from torch import Tensor

from vidaccel.errors import UserError
from vidaccel.models.velocity import per_sample
from vidaccel.processes import world
from vidaccel.train.methods.mean_velocity import jvp
from vidaccel.train.methods.mean_velocity.jvp import MeanVelocity
from vidaccel.train.methods.mean_velocity.settings import MeanVelocityTraining
from vidaccel.train.methods.mean_velocity.target import Interval, Target
from vidaccel.train.passes import Passes

log = logging.getLogger(__name__)


def derivative_target(
    u: MeanVelocity,
    v: Tensor,
    x: Tensor,
    t: Tensor,
    r: Tensor,
    config: MeanVelocityTraining,
    warmup: float | Tensor,
    span: tuple[float, float] = (0.0, 1.0),
) -> Tensor:
    """v - (t - r) Du/Dt, with the derivative clipped and multiplied by `warmup` in [0, 1] as configured."""
    if config.derivative == "exact":
        derivative = jvp.exact(u, x, t, r, v, config.kernels, config.attention_precision)
    else:
        derivative = jvp.finite_difference(u, x, t, r, v, config.difference_step, span)
    if config.tangent_clip is not None:
        size = derivative.square().mean(dim=(1, 2, 3, 4), keepdim=True).sqrt()
        derivative = derivative / (size + config.tangent_clip)
    return v - per_sample(t - r, x) * warmup * derivative


def _target(at: Interval, settings: MeanVelocityTraining) -> Tensor:
    warmup = (at.step / settings.tangent_warmup).clamp(max=1.0) if settings.tangent_warmup else 1.0
    return derivative_target(at.student, _followed(at, settings), at.x, at.t, at.r, settings, warmup, at.span)


def _preflight(at: Interval, settings: MeanVelocityTraining) -> None:
    """Says how large the derivative is, both ways where they can be computed; `UserError` if memory is too small."""
    missing = jvp.missing_memory(at.student, at.x, at.t, at.r, settings.kernels)
    if missing and settings.derivative == "exact":
        needed, free = (count / 2**30 for count in missing)
        raise UserError(
            f"the exact derivative would need {needed:.1f} GiB for attention, and {free:.1f} GiB are free",
            "set mean_velocity.derivative=finite_difference, or run on a GPU with mean_velocity.kernels=fused",
        )
    with torch.no_grad():
        v = _followed(at, settings)
    with_exact = not missing and (world() == 1 or settings.derivative == "exact")
    check = jvp.check_derivatives(at.student, at.x, at.t, at.r, v, settings, with_exact, at.span)
    log.info("before training: %s", check)


def _followed(at: Interval, settings: MeanVelocityTraining) -> Tensor:
    """The velocity of the trajectory along which u is differentiated."""
    return at.teacher(at.x, at.t, at.t).detach().to(at.x) if settings.velocity == "teacher" else at.v


def _passes(settings: MeanVelocityTraining) -> Passes:
    followed = int(settings.velocity == "teacher")
    if settings.derivative == "finite_difference":
        return Passes(teacher=followed, in_float32=2)
    return Passes(teacher=followed, tangents=1)


TARGET = Target(_target, _preflight, _passes)
