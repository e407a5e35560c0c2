"""adaLN in Triton: a row is read once, normalised in registers, modulated and written.

Shapes: B samples, N tokens, D width; x [B, N, D], scale and shift [B, D], statistics [B, N] float32.

A program takes ROWS consecutive tokens of one sample and holds that sample's scale and shift in registers, which would
otherwise be read from L2 for every row at twice the traffic of the row itself.

Its rows in float8, for products of fp8, are that kernel's with another store.

Roofline (bf16, B = 1, N = 64k, D = 3072; no reuse, so device memory bounds it): forward moves 2 N D elements, 0.81 GB,
0.19 ms at the 4.3 TB/s that a copy reaches on an H200. Output with tangent moves 4 N D (0.38 ms), backward 3 N D
(0.28 ms); rows in float8 move 3 bytes a number where writing and quantising them would move 7. Eager torch runs layer
norm, add, multiply and add, each over memory: 8 N D.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from vidaccel.kernels.rows import autotuned, float8, float8_scale, interpreted, layer_norm, layer_norm_jacobian

CONFIGS = [triton.Config({"ROWS": rows}, num_warps=warps) for rows, warps in ((4, 8), (1, 8), (16, 8), (4, 16))]

# The backward pass sums over tokens in this many partial sums at most: enough programs to fill any GPU, and fixed, so
# that the same inputs give the same bits on every device.
PARTIAL_SUMS = 512


@autotuned(CONFIGS, key=["D"])
@triton.jit
def _forward(
    x_ptr, scale_ptr, shift_ptr, y_ptr, mean_ptr, rstd_ptr,
    N, D, eps, x_stride_b, x_stride_n, scale_stride_b, shift_stride_b,
    QUANTIZED: tl.constexpr, ROUNDED: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """In float8 the row's own scale stands in the place of its mean, and nothing in that of rstd."""
    b = tl.program_id(1).to(tl.int64)
    first = tl.program_id(0).to(tl.int64) * ROWS
    d = tl.arange(0, BLOCK)
    valid = d < D
    scale = 1 + tl.load(scale_ptr + b * scale_stride_b + d, mask=valid, other=0.0).to(tl.float32)
    shift = tl.load(shift_ptr + b * shift_stride_b + d, mask=valid, other=0.0).to(tl.float32)
    for n in range(first, tl.minimum(first + ROWS, N)):
        x = tl.load(x_ptr + b * x_stride_b + n * x_stride_n + d, mask=valid, other=0.0).to(tl.float32)
        normed, mean, rstd = layer_norm(x, valid, D, eps)
        row = b * N + n
        y = normed * scale + shift
        if QUANTIZED:
            kept, inverse = float8_scale(tl.max(tl.abs(y), axis=0))
            tl.store(y_ptr + row * D + d, float8(y * inverse, ROUNDED), mask=valid)
        else:
            kept = mean
            tl.store(y_ptr + row * D + d, y, mask=valid)
            tl.store(rstd_ptr + row, rstd)
        tl.store(mean_ptr + row, kept)


