"""Classifier-free guidance distilled into one pass (method.md, section 1).

The student learns the two-pass velocity v_g = v_uncond + g (v_cond - v_uncond) for g drawn uniformly from a range, told
which g by an embedding, so that the scale is still chosen when a video is made.

B batch, C channels, T frames, H and W latent pixels
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from vidaccel.models.velocity import Text, Velocity, guided_velocity


def sample_guidance(count: int, low: float, high: float, generator: torch.Generator) -> Tensor:
    """[count] scales, uniform in [low, high]."""
    return low + (high - low) * torch.rand(count, generator=generator)


def cfg_loss(student: Velocity, teacher: Velocity, x: Tensor, t: Tensor, g: Tensor, text: Text, empty: Text) -> Tensor:
    """Mean squared error to the teacher's two-pass velocity at x [B, C, T, H, W], t [B], g [B]."""
    with torch.no_grad():
        target = guided_velocity(teacher, x, t, text, empty, g)
    return F.mse_loss(student(x, t, text, g=g).float(), target.float())
