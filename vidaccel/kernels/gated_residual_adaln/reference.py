"""Gated residual and adaLN in plain torch: the definition that the fused kernel is tested against."""

from torch import Tensor

from vidaccel.kernels.adaln.reference import adaln


def gated_residual_adaln(
    x: Tensor, y: Tensor, gate: Tensor, scale: Tensor, shift: Tensor, eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """h = x + gate y, and adaLN of h; x, y [B, N, D], the others [B, D]. h is rounded to x's type before its norm."""
    h = (x + gate[:, None] * y).to(x.dtype)
    return h, adaln(h, scale, shift, eps)