@autotuned(CONFIGS, key=["D"])
@triton.jit
def _tangent(
    x_ptr, scale_ptr, shift_ptr, dx_ptr, dscale_ptr, dshift_ptr, y_ptr, dy_ptr,
    N, D, eps, x_stride_b, x_stride_n, dx_stride_b, dx_stride_n,
    scale_stride_b, shift_stride_b, dscale_stride_b, dshift_stride_b,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(1).to(tl.int64)
    first = tl.program_id(0).to(tl.int64) * ROWS
    d = tl.arange(0, BLOCK)
    valid = d < D
    scale = 1 + tl.load(scale_ptr + b * scale_stride_b + d, mask=valid, other=0.0).to(tl.float32)
    shift = tl.load(shift_ptr + b * shift_stride_b + d, mask=valid, other=0.0).to(tl.float32)
    dscale = tl.load(dscale_ptr + b * dscale_stride_b + d, mask=valid, other=0.0).to(tl.float32)
    dshift = tl.load(dshift_ptr + b * dshift_stride_b + d, mask=valid, other=0.0).to(tl.float32)
    for n in range(first, tl.minimum(first + ROWS, N)):
        x = tl.load(x_ptr + b * x_stride_b + n * x_stride_n + d, mask=valid, other=0.0).to(tl.float32)
        dx = tl.load(dx_ptr + b * dx_stride_b + n * dx_stride_n + d, mask=valid, other=0.0).to(tl.float32)
        normed, _, rstd = layer_norm(x, valid, D, eps)
        dnormed = layer_norm_jacobian(dx, normed, rstd, valid, D)
        out = (b * N + n) * D + d
        tl.store(y_ptr + out, normed * scale + shift, mask=valid)
        tl.store(dy_ptr + out, dnormed * scale + normed * dscale + dshift, mask=valid)


@triton.jit
def _backward(
    g_ptr, x_ptr, scale_ptr, mean_ptr, rstd_ptr, gx_ptr, gscale_ptr, gshift_ptr,
    N, D, g_stride_b, g_stride_n, x_stride_b, x_stride_n, scale_stride_b,
    BLOCK: tl.constexpr,
):  # fmt: skip
    part, parts, b = tl.program_id(0).to(tl.int64), tl.num_programs(0), tl.program_id(1).to(tl.int64)
    rows = tl.cdiv(N, parts)
    d = tl.arange(0, BLOCK)
    valid = d < D
    scale = 1 + tl.load(scale_ptr + b * scale_stride_b + d, mask=valid, other=0.0).to(tl.float32)
    gscale = tl.zeros((BLOCK,), tl.float32)
    gshift = tl.zeros((BLOCK,), tl.float32)
    for n in range(part * rows, tl.minimum((part + 1) * rows, N)):
        row = b * N + n
        g = tl.load(g_ptr + b * g_stride_b + n * g_stride_n + d, mask=valid, other=0.0).to(tl.float32)
        x = tl.load(x_ptr + b * x_stride_b + n * x_stride_n + d, mask=valid, other=0.0).to(tl.float32)
        rstd = tl.load(rstd_ptr + row)
        normed = tl.where(valid, (x - tl.load(mean_ptr + row)) * rstd, 0.0)
        tl.store(gx_ptr + row * D + d, layer_norm_jacobian(g * scale, normed, rstd, valid, D), mask=valid)
        gscale += g * normed
        gshift += g
    out = (b * parts + part) * D + d
    tl.store(gscale_ptr + out, gscale, mask=valid)
    tl.store(gshift_ptr + out, gshift, mask=valid)


def forward(x: Tensor, scale: Tensor, shift: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """y [B, N, D], mean [B, N], rstd [B, N]; the last dimension of every input is contiguous."""
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    mean = torch.empty(x.shape[:2], dtype=torch.float32, device=x.device)
    rstd = torch.empty_like(mean)
    _launch(x, scale, shift, y, mean, rstd, eps)
    return y, mean, rstd


def rows(x: Tensor, scale: Tensor, shift: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The same in float8: values [B, N, D], scales [B, N]."""
    values = torch.empty(x.shape, dtype=torch.float8_e4m3fn, device=x.device)
    scales = torch.empty(x.shape[:2], dtype=torch.float32, device=x.device)
    _launch(x, scale, shift, values, scales, scales, eps)
    return values, scales


def _launch(x: Tensor, scale: Tensor, shift: Tensor, y: Tensor, mean: Tensor, rstd: Tensor, eps: float) -> None:
    B, N, D = x.shape
    _forward[lambda meta: (triton.cdiv(N, meta["ROWS"]), B)](
        x, scale, shift, y, mean, rstd,
        N, D, eps, *x.stride()[:2], scale.stride(0), shift.stride(0),
        QUANTIZED=y.dtype != x.dtype, ROUNDED=interpreted(), BLOCK=triton.next_power_of_2(D),
    )  # fmt: skip


def tangent(primals: tuple[Tensor, ...], tangents: tuple[Tensor, ...], eps: float) -> tuple[Tensor, Tensor]:
    """(x, scale, shift) and their tangents -> y and its tangent, both [B, N, D]."""
    (x, scale, shift), (dx, dscale, dshift) = primals, tangents
    B, N, D = x.shape
    y = torch.empty((B, N, D), dtype=x.dtype, device=x.device)
    dy = torch.empty_like(y)
    _tangent[lambda meta: (triton.cdiv(N, meta["ROWS"]), B)](
        x, scale, shift, dx, dscale, dshift, y, dy,
        N, D, eps, *x.stride()[:2], *dx.stride()[:2],
        scale.stride(0), shift.stride(0), dscale.stride(0), dshift.stride(0),
        BLOCK=triton.next_power_of_2(D),
    )  # fmt: skip
    return y, dy


def backward(g: Tensor, x: Tensor, scale: Tensor, mean: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradient of y [B, N, D] -> gradients of x [B, N, D], scale [B, D] and shift [B, D]."""
    B, N, D = x.shape
    parts = max(1, min(N, PARTIAL_SUMS // B))
    gx = torch.empty((B, N, D), dtype=x.dtype, device=x.device)
    gscale, gshift = torch.empty((2, B, parts, D), dtype=torch.float32, device=x.device)
    _backward[(parts, B)](
        g, x, scale, mean, rstd, gx, gscale, gshift,
        N, D, *g.stride()[:2], *x.stride()[:2], scale.stride(0),
        BLOCK=triton.next_power_of_2(D), num_warps=8,
    )  # fmt: skip
    return gx, gscale.sum(1).to(scale.dtype), gshift.sum(1).to(scale.dtype)
