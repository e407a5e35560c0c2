"""How far frames are from the teacher's: errors of pixels, of differences in space and in time, and LPIPS.

B batch, C colours, T frames, H and W pixels
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from vidaccel.train.methods.decoder import DecoderTraining

Perceptual = Callable[[Tensor, Tensor], Tensor]
"""Images [N, 3, H, W] in [-1, 1], twice -> distances [N]."""


def decoder_loss(
    frames: Tensor, target: Tensor, settings: DecoderTraining, perceptual: Perceptual | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss [] of frames against the teacher's, both [B, C, T, H, W] in [-1, 1], and metrics [].

    mean |e| + space (mean |d_x e| + mean |d_y e|) + time mean |d_t e| + lpips x LPIPS, e the error and d its
    differences between neighbours; squares in place of |.| for `l2`.
    """
    error = frames.float() - target.float()
    size = Tensor.abs if settings.error == "l1" else Tensor.square
    pixels = size(error).mean()
    loss = pixels
    if settings.space:
        loss = loss + settings.space * sum(_changes(error, axis, size) for axis in (-1, -2))
    if settings.time:
        loss = loss + settings.time * _changes(error, 2, size)
    metrics = {settings.error: pixels.detach(), "psnr_db": psnr(error.detach())}
    if perceptual is not None:
        distance = perceptual(_images(frames), _images(target)).mean()
        loss, metrics = loss + settings.lpips * distance, metrics | {"lpips": distance.detach()}
    return loss, metrics


def psnr(error: Tensor) -> Tensor:
    """In dB [], of errors of frames in [-1, 1]."""
    return 10 * torch.log10(4 / error.square().mean().clamp(min=1e-12))


def perceptual_loss(settings: DecoderTraining, device: torch.device) -> Perceptual | None:
    """LPIPS with gradients, where the settings give it a weight.

    Raises:
        UserError: it is not installed.
    """
    if not settings.lpips:
        return None
    from vidaccel.errors import UserError

    try:
        import lpips
    except ImportError as error:
        raise UserError(
            f"decoder.lpips={settings.lpips:g}, and LPIPS is not installed", 'pip install "vidaccel[lpips]"'
        ) from error
    network: Any = lpips.LPIPS(net="alex", verbose=False).to(device).requires_grad_(False).eval()
    return lambda ours, theirs: network(ours, theirs).flatten()


def _changes(error: Tensor, axis: int, size: Callable[[Tensor], Tensor]) -> Tensor:
    """Mean size [] of differences between neighbours; 0 where there are none."""
    changes = error.diff(dim=axis)
    return size(changes).mean() if changes.numel() else error.new_zeros(())


def _images(frames: Tensor) -> Tensor:
    return frames.float().movedim(1, 2).flatten(0, 1)
