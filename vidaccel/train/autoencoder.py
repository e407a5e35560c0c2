"""Loss of a video autoencoder: L1 on pixels and on their spatial differences, and a small Kullback-Leibler term."""

import torch
from diffusers import AutoencoderKLHunyuanVideo
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from torch.nn import functional as F

from vidaccel.config import AutoencoderTraining


def autoencoder_loss(
    model: AutoencoderKLHunyuanVideo, video: torch.Tensor, config: AutoencoderTraining, generator: torch.Generator
) -> tuple[torch.Tensor, dict[str, float]]:
    """Loss of reconstructing `video` [B, C, T, H, W] in [-1, 1] from a sample of its posterior.

    The network is called without the tiling in time that `encode` and `decode` apply to more than 16 frames: it blends
    in place, which has no gradient. The Kullback-Leibler term is the mean over latent elements of
    0.5 (mu^2 + sigma^2 - 1 - log sigma^2).
    """
    posterior = DiagonalGaussianDistribution(model.quant_conv(model.encoder(video)))
    noise = torch.randn(posterior.mean.shape, generator=generator).to(video)
    restored = model.decoder(model.post_quant_conv(posterior.mean + posterior.std * noise))
    pixels = F.l1_loss(restored, video)
    edges = sum(F.l1_loss(restored.diff(dim=d), video.diff(dim=d)) for d in (-1, -2))
    kl = 0.5 * (posterior.mean.square() + posterior.var - 1 - posterior.logvar).mean()
    loss = pixels + config.gradient_weight * edges + config.kl_weight * kl
    psnr = 10 * torch.log10(4 / F.mse_loss(restored.detach(), video))
    return loss, {"l1": pixels.item(), "kl": kl.item(), "psnr_db": psnr.item()}
