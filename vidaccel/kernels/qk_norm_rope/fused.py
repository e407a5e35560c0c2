"""RMS norm and rotary embedding of queries and keys in Triton: each is read once and written where attention reads it.

B samples, N video and L text tokens, H heads, D head dim, R <= N rotated tokens; q, k [B, N, H, D], cos, sin [R, D].

A program takes one token's q and k, all heads, as pairs (a, b) of neighbours that rotate together: a register reshape
of contiguous loads. Tokens beyond R get the angle zero instead of a branch. Text with weights of its own is a
second launch into the tail of the same output, which replaces the concatenation before attention.

Roofline (bf16, B = 1, N = 64k, H D = 3072, D = 128): q and k in and out are 4 N H D elements, 1.61 GB, cos and sin in
float32 2 N D more, 0.07 GB: 0.39 ms at the 4.3 TB/s that a copy reaches on an H200. With tangents 0.77 ms. Eager torch
moves more than 20 N H D, in float32 for the most part.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from vidaccel.kernels.rows import autotuned

CONFIGS = [triton.Config({}, num_warps=warps) for warps in (4, 8, 2)]


@triton.jit
def _load(ptr, stride_h, H, D, HEADS: tl.constexpr, HALF: tl.constexpr):
    """A token's rows [H, D] as the two members of each pair, [HEADS, HALF] float32 each, zero where padded."""
    h = tl.arange(0, HEADS)[:, None]
    d = tl.arange(0, 2 * HALF)[None, :]
    x = tl.load(ptr + h * stride_h + d, mask=(h < H) & (d < D), other=0.0)
    a, b = tl.split(tl.reshape(x, (HEADS, HALF, 2)))
    return a.to(tl.float32), b.to(tl.float32)


@triton.jit
def _store(ptr, a, b, stride_h, H, D, HEADS: tl.constexpr, HALF: tl.constexpr):
    h = tl.arange(0, HEADS)[:, None]
    d = tl.arange(0, 2 * HALF)[None, :]
    tl.store(ptr + h * stride_h + d, tl.reshape(tl.join(a, b), (HEADS, 2 * HALF)), mask=(h < H) & (d < D))


