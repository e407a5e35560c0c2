"""Rows in float8 in Triton: a row is read once, held in registers until its largest number is known, and written.

M rows, D their width, J of what stands to their left; x [M, D], left [M, J], values [M, J + D] float8, scales [M].

Roofline (bf16, M = 64k, D = 3072; no reuse, so device memory bounds it): 2 bytes read and 1 written a number, 0.59 GB,
0.14 ms at the 4.3 TB/s that a copy reaches on an H200. What a single-stream block of HunyuanVideo projects at its end,
J = 3072 beside GELU of D = 12288, is 2.9 GB, 0.69 ms. Eager torch runs GELU, concatenation, largest number, division
and cast, each over memory.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from vidaccel.kernels.rows import autotuned, float8, float8_scale, interpreted

CONFIGS = [triton.Config({}, num_warps=warps) for warps in (8, 4, 16)]


@autotuned(CONFIGS, key=["D", "J"])
@triton.jit
def _quantize(
    x_ptr, left_ptr, values_ptr, scales_ptr, D, J, x_stride, left_stride,
    GELU: tl.constexpr, BESIDE: tl.constexpr, ROUNDED: tl.constexpr, BLOCK: tl.constexpr, LEFT: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    d, j = tl.arange(0, BLOCK), tl.arange(0, LEFT)
    x = tl.load(x_ptr + row * x_stride + d, mask=d < D, other=0.0).to(tl.float32)
    if GELU:
        # x (1 + tanh(y)) / 2 is x / (1 + exp(-2 y)), with -2 y log2(e) for exp2. Of what computes bounds this kernel, a
        # division is most: the square of an inverse root, which for numbers from 1 on needs no checks, is one of six.
        root = tl.rsqrt(1.0 + tl.exp2(x * (-2.302208198144325 - 0.1029432395800235 * (x * x))))
        x = x * root * root
    most = tl.max(tl.abs(x), axis=0)
    if BESIDE:
        left = tl.load(left_ptr + row * left_stride + j, mask=j < J, other=0.0).to(tl.float32)
        most = tl.maximum(most, tl.max(tl.abs(left), axis=0))
    scale, inverse = float8_scale(most)
    tl.store(scales_ptr + row, scale)
    out = values_ptr + row * (J + D)
    tl.store(out + J + d, float8(x * inverse, ROUNDED), mask=d < D)
    if BESIDE:
        tl.store(out + j, float8(left * inverse, ROUNDED), mask=j < J)


def quantize(x: Tensor, left: Tensor | None, gelu: bool) -> tuple[Tensor, Tensor]:
    """x [M, D], left [M, J], the last dimension of both contiguous -> values [M, J + D], scales [M]."""
    (M, D), J = x.shape, 0 if left is None else left.shape[1]
    values = torch.empty((M, J + D), dtype=torch.float8_e4m3fn, device=x.device)
    scales = torch.empty(M, dtype=torch.float32, device=x.device)
    _quantize[(M,)](
        x, x if left is None else left, values, scales, D, J, x.stride(0), 0 if left is None else left.stride(0),
        GELU=gelu, BESIDE=left is not None, ROUNDED=interpreted(),
        BLOCK=triton.next_power_of_2(D), LEFT=triton.next_power_of_2(max(J, 1)),
    )  # fmt: skip
    return values, scales
