"""adaLN in plain torch: the definition that the fused kernel is tested against."""

import torch
import torch.nn.functional as F
from torch import Tensor


def adaln(x: Tensor, scale: Tensor, shift: Tensor, eps: float = 1e-6) -> Tensor:
    """Layer norm of x [B, N, D] without affine part, times 1 + scale [B, D], plus shift [B, D], at least in float32.

    Adaptive layer norm of DiT, "Scalable Diffusion Models with Transformers", arXiv 2212.09748, figure 3.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    normed = F.layer_norm(x.to(wide), x.shape[-1:], eps=eps)
    return (normed * (1 + scale.to(wide)[:, None]) + shift.to(wide)[:, None]).to(x.dtype)
