"""Flash attention that carries a tangent: output and directional derivative in one pass, without the score matrix.

B batch, H heads, M queries, N keys, D head dim; q, dq, o, do [B, H, M, D], k, v, dk, dv [B, H, N, D].

    S = scale Q K'     dS = scale (dQ K' + Q dK')     P = softmax(S)
    O = P V            dO = (P o (dS - c)) V + P dV,  c = rowsum(P o dS)

A program owns BLOCK_M queries and walks over the keys in blocks, as in FlashAttention-2 (arXiv 2307.08691): it keeps
the running row maximum, the row sum, and the unnormalised O. The tangent needs one more accumulator and the running
mean c of dS. When a block moves c, the terms already summed were centred at the old value; because their weights are
those of O, the correction is (c_old - c_new) O and costs one multiply-add an element. So dS is always centred before it
meets V: summing P o dS first and subtracting c O at the end would lose the digits that c and dS share, which for scores
of 1e4 is most of them.

Roofline: six products of 2 B H M N D each where plain attention has two, so three times its arithmetic is the floor. At
M = N = 64k, H = 24, D = 128: 158 TFLOP, 0.20 s at the 790 TFLOP/s of a large bf16 product on an H200. Memory is 8 M H D
elements (3.2 GB, 0.8 ms): arithmetic bounds it. Registers limit the tile: two D-wide accumulators and three score tiles
instead of one and one, all float32.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from vidaccel.kernels.rows import autotuned

LOG2_E = tl.constexpr(1.4426950408889634)
NO_MASK, KEY_MASK, FULL_MASK = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


def _config(m: int, n: int, warps: int, stages: int) -> triton.Config:
    return triton.Config({"BLOCK_M": m, "BLOCK_N": n}, num_warps=warps, num_stages=stages)


CONFIGS = [
    _config(64, 32, 4, 2),
    _config(64, 64, 4, 2),
    _config(128, 32, 8, 2),
    _config(128, 32, 8, 3),
    _config(128, 64, 8, 2),
]


@triton.jit
def _tile(ptr, rows, limit, stride, d, D: tl.constexpr, CHECKED: tl.constexpr):
    """Rows [BLOCK, BLOCK_D] of a matrix; zero outside it. CHECKED: rows may lie beyond `limit`."""
    inside = d[None, :] < D
    if CHECKED:
        inside = inside & (rows[:, None] < limit)
    return tl.load(ptr + rows[:, None] * stride + d[None, :], mask=inside, other=0.0)


@triton.jit
def _absorb(
    state, q, dq, k_ptr, v_ptr, dk_ptr, dv_ptr, mask_ptr, start, m, d, M, N,
    scale, k_n, v_n, dk_n, dv_n, mask_m, mask_n,
    D: tl.constexpr, MASK: tl.constexpr, CHECKED: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Brings the state up to date with one block of keys: row maximum, sum and tangent mean, and both accumulators."""
    top, total, centre, out, dout = state
    n = start + tl.arange(0, BLOCK_N)
    k = tl.trans(_tile(k_ptr, n, N, k_n, d, D, CHECKED))
    dk = tl.trans(_tile(dk_ptr, n, N, dk_n, d, D, CHECKED))
    scores = tl.dot(q, k, input_precision="ieee") * (scale * LOG2_E)
    dscores = tl.dot(dq, k, input_precision="ieee")
    dscores = tl.dot(q, dk, dscores, input_precision="ieee") * scale
    if CHECKED:
        scores = tl.where(n[None, :] < N, scores, -float("inf"))
    if MASK == KEY_MASK:
        seen = tl.load(mask_ptr + n * mask_n, mask=n < N, other=0)
        scores = tl.where(seen[None, :] != 0, scores, -float("inf"))
    if MASK == FULL_MASK:
        inside = (m[:, None] < M) & (n[None, :] < N)
        seen = tl.load(mask_ptr + m[:, None] * mask_m + n[None, :] * mask_n, mask=inside, other=0)
        scores = tl.where(seen != 0, scores, -float("inf"))

    new_top = tl.maximum(top, tl.max(scores, axis=1))
    # A row that has seen no key yet has maximum -inf, and -inf - -inf is not a number.
    finite_top = tl.where(new_top == -float("inf"), 0.0, new_top)
    decay = tl.exp2(top - finite_top)
    weights = tl.exp2(scores - finite_top[:, None])
    new_total = total * decay + tl.sum(weights, axis=1)
    new_centre = centre * total * decay + tl.sum(weights * dscores, axis=1)
    new_centre = new_centre / tl.where(new_total == 0, 1.0, new_total)

    v = _tile(v_ptr, n, N, v_n, d, D, CHECKED)
    dv = _tile(dv_ptr, n, N, dv_n, d, D, CHECKED)
    dout = (dout + (centre - new_centre)[:, None] * out) * decay[:, None]
    dweights = weights * (dscores - new_centre[:, None])
    dout = tl.dot(dweights.to(v.dtype), v, dout, input_precision="ieee")
    weights = weights.to(v.dtype)
    dout = tl.dot(weights, dv, dout, input_precision="ieee")
    out = tl.dot(weights, v, out * decay[:, None], input_precision="ieee")
    return new_top, new_total, new_centre, out, dout


