"""Attention and its forward derivative in plain torch: the definition that the fused kernel is tested against.

B batch, H heads, M queries, N keys, D head dim. Memory is quadratic: B H M N scores, twice.
"""

import torch
from torch import Tensor


def attention_jvp(
    q: Tensor, k: Tensor, v: Tensor, dq: Tensor, dk: Tensor, dv: Tensor, mask: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """q, dq [B, H, M, D], k, v, dk, dv [B, H, N, D], mask bool, broadcastable to [B, H, M, N] -> o, do [B, H, M, D].

    With S = scale q k' and P = softmax(S): o = P v, and since dP = P o (dS - rowsum(P o dS)), do = dP v + P dv.
    A row whose keys are all masked yields zero, and a zero tangent.
    """
    scores = scale * q @ k.mT
    dscores = scale * (dq @ k.mT + q @ dk.mT)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    weights = scores.softmax(-1).nan_to_num(0.0)
    dweights = weights * (dscores - (weights * dscores).sum(-1, keepdim=True))
    return weights @ v, dweights @ v + weights @ dv
