"""Attention with a forward derivative, and the mode that routes a model's attention through it.

PyTorch's flash attention has no forward-mode derivative, and the quadratic "math" attention that has one does not fit
a video. `AttentionTangents` catches `scaled_dot_product_attention` during a derivative pass, so no model code changes:

    with torch.no_grad(), forward_ad.dual_level(), AttentionTangents(dtype=torch.bfloat16):
        u = model(forward_ad.make_dual(x, v), ...)

Output and tangent come from one pass, so the same pass serves loss and derivative. There is no gradient.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode

from vidaccel.kernels import select, tangents
from vidaccel.kernels.attention_jvp import reference
from vidaccel.kernels.checks import check_shape, check_tensors, dense_rows, on_its_device

HEAD_DIMS = range(16, 129)
FARTHEST = 2**31
"""Elements within which the keys of a head must lie: 32 bits address them, as far as 700,000 tokens of width 3072."""


def attention_jvp(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    *,
    mask: Tensor | None = None,
    scale: float | None = None,
    kernels: str = "auto",
) -> tuple[Tensor, Tensor]:
    """softmax(scale q k') v and its derivative along (dq, dk, dv); scale is positive, 1 / sqrt(D) unless given.

    q, dq [B, H, M, D], k, v, dk, dv [B, H, N, D] -> o, do [B, H, M, D] in q's memory layout. mask is bool, True where a
    key takes part: [B, N], or anything that broadcasts to [B, H, M, N]. Rows without a key yield zeros.
    """
    if q.ndim != 4 or k.ndim != 4:
        raise ValueError(f"attention_jvp: q and k must be [B, H, N, D], got {tuple(q.shape)} and {tuple(k.shape)}")
    (B, H, M, D), N = q.shape, k.shape[2]
    for name, tensor, length in (("k", k, N), ("v", v, N), ("dq", dq, M), ("dk", dk, N), ("dv", dv, N)):
        check_shape("attention_jvp", name, tensor, (B, H, length, D))
    if select.asks_gradient(q, k, v, dq, dk, dv):
        raise NotImplementedError("attention_jvp has no gradient: call it under torch.no_grad()")
    if mask is not None:
        mask = _expand(mask, (B, H, M, N))
    scale = D**-0.5 if scale is None else scale
    if not scale > 0:
        raise ValueError(f"attention_jvp: scale must be positive, got {scale}")
    if select.choose(kernels, q.device) == "reference":
        return reference.attention_jvp(q, k, v, dq, dk, dv, mask, scale)
    check_tensors("attention_jvp", q, k, v, dq, dk, dv)
    if len({tensor.dtype for tensor in (q, k, v, dq, dk, dv)}) > 1:
        raise ValueError(f"attention_jvp: all six tensors must have one type, got {[t.dtype for t in (q, k, v)]}")
    if D not in HEAD_DIMS:
        raise ValueError(f"attention_jvp: head dim {D} is not supported; {HEAD_DIMS[0]} to {HEAD_DIMS[-1]} are")
    tensors = [dense_rows(tensor) for tensor in (q, k, v, dq, dk, dv)]
    if N * max(tensor.stride(2) for tensor in tensors[1:3] + tensors[4:]) >= FARTHEST:
        raise ValueError(f"attention_jvp: {N} keys over 2^31 or more elements of memory are not supported")
    return _fused(*tensors, mask, scale)


class AttentionTangents(TorchFunctionMode):
    """Sends every `scaled_dot_product_attention` that is given a tangent to `attention_jvp`; the others are left alone.

    `dtype` is what attention computes in: a derivative pass is float32 outside attention and may be bf16 within.
    """

    def __init__(self, kernels: str = "auto", dtype: torch.dtype | None = None):
        super().__init__()
        self.kernels = kernels
        self.dtype = dtype

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is F.scaled_dot_product_attention:
            return self._attention(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    def _attention(
        self, query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False
    ) -> Tensor:
        primals, duals = tangents.split(query, key, value)
        if duals is None:
            return F.scaled_dot_product_attention(
                query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
            )
        if dropout_p or is_causal or query.shape[1] != key.shape[1]:
            raise NotImplementedError("attention_jvp: no dropout, no causal mask, as many heads in q as in k")
        inputs = [tensor.to(self.dtype or query.dtype) for tensor in (*primals, *duals)]
        o, do = attention_jvp(*inputs, mask=attn_mask, scale=scale, kernels=self.kernels)
        return forward_ad.make_dual(o.to(query.dtype), do.to(query.dtype))


def _expand(mask: Tensor, shape: tuple[int, int, int, int]) -> Tensor:
    """A boolean mask as a view [B, H, M, N] without copies."""
    if mask.dtype != torch.bool:
        raise ValueError(f"attention_jvp: the mask must be bool, True where a key takes part, not {mask.dtype}")
    if mask.ndim == 2 and mask.shape == (shape[0], shape[3]):
        mask = mask[:, None, None, :]
    return mask.expand(shape)


@torch.library.custom_op("vidaccel::attention_jvp", mutates_args=())
@on_its_device
def _fused(
    q: Tensor, k: Tensor, v: Tensor, dq: Tensor, dk: Tensor, dv: Tensor, mask: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    from vidaccel.kernels.attention_jvp import fused

    return fused.attention_jvp(q, k, v, dq, dk, dv, mask, scale)


@_fused.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, dq: Tensor, dk: Tensor, dv: Tensor, mask: Tensor | None, scale: float):
    return torch.empty_like(q), torch.empty_like(q)
