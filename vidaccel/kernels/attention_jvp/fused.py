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
instead of one and one, all float32. Measured on an H100 (studies/results/gpu): 0.31 s, 0.87 of the rate of torch's
own flash attention, which computes no tangent.

Keys, values and their tangents come by address, or through tensor descriptors (DESCRIBED), which Hopper's copy engine
reads: that frees the registers that addresses take, and wants 16-byte alignment of every row. On that H100 the latter
was faster by 8 %, with the largest tile.

float32 has no tensor-core product: its dots are multiply-adds on operands held whole in registers. At D = 128 a tile
made for bf16 then spills 17 to 24 kB a thread on sm_90; the small one of float32's own spills 3 to 9, so it is slow.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from vidaccel.kernels.rows import autotuned

LOG2_E = tl.constexpr(1.4426950408889634)
NO_MASK, KEY_MASK, FULL_MASK = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


def _config(m: int, n: int, warps: int, stages: int, described: bool = False) -> triton.Config:
    blocks = {"BLOCK_M": m, "BLOCK_N": n, "DESCRIBED": described}
    return triton.Config(blocks, num_warps=warps, num_stages=stages)


# By address, 64 keys spill registers on sm_90; described, they do not.
CONFIGS = [
    _config(64, 32, 4, 2),
    _config(128, 32, 8, 2),
    _config(128, 32, 8, 3),
    _config(64, 64, 4, 2, described=True),
    _config(128, 32, 8, 3, described=True),
    _config(128, 64, 8, 2, described=True),
]

LONGEST = 8192
"""Keys from which on lengths share a choice: a call on 64k is sixty times as long, and tuning makes many."""


def _possible(configs: list[triton.Config], named: dict, ALIGNED: bool, **kwargs) -> list[triton.Config]:
    """Without descriptors where there is no copy engine for them, or a row that it cannot address."""
    usable = ALIGNED and torch.cuda.get_device_capability(named["q_ptr"].device) >= (9, 0)
    return [config for config in configs if usable or not config.kwargs["DESCRIBED"]]


@triton.jit
def _tile(ptr, rows, limit, stride, d, D: tl.constexpr, CHECKED: tl.constexpr):
    """Rows [BLOCK, BLOCK_D] of a matrix; zero outside it. CHECKED: rows may lie beyond `limit`."""
    inside = d[None, :] < D
    if CHECKED:
        inside = inside & (rows[:, None] < limit)
    return tl.load(ptr + rows[:, None] * stride + d[None, :], mask=inside, other=0.0)


@triton.jit
def _source(ptr, rows, stride, D: tl.constexpr, DESCRIBED: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):
    """What `_block` reads from: a descriptor of the matrix [rows, D] at `ptr`, or that address."""
    if DESCRIBED:
        source = tl.make_tensor_descriptor(ptr, shape=[rows, D], strides=[stride, 1], block_shape=[BLOCK_N, BLOCK_D])
    else:
        source = ptr
    return source


