"""The predictor's first layer in Triton: two products into one accumulator, bias and SiLU before it is written.

Shapes: M tokens, K width of tokens and of cache, D outputs; tokens, cache [M, K], weight [D, 2 K], bias [D].

The concatenation [tokens; cache] is never written: the left half of the weight meets the tokens, the right half the
cache, in the same registers. Programs run over output tiles in groups of GROUP rows, so that the tiles in flight share
weights and tokens in L2 ("Introduction to Triton": matrix multiplication, L2 cache optimisations).

Roofline (bf16, M = 64k, K = D = 3072): 4 M K D = 2.5 TFLOP, 3.1 ms at the 790 TFLOP/s of a large bf16 product on an
H200; memory is 3 M K elements, 0.3 ms, hidden behind it. Eager torch adds the concatenation (4 M K) and the activation
(2 M D), 0.56 ms: so this op can gain 15 % at most, and only where its product keeps up with cuBLAS.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from vidaccel.kernels.rows import autotuned


def _config(m: int, n: int, k: int, warps: int, stages: int) -> triton.Config:
    return triton.Config({"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k}, num_warps=warps, num_stages=stages)


CONFIGS = [
    _config(128, 128, 32, 8, 3),
    _config(128, 128, 64, 8, 4),
    _config(128, 256, 64, 8, 3),
    _config(256, 128, 64, 8, 3),
]


@triton.jit
def _product(acc, x_ptr, w_ptr, m, n, K, x_stride, w_stride, WHOLE: tl.constexpr, BLOCK_K: tl.constexpr):
    """acc + x w', over K in blocks; WHOLE: K is a multiple of the block."""
    k = tl.arange(0, BLOCK_K)
    x_ptr += m[:, None] * x_stride + k[None, :]
    w_ptr += n[None, :] * w_stride + k[:, None]
    for start in range(0, K, BLOCK_K):
        if WHOLE:
            x, w = tl.load(x_ptr + start), tl.load(w_ptr + start)
        else:
            x = tl.load(x_ptr + start, mask=(start + k)[None, :] < K, other=0.0)
            w = tl.load(w_ptr + start, mask=(start + k)[:, None] < K, other=0.0)
        acc = tl.dot(x, w, acc, input_precision="ieee")
    return acc


@autotuned(CONFIGS, key=["K", "D", "KEEP"])
@triton.jit
def _forward(
    x_ptr, c_ptr, w_ptr, bias_ptr, out_ptr, z_ptr, M, K, D, x_stride, c_stride, w_stride,
    WHOLE: tl.constexpr, KEEP: tl.constexpr, GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    rows, columns = tl.cdiv(M, BLOCK_M), tl.cdiv(D, BLOCK_N)
    group = tl.program_id(0) // (GROUP * columns)
    height = tl.minimum(rows - group * GROUP, GROUP)
    within = tl.program_id(0) % (GROUP * columns)
    m = (group * GROUP + within % height).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = (within // height) * BLOCK_N + tl.arange(0, BLOCK_N)
    # Rows and columns beyond the edge read row and column 0 again, which is cheaper than a mask, and are not stored.
    m_read, n_read = tl.where(m < M, m, 0), tl.where(n < D, n, 0)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    acc = _product(acc, x_ptr, w_ptr, m_read, n_read, K, x_stride, w_stride, WHOLE, BLOCK_K)
    acc = _product(acc, c_ptr, w_ptr + K, m_read, n_read, K, c_stride, w_stride, WHOLE, BLOCK_K)
    z = acc + tl.load(bias_ptr + n_read)[None, :].to(tl.float32)
    target = m[:, None] * D + n[None, :]
    inside = (m[:, None] < M) & (n[None, :] < D)
    if KEEP:
        tl.store(z_ptr + target, z, mask=inside)
    tl.store(out_ptr + target, z * tl.sigmoid(z), mask=inside)


def forward(tokens: Tensor, cache: Tensor, weight: Tensor, bias: Tensor, keep: bool) -> tuple[Tensor, Tensor]:
    """tokens, cache [M, K] with contiguous rows -> SiLU(z) [M, D], and z [M, D] if kept for the backward pass."""
    (M, K), D = tokens.shape, len(bias)
    out = torch.empty((M, D), dtype=tokens.dtype, device=tokens.device)
    z = torch.empty_like(out) if keep else out.new_empty(0)
    _forward[lambda meta: (triton.cdiv(M, meta["BLOCK_M"]) * triton.cdiv(D, meta["BLOCK_N"]),)](
        tokens, cache, weight, bias, out, z, M, K, D, tokens.stride(0), cache.stride(0), weight.stride(0),
        WHOLE=K % 64 == 0, KEEP=keep, GROUP=8,
    )  # fmt: skip
    return out, z
