"""Flow matching of the velocity v = eps - x_0 along x_t = (1 - t) x_0 + t eps (method.md's notation), and what is drawn
at random for it and for distillation: times and guidance scales.

B samples, C channels, T frames, H and W latent pixels.
"""

from collections.abc import Callable

import torch
from torch.nn import functional as F

from vidaccel.models.velocity import per_sample


def sample_times(
    count: int, shift: float, generator: torch.Generator, distribution: str = "logit_normal"
) -> torch.Tensor:
    """[count] times in [0, 1): `uniform` or `logit_normal`, then moved towards noise by s t / (1 + (s - 1) t)."""
    uniform = distribution == "uniform"
    given = {"generator": generator, "device": generator.device}
    t = torch.rand(count, **given) if uniform else torch.randn(count, **given).sigmoid()
    return shift * t / (1 + (shift - 1) * t)


def sample_guidance(count: int, low: float, high: float, generator: torch.Generator) -> torch.Tensor:
    """[count] guidance scales, uniform in [low, high]."""
    return low + (high - low) * torch.rand(count, generator=generator, device=generator.device)


def noised(x_0: torch.Tensor, eps: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """x_t = (1 - t) x_0 + t eps of clean latents and noise [B, C, T, H, W], at t [B]."""
    at = per_sample(t, x_0)
    return (1 - at) * x_0 + at * eps


def flow_matching_loss(
    velocity: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    x_0: torch.Tensor,
    shift: float,
    generator: torch.Generator,
) -> torch.Tensor:
    """Mean squared error of the model's velocity at random times.

    Args:
        velocity: (x_t [B, C, T, H, W], t [B] in [0, 1]) -> [B, C, T, H, W].
        x_0: clean latents [B, C, T, H, W].
    """
    t = sample_times(len(x_0), shift, generator).to(x_0)
    eps = torch.randn(x_0.shape, generator=generator, device=generator.device).to(x_0)
    return F.mse_loss(velocity(noised(x_0, eps, t), t).float(), eps - x_0)
