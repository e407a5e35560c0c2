"""x + gate y and the adaLN that follows it, as one op that returns both: one pass over memory instead of six.

Where a gradient is asked for, the plain PyTorch of reference.py runs, forward and backward, under kernels=fused too: a
backward kernel was slower than `torch.compile`. Forward-mode derivatives are with respect to all five tensors, and
have no gradient.
`gated_residual_adaln_rows` gives the second in float8, without derivatives.
"""

import torch
from torch import Tensor

from vidaccel.kernels import select, tangents
from vidaccel.kernels.adaln.reference import adaln
from vidaccel.kernels.checks import check_shape, check_tensors, check_width, dense_rows, on_its_device
from vidaccel.kernels.gated_residual_adaln import reference
from vidaccel.kernels.quantize_rows.reference import Rows, quantize_rows


def gated_residual_adaln(
    x: Tensor, y: Tensor, gate: Tensor, scale: Tensor, shift: Tensor, *, eps: float = 1e-6, kernels: str = "auto"
) -> tuple[Tensor, Tensor]:
    """x, y [B, N, D], gate, scale, shift [B, D] -> (h, z) [B, N, D] in x's type: h = x + gate y, z = adaLN(h).

    Rows may lie anywhere in memory; a tensor whose last dimension is strided is copied first.
    """
    if not _fused(x, y, gate, scale, shift, kernels):
        return reference.gated_residual_adaln(x, y, gate, scale, shift, eps)
    primals, duals = tangents.split(x, y, gate, scale, shift)
    if duals is not None:
        h, z, dh, dz = _tangent(list(primals), list(duals), eps)
        return tangents.join(h, dh), tangents.join(z, dz)
    if select.asks_gradient(x, y, gate, scale, shift):
        return reference.gated_residual_adaln(x, y, gate, scale, shift, eps)
    return _forward(x, y, gate, scale, shift, eps)


def gated_residual_adaln_rows(
    x: Tensor, y: Tensor, gate: Tensor, scale: Tensor, shift: Tensor, *, eps: float = 1e-6, kernels: str = "auto"
) -> tuple[Tensor, Rows]:
    """The same h; z, before it is rounded to x's type, as rows [B, N, D] in float8."""
    tangents.refuse("gated_residual_adaln_rows", x=x, y=y, gate=gate, scale=scale, shift=shift)
    if not _fused(x, y, gate, scale, shift, kernels):
        h, _ = reference.gated_residual_adaln(x, y, gate, scale, shift, eps)
        return h, quantize_rows(adaln(h.float(), scale, shift, eps))
    h, values, scales = _rows(x, y, gate, scale, shift, eps)
    return h, Rows(values, scales)


def _fused(x: Tensor, y: Tensor, gate: Tensor, scale: Tensor, shift: Tensor, kernels: str) -> bool:
    """Whether the fused kernel runs; ValueError for shapes, and for what it does not take."""
    if x.ndim != 3:
        raise ValueError(f"gated_residual_adaln: x must be [B, N, D], got shape {tuple(x.shape)}")
    check_shape("gated_residual_adaln", "y", y, x.shape)
    for name, vector in (("gate", gate), ("scale", scale), ("shift", shift)):
        check_shape("gated_residual_adaln", name, vector, (x.shape[0], x.shape[2]))
    if select.choose(kernels, x.device) == "reference":
        return False
    check_tensors("gated_residual_adaln", x, y, gate, scale, shift)
    check_width("gated_residual_adaln", x.shape[2])
    return True


@torch.library.custom_op("vidaccel::gated_residual_adaln", mutates_args=())
@on_its_device
def _forward(x: Tensor, y: Tensor, gate: Tensor, scale: Tensor, shift: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    from vidaccel.kernels.gated_residual_adaln import fused

    return fused.forward(*map(dense_rows, (x, y, gate, scale, shift)), eps)


@_forward.register_fake
def _(x: Tensor, y: Tensor, gate: Tensor, scale: Tensor, shift: Tensor, eps: float):
    return x.new_empty(x.shape), x.new_empty(x.shape)


@torch.library.custom_op("vidaccel::gated_residual_adaln_rows", mutates_args=())
@on_its_device
def _rows(
    x: Tensor, y: Tensor, gate: Tensor, scale: Tensor, shift: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    from vidaccel.kernels.gated_residual_adaln import fused

    vectors = dense_rows(gate), dense_rows(scale), dense_rows(shift)
    return fused.rows(dense_rows(x), dense_rows(y), *vectors, eps)


@_rows.register_fake
def _(x: Tensor, y: Tensor, gate: Tensor, scale: Tensor, shift: Tensor, eps: float):
    values, scales = x.new_empty(x.shape, dtype=torch.float8_e4m3fn), x.new_empty(x.shape[:2], dtype=torch.float32)
    return x.new_empty(x.shape), values, scales


@torch.library.custom_op("vidaccel::gated_residual_adaln_tangent", mutates_args=())
@on_its_device
def _tangent(primals: list[Tensor], duals: list[Tensor], eps: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from vidaccel.kernels.gated_residual_adaln import fused

    return fused.tangent(tuple(map(dense_rows, primals)), tuple(map(dense_rows, duals)), eps)
