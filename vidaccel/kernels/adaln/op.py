"""adaLN as one op: layer norm without affine part, times 1 + scale, plus shift, statistics in float32.

Gradients with respect to all three tensors; forward-mode derivative with respect to all three; no second derivative.
`adaln_rows` gives it in float8, without derivatives.
"""

import torch
from torch import Tensor

from vidaccel.kernels import select, tangents
from vidaccel.kernels.adaln import reference
from vidaccel.kernels.checks import check_shape, check_tensors, check_width, dense_rows, on_its_device
from vidaccel.kernels.quantize_rows.reference import Rows, quantize_rows


def adaln(x: Tensor, scale: Tensor, shift: Tensor, *, eps: float = 1e-6, kernels: str = "auto") -> Tensor:
    """x [B, N, D] float, scale and shift [B, D] -> [B, N, D] in x's type.

    Rows may lie anywhere in memory; an x whose last dimension is strided is copied first, as torch's layer norm does.
    """
    if not _fused(x, scale, shift, kernels):
        return reference.adaln(x, scale, shift, eps)
    primals, duals = tangents.split(x, scale, shift)
    if duals is not None:
        return tangents.join(*_tangent(list(primals), list(duals), eps))
    return _forward(x, scale, shift, eps)[0]


def adaln_rows(x: Tensor, scale: Tensor, shift: Tensor, *, eps: float = 1e-6, kernels: str = "auto") -> Rows:
    """What `adaln` gives, before it is rounded to x's type, as rows [B, N, D] in float8."""
    tangents.refuse("adaln_rows", x=x, scale=scale, shift=shift)
    if not _fused(x, scale, shift, kernels):
        return quantize_rows(reference.adaln(x.float(), scale, shift, eps))
    return Rows(*_rows(x, scale, shift, eps))


def _fused(x: Tensor, scale: Tensor, shift: Tensor, kernels: str) -> bool:
    """Whether the fused kernel runs; ValueError for shapes, and for what it does not take."""
    if x.ndim != 3:
        raise ValueError(f"adaln: x must be [B, N, D], got shape {tuple(x.shape)}")
    for name, vector in (("scale", scale), ("shift", shift)):
        check_shape("adaln", name, vector, (x.shape[0], x.shape[2]))
    if select.choose(kernels, x.device) == "reference":
        return False
    check_tensors("adaln", x, scale, shift)
    check_width("adaln", x.shape[2])
    return True


@torch.library.custom_op("vidaccel::adaln", mutates_args=())
@on_its_device
def _forward(x: Tensor, scale: Tensor, shift: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    from vidaccel.kernels.adaln import fused

    return fused.forward(*map(dense_rows, (x, scale, shift)), eps)


@_forward.register_fake
def _(x: Tensor, scale: Tensor, shift: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    statistic = x.new_empty(x.shape[:2], dtype=torch.float32)
    return x.new_empty(x.shape), statistic, torch.empty_like(statistic)


@torch.library.custom_op("vidaccel::adaln_rows", mutates_args=())
@on_its_device
def _rows(x: Tensor, scale: Tensor, shift: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    from vidaccel.kernels.adaln import fused

    return fused.rows(dense_rows(x), dense_rows(scale), dense_rows(shift), eps)


@_rows.register_fake
def _(x: Tensor, scale: Tensor, shift: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape, dtype=torch.float8_e4m3fn), x.new_empty(x.shape[:2], dtype=torch.float32)


@torch.library.custom_op("vidaccel::adaln_tangent", mutates_args=())
@on_its_device
def _tangent(primals: list[Tensor], duals: list[Tensor], eps: float) -> tuple[Tensor, Tensor]:
    from vidaccel.kernels.adaln import fused

    return fused.tangent(tuple(map(dense_rows, primals)), tuple(map(dense_rows, duals)), eps)


@torch.library.custom_op("vidaccel::adaln_backward", mutates_args=())
@on_its_device
def _backward(g: Tensor, x: Tensor, scale: Tensor, mean: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    from vidaccel.kernels.adaln import fused

    return fused.backward(dense_rows(g), dense_rows(x), dense_rows(scale), mean, rstd)


@_backward.register_fake
def _(g: Tensor, x: Tensor, scale: Tensor, mean: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), scale.new_empty(scale.shape), scale.new_empty(scale.shape)


def _save(ctx, inputs, output) -> None:
    x, scale, _, _ = inputs
    _, mean, rstd = output
    ctx.save_for_backward(x, scale, mean, rstd)


def _gradients(ctx, g: Tensor, _mean, _rstd):
    return *_backward(g, *ctx.saved_tensors), None


_forward.register_autograd(_gradients, setup_context=_save)
