"""Loss of a video autoencoder: errors of pixels and of their spatial differences, and a Kullback-Leibler term.

The error is mostly squared: under L1 alone a network that is not yet sure where an object is does best by leaving it
out, and training stalls there.
"""

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
    squared, absolute = F.mse_loss(restored, video), F.l1_loss(restored, video)
    edges = sum(F.mse_loss(restored.diff(dim=d), video.diff(dim=d)) for d in (-1, -2))
    kl = 0.5 * (posterior.mean.square() + posterior.var - 1 - posterior.logvar).mean()
    loss = squared + config.l1_weight * absolute + config.gradient_weight * edges + config.kl_weight * kl
    psnr = 10 * torch.log10(4 / squared.detach())
    return loss, {"l1": absolute.item(), "kl": kl.item(), "psnr_db": psnr.item()}