@triton.jit
def _block(
    source, start, limit, stride, d,
    D: tl.constexpr, CHECKED: tl.constexpr, DESCRIBED: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Rows [BLOCK_N, BLOCK_D] from `start` on; a descriptor gives zero outside the matrix by itself."""
    if DESCRIBED:
        block = source.load([start, 0])
    else:
        block = _tile(source, start + tl.arange(0, BLOCK_N), limit, stride, d, D, CHECKED)
    return block


@triton.jit
def _absorb(
    state, q, dq, k_source, v_source, dk_source, dv_source, mask_ptr, start, m, d, M, N,
    scale, k_n, v_n, dk_n, dv_n, mask_m, mask_n,
    D: tl.constexpr, MASK: tl.constexpr, CHECKED: tl.constexpr, DESCRIBED: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Brings the state up to date with one block of keys: row maximum, sum and tangent mean, and both accumulators."""
    top, total, centre, out, dout = state
    n = start + tl.arange(0, BLOCK_N)
    k = tl.trans(_block(k_source, start, N, k_n, d, D, CHECKED, DESCRIBED, BLOCK_N))
    dk = tl.trans(_block(dk_source, start, N, dk_n, d, D, CHECKED, DESCRIBED, BLOCK_N))
    scores = tl.dot(q, k, input_precision="ieee")
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
    # Scaled after the maximum is gone: that rounds what is left of a score, not a score of 1e4.
    decay = tl.exp2((top - finite_top) * (scale * LOG2_E))
    weights = tl.exp2((scores - finite_top[:, None]) * (scale * LOG2_E))
    new_total = total * decay + tl.sum(weights, axis=1)
    new_centre = centre * total * decay + tl.sum(weights * dscores, axis=1)
    new_centre = new_centre / tl.where(new_total == 0, 1.0, new_total)

    v = _block(v_source, start, N, v_n, d, D, CHECKED, DESCRIBED, BLOCK_N)
    dv = _block(dv_source, start, N, dv_n, d, D, CHECKED, DESCRIBED, BLOCK_N)
    dout = (dout + (centre - new_centre)[:, None] * out) * decay[:, None]
    dweights = weights * (dscores - new_centre[:, None])
    dout = tl.dot(dweights.to(v.dtype), v, dout, input_precision="ieee")
    weights = weights.to(v.dtype)
    dout = tl.dot(weights, dv, dout, input_precision="ieee")
    out = tl.dot(weights, v, out * decay[:, None], input_precision="ieee")
    return new_top, new_total, new_centre, out, dout


@autotuned(CONFIGS, key=["D", "MASK", "LENGTH", "ALIGNED"], possible=_possible)
@triton.jit
def _attention(
    q_ptr, k_ptr, v_ptr, dq_ptr, dk_ptr, dv_ptr, mask_ptr, o_ptr, do_ptr,
    H, M, N, scale,
    q_b, q_h, q_m, k_b, k_h, k_n, v_b, v_h, v_n, dq_b, dq_h, dq_m, dk_b, dk_h, dk_n, dv_b, dv_h, dv_n,
    mask_b, mask_h, mask_m, mask_n, o_b, o_h, o_m,
    D: tl.constexpr, BLOCK_D: tl.constexpr, MASK: tl.constexpr, LENGTH: tl.constexpr, ALIGNED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, DESCRIBED: tl.constexpr,
):  # fmt: skip
    b, h = (tl.program_id(1) // H).to(tl.int64), (tl.program_id(1) % H).to(tl.int64)
    m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    d = tl.arange(0, BLOCK_D)
    q = _tile(q_ptr + b * q_b + h * q_h, m, M, q_m, d, D, True)
    dq = _tile(dq_ptr + b * dq_b + h * dq_h, m, M, dq_m, d, D, True)
    k_source = _source(k_ptr + b * k_b + h * k_h, N, k_n, D, DESCRIBED, BLOCK_N, BLOCK_D)
    v_source = _source(v_ptr + b * v_b + h * v_h, N, v_n, D, DESCRIBED, BLOCK_N, BLOCK_D)
    dk_source = _source(dk_ptr + b * dk_b + h * dk_h, N, dk_n, D, DESCRIBED, BLOCK_N, BLOCK_D)
    dv_source = _source(dv_ptr + b * dv_b + h * dv_h, N, dv_n, D, DESCRIBED, BLOCK_N, BLOCK_D)
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
            state, q, dq, k_source, v_source, dk_source, dv_source, mask_ptr, start, m, d, M, N,
            scale, k_n, v_n, dk_n, dv_n, mask_m, mask_n, D, MASK, False, DESCRIBED, BLOCK_N,
        )  # fmt: skip
    if whole < N:
        state = _absorb(
            state, q, dq, k_source, v_source, dk_source, dv_source, mask_ptr, whole, m, d, M, N,
            scale, k_n, v_n, dk_n, dv_n, mask_m, mask_n, D, MASK, True, DESCRIBED, BLOCK_N,
        )  # fmt: skip
    _, total, _, out, dout = state
    total = tl.where(total == 0, 1.0, total)[:, None]
    target = b * o_b + h * o_h + m[:, None] * o_m + d[None, :]
    inside = (m[:, None] < M) & (d[None, :] < D)
    tl.store(o_ptr + target, out / total, mask=inside)
    tl.store(do_ptr + target, dout / total, mask=inside)


_attention_float32 = _attention.fn
TILE_FLOAT32 = {"BLOCK_M": 32, "BLOCK_N": 32, "DESCRIBED": False, "num_warps": 8, "num_stages": 1}


def _aligned(tensor: Tensor) -> bool:
    """Whether every row [D] starts at a multiple of 16 bytes."""
    return tensor.data_ptr() % 16 == 0 and all(s * tensor.element_size() % 16 == 0 for s in tensor.stride()[:3])


def _workspace(size: int, alignment: int, stream: int | None) -> Tensor:
    """Memory in which a program writes its descriptors, as `triton.set_allocator` asks for it."""
    return torch.empty(size, dtype=torch.int8, device="cuda")


def attention_jvp(
    q: Tensor, k: Tensor, v: Tensor, dq: Tensor, dk: Tensor, dv: Tensor, mask: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """o, do [B, H, M, D]; mask bool [B, H, M, N], expanded; the last dimension of the others is contiguous.

    Keys and values of a head are addressed by 32 bits: wider addresses take registers that are not there.
    """
    (B, H, M, D), N = q.shape, k.shape[2]
    o, do = torch.empty_like(q), torch.empty_like(q)
    kind = (NO_MASK if mask is None else KEY_MASK if mask.stride(2) == 0 else FULL_MASK).value
    strides = [stride for tensor in (q, k, v, dq, dk, dv) for stride in tensor.stride()[:3]]
    if q.is_cuda:
        triton.set_allocator(_workspace)
    kernel, tile = (_attention_float32, TILE_FLOAT32) if q.dtype == torch.float32 else (_attention, {})
    kernel[lambda meta: (triton.cdiv(M, meta["BLOCK_M"]), B * H)](
        q, k, v, dq, dk, dv, q if mask is None else mask.view(torch.uint8), o, do,
        H, M, N, scale, *strides, *((0,) * 4 if mask is None else mask.stride()), *o.stride()[:3],
        D=D, BLOCK_D=max(16, triton.next_power_of_2(D)), MASK=kind, LENGTH=min(triton.next_power_of_2(N), LONGEST),
        ALIGNED=all(map(_aligned, (k, v, dk, dv))), **tile,
    )  # fmt: skip
    return o, do
