"""The predictor's first layer in plain torch: the definition that the fused kernel is tested against."""

import torch
import torch.nn.functional as F
from torch import Tensor


def cache_fusion(tokens: Tensor, cache: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """SiLU(Linear(concat[tokens, cache])): tokens, cache [..., K], weight [D, 2 K], bias [D] -> [..., D]."""
    return F.silu(F.linear(torch.cat([tokens, cache], dim=-1), weight, bias))
