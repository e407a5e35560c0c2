"""RMS norm of queries and keys, and rotary embedding of the video's, as one op that leaves them ready for attention.

Where a gradient is asked for, the plain PyTorch of reference.py runs, forward and backward, under kernels=fused too: a
backward kernel was slower than `torch.compile`. Forward-mode derivatives are with respect to queries and keys, and
have no gradient.
"""

import torch
from torch import Tensor

from vidaccel.kernels import select, tangents
from vidaccel.kernels.checks import check_shape, check_tensors, dense_rows, on_its_device
from vidaccel.kernels.qk_norm_rope import reference


def qk_norm_rope(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    text: tuple[Tensor, Tensor, Tensor, Tensor] | None = None,
    eps: float = 1e-6,
    kernels: str = "auto",
) -> tuple[Tensor, Tensor]:
    """q, k [B, N, H, D], cos, sin [R, D], R <= N -> q, k [B, N + L, H, D]: normed, and the first R tokens rotated.

    q_weight, k_weight: [D] to norm each head by itself, [H D] to norm all heads together. text: (q, k, q_weight,
    k_weight) of L text tokens with weights of their own, which follow the video's and are not rotated; text that shares
    the video's weights is simply part of q and k. Pairs are (2i, 2i + 1), and cos and sin hold each pair's angle at
    both of its places, as diffusers' `get_1d_rotary_pos_embed` writes them.
    """
    _check(q, k, q_weight, k_weight, cos, sin, text)
    if select.choose(kernels, q.device) == "reference":
        return reference.qk_norm_rope(q, k, q_weight, k_weight, cos, sin, text, eps)
    check_tensors("qk_norm_rope", q, k, q_weight, k_weight, cos, sin, *(text or ()))
    tangents.refuse("qk_norm_rope", q_weight=q_weight, k_weight=k_weight, cos=cos, sin=sin)
    primals, duals = tangents.split(q, k, *(text or ())[:2])
    if duals is not None:
        weights = [q_weight, k_weight, *(text or ())[2:]]
        q, k, dq, dk = _tangent(list(primals), list(duals), weights, cos, sin, eps)
        return tangents.join(q, dq), tangents.join(k, dk)
    if select.asks_gradient(q, k, q_weight, k_weight, cos, sin, *(text or ())):
        return reference.qk_norm_rope(q, k, q_weight, k_weight, cos, sin, text, eps)
    return _forward(q, k, q_weight, k_weight, cos, sin, *(text or (None,) * 4), eps)


def _check(q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor, text) -> None:
    op = "qk_norm_rope"
    if q.ndim != 4 or q.shape[-1] % 2:
        raise ValueError(f"{op}: q must be [B, N, H, D] with D even, got shape {tuple(q.shape)}")
    B, N, H, D = q.shape
    check_shape(op, "k", k, q.shape)
    if q_weight.shape not in ((D,), (H * D,)):
        raise ValueError(f"{op}: q_weight has shape {tuple(q_weight.shape)}, expected {(D,)} or {(H * D,)}")
    check_shape(op, "k_weight", k_weight, q_weight.shape)
    if len(cos) > N:
        raise ValueError(f"{op}: cos turns {len(cos)} tokens, but q has {N}")
    check_shape(op, "cos", cos, (len(cos), D))
    check_shape(op, "sin", sin, cos.shape)
    if text is not None:
        for name, tensor in zip(("text q", "text k"), text[:2], strict=True):
            check_shape(op, name, tensor, (B, text[0].shape[1], H, D))
        for name, weight in zip(("text q_weight", "text k_weight"), text[2:], strict=True):
            check_shape(op, name, weight, q_weight.shape)


@torch.library.custom_op("vidaccel::qk_norm_rope", mutates_args=())
@on_its_device
def _forward(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    text_q: Tensor | None,
    text_k: Tensor | None,
    text_q_weight: Tensor | None,
    text_k_weight: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor]:
    from vidaccel.kernels.qk_norm_rope import fused

    streams = [(dense_rows(q), dense_rows(k), q_weight, k_weight)]
    if text_q is not None:
        streams.append((dense_rows(text_q), dense_rows(text_k), text_q_weight, text_k_weight))
    return fused.forward(streams, cos.contiguous(), sin.contiguous(), eps)


@_forward.register_fake
def _(q, k, q_weight, k_weight, cos, sin, text_q, text_k, text_q_weight, text_k_weight, eps):
    B, N, H, D = q.shape
    tokens = N if text_q is None else N + text_q.shape[1]
    return q.new_empty(B, tokens, H, D), k.new_empty(B, tokens, H, D)


@torch.library.custom_op("vidaccel::qk_norm_rope_tangent", mutates_args=())
@on_its_device
def _tangent(
    primals: list[Tensor],
    duals: list[Tensor],
    weights: list[Tensor],
    cos: Tensor,
    sin: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from vidaccel.kernels.qk_norm_rope import fused

    primals, duals = [dense_rows(x) for x in primals], [dense_rows(x) for x in duals]
    streams = [(*primals[i : i + 2], *duals[i : i + 2], *weights[i : i + 2]) for i in range(0, len(primals), 2)]
    return fused.tangent(streams, cos.contiguous(), sin.contiguous(), eps)
