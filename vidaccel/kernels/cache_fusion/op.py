"""The predictor's first layer as one op: SiLU(Linear(2K, D)) of tokens and cache side by side.

Gradients with respect to all four tensors, by torch's own matrix products; no forward-mode derivative, because the
predictor is trained without one.
"""

import torch
from torch import Tensor

from vidaccel.kernels import select, tangents
from vidaccel.kernels.cache_fusion import reference
from vidaccel.kernels.checks import check_shape, check_tensors, dense_rows, on_its_device


def cache_fusion(tokens: Tensor, cache: Tensor, weight: Tensor, bias: Tensor, *, kernels: str = "auto") -> Tensor:
    """tokens, cache [B, N, K], weight [D, 2 K], bias [D], all of one type -> SiLU(weight [tokens; cache] + bias)."""
    if tokens.ndim != 3:
        raise ValueError(f"cache_fusion: tokens must be [B, N, K], got shape {tuple(tokens.shape)}")
    check_shape("cache_fusion", "cache", cache, tokens.shape)
    check_shape("cache_fusion", "weight", weight, (len(bias), 2 * tokens.shape[-1]))
    check_shape("cache_fusion", "bias", bias, (len(bias),))
    if select.choose(kernels, tokens.device) == "reference":
        return reference.cache_fusion(tokens, cache, weight, bias)
    inputs = (tokens, cache, weight, bias)
    check_tensors("cache_fusion", *inputs)
    if len({tensor.dtype for tensor in inputs}) > 1:
        raise ValueError(f"cache_fusion: all tensors must have one type, got {[str(t.dtype) for t in inputs]}")
    tangents.refuse("cache_fusion", tokens=tokens, cache=cache, weight=weight, bias=bias)
    keep = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs)
    out, _ = _forward(tokens.flatten(0, 1), cache.flatten(0, 1), weight, bias, keep)
    return out.unflatten(0, tokens.shape[:2])


@torch.library.custom_op("vidaccel::cache_fusion", mutates_args=())
@on_its_device
def _forward(tokens: Tensor, cache: Tensor, weight: Tensor, bias: Tensor, keep: bool) -> tuple[Tensor, Tensor]:
    from vidaccel.kernels.cache_fusion import fused

    return fused.forward(dense_rows(tokens), dense_rows(cache), dense_rows(weight), bias.contiguous(), keep)


@_forward.register_fake
def _(tokens: Tensor, cache: Tensor, weight: Tensor, bias: Tensor, keep: bool) -> tuple[Tensor, Tensor]:
    out = tokens.new_empty(len(tokens), len(bias))
    return out, torch.empty_like(out) if keep else out.new_empty(0)


def _save(ctx, inputs, output) -> None:
    tokens, cache, weight, _, _ = inputs
    ctx.save_for_backward(tokens, cache, weight, output[1])


def _gradients(ctx, g: Tensor, _z):
    tokens, cache, weight, z = ctx.saved_tensors
    g = torch.ops.aten.silu_backward(g, z)
    left, right = weight.chunk(2, dim=1)
    for_tokens, for_cache, for_weight, for_bias, _ = ctx.needs_input_grad
    return (
        g @ left if for_tokens else None,
        g @ right if for_cache else None,
        torch.cat([g.mT @ tokens, g.mT @ cache], dim=1) if for_weight else None,
        g.sum(0) if for_bias else None,
        None,
    )


_forward.register_autograd(_gradients, setup_context=_save)