@triton.jit
def _angle(cos_ptr, sin_ptr, n, R, D, HALF: tl.constexpr):
    """cos and sin of token n's pairs, [1, HALF]; the angle is zero from token R on."""
    i = tl.arange(0, HALF)[None, :]
    rotated = i < tl.where(n < R, D // 2, 0)
    cos = tl.load(cos_ptr + n * D + 2 * i, mask=rotated, other=1.0).to(tl.float32)
    sin = tl.load(sin_ptr + n * D + 2 * i, mask=rotated, other=0.0).to(tl.float32)
    return cos, sin


@triton.jit
def _mean(x, H, D, ACROSS: tl.constexpr):
    """Mean over the entries that are normalised together: a head's [HEADS, 1], or all of them [1, 1]."""
    total, count = tl.sum(x, axis=1, keep_dims=True), D
    if ACROSS:
        total, count = tl.sum(total, axis=0, keep_dims=True), H * D
    return total / count


@triton.jit
def _normalise(a, b, eps, H, D, ACROSS: tl.constexpr):
    rrms = tl.rsqrt(_mean(a * a + b * b, H, D, ACROSS) + eps)
    return a * rrms, b * rrms, rrms


@triton.jit
def _jacobian(va, vb, a, b, rrms, H, D, ACROSS: tl.constexpr):
    """The symmetric Jacobian of the norm, applied to (va, vb); (a, b) is normalised."""
    projection = _mean(va * a + vb * b, H, D, ACROSS)
    return rrms * (va - a * projection), rrms * (vb - b * projection)


@triton.jit
def _forward_one(
    x_ptr, w_ptr, out_ptr, cos, sin, H, D, eps, x_stride_h, w_stride_h,
    ACROSS: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    a, b = _load(x_ptr, x_stride_h, H, D, HEADS, HALF)
    wa, wb = _load(w_ptr, w_stride_h, H, D, HEADS, HALF)
    a, b, _ = _normalise(a, b, eps, H, D, ACROSS)
    a, b = a * wa, b * wb
    _store(out_ptr, a * cos - b * sin, b * cos + a * sin, D, H, D, HEADS, HALF)


@autotuned(CONFIGS, key=["H", "D"])
@triton.jit
def _forward(
    q_ptr, k_ptr, q_w_ptr, k_w_ptr, cos_ptr, sin_ptr, q_out_ptr, k_out_ptr,
    R, H, D, eps, q_b, q_n, q_h, k_b, k_n, k_h, out_b, w_h,
    ACROSS: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    n, b = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    cos, sin = _angle(cos_ptr, sin_ptr, n, R, D, HALF)
    out = b * out_b + n * H * D
    _forward_one(
        q_ptr + b * q_b + n * q_n, q_w_ptr, q_out_ptr + out, cos, sin, H, D, eps, q_h, w_h,
        ACROSS, HEADS, HALF,
    )  # fmt: skip
    _forward_one(
        k_ptr + b * k_b + n * k_n, k_w_ptr, k_out_ptr + out, cos, sin, H, D, eps, k_h, w_h,
        ACROSS, HEADS, HALF,
    )  # fmt: skip


@triton.jit
def _tangent_one(
    x_ptr, dx_ptr, w_ptr, out_ptr, dout_ptr, cos, sin, H, D, eps, x_stride_h, dx_stride_h, w_stride_h,
    ACROSS: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    a, b = _load(x_ptr, x_stride_h, H, D, HEADS, HALF)
    da, db = _load(dx_ptr, dx_stride_h, H, D, HEADS, HALF)
    wa, wb = _load(w_ptr, w_stride_h, H, D, HEADS, HALF)
    a, b, rrms = _normalise(a, b, eps, H, D, ACROSS)
    da, db = _jacobian(da, db, a, b, rrms, H, D, ACROSS)
    a, b, da, db = a * wa, b * wb, da * wa, db * wb
    _store(out_ptr, a * cos - b * sin, b * cos + a * sin, D, H, D, HEADS, HALF)
    _store(dout_ptr, da * cos - db * sin, db * cos + da * sin, D, H, D, HEADS, HALF)


@autotuned(CONFIGS, key=["H", "D"])
@triton.jit
def _tangent(
    q_ptr, k_ptr, dq_ptr, dk_ptr, q_w_ptr, k_w_ptr, cos_ptr, sin_ptr, q_out_ptr, k_out_ptr, dq_out_ptr, dk_out_ptr,
    R, H, D, eps, q_b, q_n, q_h, k_b, k_n, k_h, dq_b, dq_n, dq_h, dk_b, dk_n, dk_h, out_b, w_h,
    ACROSS: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    n, b = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    cos, sin = _angle(cos_ptr, sin_ptr, n, R, D, HALF)
    out = b * out_b + n * H * D
    _tangent_one(
        q_ptr + b * q_b + n * q_n, dq_ptr + b * dq_b + n * dq_n, q_w_ptr, q_out_ptr + out, dq_out_ptr + out,
        cos, sin, H, D, eps, q_h, dq_h, w_h, ACROSS, HEADS, HALF,
    )  # fmt: skip
    _tangent_one(
        k_ptr + b * k_b + n * k_n, dk_ptr + b * dk_b + n * dk_n, k_w_ptr, k_out_ptr + out, dk_out_ptr + out,
        cos, sin, H, D, eps, k_h, dk_h, w_h, ACROSS, HEADS, HALF,
    )  # fmt: skip


def _constants(x: Tensor, weight: Tensor) -> dict:
    H, D = x.shape[2:]
    return {
        "ACROSS": weight.numel() != D,
        "HEADS": triton.next_power_of_2(H),
        "HALF": triton.next_power_of_2(D // 2),
    }


def _head_stride(weight: Tensor, D: int) -> int:
    return D if weight.numel() != D else 0


def forward(
    streams: list[tuple[Tensor, Tensor, Tensor, Tensor]], cos: Tensor, sin: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """streams: (q, k, q_weight, k_weight) of the video, and of text if it has weights of its own -> q, k joined."""
    B, _, H, D = streams[0][0].shape
    tokens = sum(stream[0].shape[1] for stream in streams)
    q_out, k_out = (torch.empty((B, tokens, H, D), dtype=x.dtype, device=x.device) for x in streams[0][:2])
    offset, rotated = 0, len(cos)
    for q, k, q_weight, k_weight in streams:
        N = q.shape[1]
        _forward[(N, B)](
            q, k, q_weight, k_weight, cos, sin, q_out[:, offset:], k_out[:, offset:],
            rotated, H, D, eps, *q.stride()[:3], *k.stride()[:3], q_out.stride(0), _head_stride(q_weight, D),
            **_constants(q, q_weight),
        )  # fmt: skip
        offset, rotated = N, 0
    return q_out, k_out


def tangent(
    streams: list[tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]],
    cos: Tensor,
    sin: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """streams: (q, k, dq, dk, q_weight, k_weight) -> q, k, dq, dk, each [B, N + L, H, D]."""
    B, _, H, D = streams[0][0].shape
    tokens = sum(stream[0].shape[1] for stream in streams)
    outs = [torch.empty((B, tokens, H, D), dtype=x.dtype, device=x.device) for x in streams[0][:4]]
    offset, rotated = 0, len(cos)
    for *inputs, q_weight, k_weight in streams:
        N = inputs[0].shape[1]
        _tangent[(N, B)](
            *inputs, q_weight, k_weight, cos, sin, *(out[:, offset:] for out in outs),
            rotated, H, D, eps, *(stride for x in inputs for stride in x.stride()[:3]),
            outs[0].stride(0), _head_stride(q_weight, D),
            **_constants(inputs[0], q_weight),
        )  # fmt: skip
        offset, rotated = N, 0
    return tuple(outs)
