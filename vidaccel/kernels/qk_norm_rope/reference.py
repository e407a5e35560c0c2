"""RMS norm of queries and keys and rotary embedding in plain torch: what the fused kernel is tested against."""

import torch
from torch import Tensor


def qk_norm_rope(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    text: tuple[Tensor, Tensor, Tensor, Tensor] | None = None,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    """q, k [B, N, H, D], cos, sin [R, D] with R <= N -> q, k [B, N + L, H, D]; L text tokens, from `text`, come last.

    The norm (arXiv 1910.07467) is over D with weights [D], or over all heads with weights [H D]. The first R tokens are
    rotated (arXiv 2104.09864) in pairs (2i, 2i + 1); cos and sin hold each pair's angle twice, at both of its places.
    """
    q, k = (_rotate(_norm(x, weight, eps), cos, sin).to(x.dtype) for x, weight in ((q, q_weight), (k, k_weight)))
    if text is None:
        return q, k
    text_q, text_k, text_q_weight, text_k_weight = text
    text_q, text_k = (_norm(x, w, eps).to(x.dtype) for x, w in ((text_q, text_q_weight), (text_k, text_k_weight)))
    return torch.cat([q, text_q], dim=1), torch.cat([k, text_k], dim=1)


def _norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    across_heads = weight.numel() != x.shape[-1]
    square = x.pow(2).mean((-2, -1) if across_heads else -1, keepdim=True)
    return x * torch.rsqrt(square + eps) * weight.to(x.dtype).view(-1, x.shape[-1])


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    turned, rest = x[:, : len(cos)], x[:, len(cos) :]
    quarter = torch.stack([-turned[..., 1::2], turned[..., 0::2]], dim=-1).flatten(-2)
    turned = turned * cos.to(x.dtype)[:, None] + quarter * sin.to(x.dtype)[:, None]
    return torch.cat([turned, rest], dim=1)
