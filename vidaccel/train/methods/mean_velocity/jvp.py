"""Du/Dt: how the mean velocity changes along the trajectory, (∂u/∂x) v + ∂u/∂t at fixed r (method.md, section 2).

Two ways, both without gradients, in a pass of their own, so that activation checkpointing never meets a tangent:

exact               forward-mode differentiation. PyTorch's flash attention has none, so attention goes through
                    `attention_jvp`: a kernel on a GPU, elsewhere the formula with all N x N scores in memory.
finite_difference   (u(x + h v, r, t + h) - u(x - h v, r, t - h)) / 2h. Any attention, any sharding. Transformers are
                    fed sinusoids of 1000 t, whose fast ripple the exact derivative sees and a wide step h smooths.

B batch, C channels, T frames, H and W latent pixels
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from vidaccel.errors import TrainingFailed
from vidaccel.kernels import select
from vidaccel.kernels.attention_jvp.op import AttentionTangents
from vidaccel.models.velocity import per_sample
from vidaccel.runtime.decode import free_bytes
from vidaccel.train.methods.mean_velocity.settings import MeanVelocityTraining

MeanVelocity = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(x [B, C, T, H, W], t [B], r [B]) -> u [B, C, T, H, W], with text and guidance already given."""


def exact(
    u: MeanVelocity, x: Tensor, t: Tensor, r: Tensor, v: Tensor, kernels: str = "auto", precision: str = "float32"
) -> Tensor:
    """Du/Dt [B, C, T, H, W] by forward-mode differentiation along (v, 0, 1); `precision` is that of attention alone."""
    attention = AttentionTangents(kernels, torch.bfloat16 if precision == "bfloat16" else None)
    with _float32(x), torch.no_grad(), forward_ad.dual_level(), attention:
        out = u(forward_ad.make_dual(x, v), forward_ad.make_dual(t, torch.ones_like(t)), r)
        tangent = forward_ad.unpack_dual(out).tangent
    return torch.zeros_like(x) if tangent is None else tangent


@torch.no_grad()
def finite_difference(
    u: MeanVelocity, x: Tensor, t: Tensor, r: Tensor, v: Tensor, step: float, span: tuple[float, float] = (0.0, 1.0)
) -> Tensor:
    """Du/Dt [B, C, T, H, W] by a difference over [t - step, t + step], cut to `span`, taken in float64."""
    after, before = (t + step).clamp(max=span[1]), (t - step).clamp(min=span[0])

    def at(time: Tensor) -> Tensor:
        return u(x + per_sample(time - t, x) * v, time, r).double()

    with _float32(x):
        return ((at(after) - at(before)) / per_sample(after - before, x).double()).to(x.dtype)


@dataclass(frozen=True)
class DerivativeCheck:
    """Both derivatives on one batch, in root mean squares over it."""

    velocity: float
    exact: float | None
    """None where it was not computed."""
    finite_difference: float
    cosine: float | None

    def __str__(self) -> str:
        line = f"|v| {self.velocity:.3g}; |Du/Dt| by finite difference {self.finite_difference:.3g}"
        if self.exact is None:
            return line
        return f"{line}, exact {self.exact:.3g}; cosine of the two {self.cosine:.3f}"


def check_derivatives(
    u: MeanVelocity,
    x: Tensor,
    t: Tensor,
    r: Tensor,
    v: Tensor,
    config: MeanVelocityTraining,
    with_exact: bool,
    span: tuple[float, float] = (0.0, 1.0),
) -> DerivativeCheck:
    """What a training on Du/Dt is about to see.

    Raises:
        TrainingFailed: a derivative is zero or not finite, so that there is nothing to train on.
    """
    difference = finite_difference(u, x, t, r, v, config.difference_step, span)
    tangent = exact(u, x, t, r, v, config.kernels, config.attention_precision) if with_exact else None
    for name, derivative in (("finite difference", difference), ("exact", tangent)):
        if derivative is not None and not 0 < _rms(derivative) < torch.inf:
            raise TrainingFailed(f"the derivative by {name} is {_rms(derivative)}: there is nothing to train on")
    if tangent is None:
        return DerivativeCheck(_rms(v), None, _rms(difference), None)
    cosine = F.cosine_similarity(tangent.flatten().double(), difference.flatten().double(), dim=0)
    return DerivativeCheck(_rms(v), _rms(tangent), _rms(difference), float(cosine))


def missing_memory(u: MeanVelocity, x: Tensor, t: Tensor, r: Tensor, kernels: str) -> tuple[int, int] | None:
    """(needed, free) bytes where the exact derivative would hold more attention scores than there is memory for.

    Without the kernel, scores, their tangent and two temporaries of the largest attention are float32 and whole.
    """
    if select.choose(kernels, x.device) != "reference":
        return None
    with torch.no_grad(), _LargestAttention() as attention:
        u(x, t, r)
    needed = 4 * 4 * attention.scores
    free = free_bytes(x.device)
    return (needed, free) if needed > free else None


class _LargestAttention(TorchFunctionMode):
    """Notes the most scores that one attention call of a pass has: batch x heads x queries x keys."""

    scores = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is F.scaled_dot_product_attention:
            query, key = (args + tuple((kwargs or {}).values()))[:2]
            self.scores = max(self.scores, math.prod(query.shape[:-1]) * key.shape[-2])
        return func(*args, **(kwargs or {}))


def _float32(x: Tensor) -> torch.autocast:
    """No autocast: in bfloat16 a whole model's derivative is more than a tenth off."""
    return torch.autocast(x.device.type, enabled=False)


def _rms(tensor: Tensor) -> float:
    return float(tensor.double().square().mean().sqrt())