@autotuned(CONFIGS, key=["D", "MASK", "LENGTH"])
@triton.jit
def _attention(
    q_ptr, k_ptr, v_ptr, dq_ptr, dk_ptr, dv_ptr, mask_ptr, o_ptr, do_ptr,
    H, M, N, scale,
    q_b, q_h, q_m, k_b, k_h, k_n, v_b, v_h, v_n, dq_b, dq_h, dq_m, dk_b, dk_h, dk_n, dv_b, dv_h, dv_n,
    mask_b, mask_h, mask_m, mask_n, o_b, o_h, o_m,
    D: tl.constexpr, BLOCK_D: tl.constexpr, MASK: tl.constexpr, LENGTH: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    b, h = (tl.program_id(1) // H).to(tl.int64), (tl.program_id(1) % H).to(tl.int64)
    m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    d = tl.arange(0, BLOCK_D)
    q = _tile(q_ptr + b * q_b + h * q_h, m, M, q_m, d, D, True)
    dq = _tile(dq_ptr + b * dq_b + h * dq_h, m, M, dq_m, d, D, True)
    k_ptr += b * k_b + h * k_h
    v_ptr += b * v_b + h * v_h
    dk_ptr += b * dk_b + h * dk_h
    dv_ptr += b * dv_b + h * dv_h
    if MASK != NO_MASK:
        mask_ptr += b * mask_b + h * mask_h

    state = (
        tl.full((BLOCK_M,), -float("inf"), tl.float32),
        tl.zeros((BLOCK_M,), tl.float32),
        tl.zeros((BLOCK_M,), tl.float32),
        tl.zeros((BLOCK_M, BLOCK_D), tl.float32),
        tl.zeros((BLOCK_M, BLOCK_D), tl.float32),
    )
    whole = N // BLOCK_N * BLOCK_N
    for start in range(0, whole, BLOCK_N):
        state = _absorb(
            state, q, dq, k_ptr, v_ptr, dk_ptr, dv_ptr, mask_ptr, start, m, d, M, N,
            scale, k_n, v_n, dk_n, dv_n, mask_m, mask_n, D, MASK, False, BLOCK_N,
        )  # fmt: skip
    if whole < N:
        state = _absorb(
            state, q, dq, k_ptr, v_ptr, dk_ptr, dv_ptr, mask_ptr, whole, m, d, M, N,
            scale, k_n, v_n, dk_n, dv_n, mask_m, mask_n, D, MASK, True, BLOCK_N,
        )  # fmt: skip
    _, total, _, out, dout = state
    total = tl.where(total == 0, 1.0, total)[:, None]
    target = b * o_b + h * o_h + m[:, None] * o_m + d[None, :]
    inside = (m[:, None] < M) & (d[None, :] < D)
    tl.store(o_ptr + target, out / total, mask=inside)
    tl.store(do_ptr + target, dout / total, mask=inside)


def attention_jvp(
    q: Tensor, k: Tensor, v: Tensor, dq: Tensor, dk: Tensor, dv: Tensor, mask: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """o, do [B, H, M, D]; mask bool [B, H, M, N], expanded; the last dimension of the others is contiguous."""
    (B, H, M, D), N = q.shape, k.shape[2]
    o, do = torch.empty_like(q), torch.empty_like(q)
    kind = NO_MASK if mask is None else KEY_MASK if mask.stride(2) == 0 else FULL_MASK
    strides = [stride for tensor in (q, k, v, dq, dk, dv) for stride in tensor.stride()[:3]]
    _attention[lambda meta: (triton.cdiv(M, meta["BLOCK_M"]), B * H)](
        q, k, v, dq, dk, dv, q if mask is None else mask.view(torch.uint8), o, do,
        H, M, N, scale, *strides, *((0,) * 4 if mask is None else mask.stride()), *o.stride()[:3],
        D=D, BLOCK_D=max(16, triton.next_power_of_2(D)), MASK=kind, LENGTH=min(triton.next_power_of_2(N), 16384),
    )  # fmt: skip
    return o, do
