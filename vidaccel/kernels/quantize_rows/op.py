"""A tensor's rows in float8, each scaled to the range of that type, as one op: what products of fp8 are made of.

It may take in what comes before such a product: GELU, and another tensor to the left of the first. No derivatives.
"""

import torch
from torch import Tensor

from vidaccel.kernels import select, tangents
from vidaccel.kernels.checks import check_shape, check_tensors, check_width, dense_rows, on_its_device
from vidaccel.kernels.quantize_rows import reference
from vidaccel.kernels.quantize_rows.reference import Rows

WIDEST = 32768
"""Numbers in a row, held once; the widest that a supported model projects has 15360."""


def quantize_rows(x: Tensor, *, left: Tensor | None = None, gelu: bool = False, kernels: str = "auto") -> Rows:
    """x [..., D], after GELU (tanh-approximate) where asked for, to the right of left [..., J] -> rows [..., J + D].

    Rows of several dimensions that do not lie evenly in memory are copied first.
    """
    if left is not None:
        check_shape("quantize_rows", "left", left, (*x.shape[:-1], left.shape[-1]))
    tangents.refuse("quantize_rows", x=x, **({} if left is None else {"left": left}))
    if select.choose(kernels, x.device) == "reference":
        return reference.quantize_rows(x, left, gelu)
    check_tensors("quantize_rows", x, *(() if left is None else (left,)))
    check_width("quantize_rows", x.shape[-1] + (0 if left is None else left.shape[-1]), WIDEST)
    values, scales = _quantize(x.flatten(0, -2), None if left is None else left.flatten(0, -2), gelu)
    return Rows(values.view(*x.shape[:-1], values.shape[1]), scales.view(x.shape[:-1]))


@torch.library.custom_op("vidaccel::quantize_rows", mutates_args=())
@on_its_device
def _quantize(x: Tensor, left: Tensor | None, gelu: bool) -> tuple[Tensor, Tensor]:
    from vidaccel.kernels.quantize_rows import fused

    return fused.quantize(dense_rows(x), None if left is None else dense_rows(left), gelu)


@_quantize.register_fake
def _(x: Tensor, left: Tensor | None, gelu: bool) -> tuple[Tensor, Tensor]:
    width = x.shape[1] + (0 if left is None else left.shape[1])
    return x.new_empty(len(x), width, dtype=torch.float8_e4m3fn), x.new_empty(len(x), dtype=torch.float32)
