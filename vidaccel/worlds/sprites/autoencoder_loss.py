"""Loss of a video autoencoder: errors of pixels and of their spatial differences, and a Kullback-Leibler term.

The error is mostly squared: under L1 alone a network that is not yet sure where an object is does best by leaving it
out, and training stalls there. A clip of little contrast, such as colours on gray, weighs more: the same distortion
makes small errors there, and without that its shapes stay blurred.
"""

import torch
from diffusers import AutoencoderKLHunyuanVideo
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

from vidaccel.worlds.sprites.settings import AutoencoderTraining

CONTRAST, LEAST_CONTRAST = 0.1, 0.02
"""Variance of a clip's pixels at which its errors count once, and what is added to that of each clip."""


def autoencoder_loss(
    model: AutoencoderKLHunyuanVideo, video: torch.Tensor, config: AutoencoderTraining, generator: torch.Generator
) -> tuple[torch.Tensor, dict[str, float]]:
    """Loss of reconstructing `video` [B, C, T, H, W] in [-1, 1] from a sample of its posterior.

    The network is called without the tiling in time that `encode` and `decode` apply to more than 16 frames: it blends
    in place, which has no gradient. The Kullback-Leibler term is the mean over latent elements of
    0.5 (mu^2 + sigma^2 - 1 - log sigma^2). A clip's errors are weighted by CONTRAST / (variance + LEAST_CONTRAST).
    """
    posterior = DiagonalGaussianDistribution(model.quant_conv(model.encoder(video)))
    noise = torch.randn(posterior.mean.shape, generator=generator).to(video)
    restored = model.decoder(model.post_quant_conv(posterior.mean + posterior.std * noise))
    error = restored - video
    edges = sum(error.diff(dim=d).square().flatten(1).mean(1) for d in (-1, -2))
    squared, absolute = error.square().flatten(1).mean(1), error.abs().flatten(1).mean(1)
    weight = CONTRAST / (video.flatten(1).var(1, correction=0) + LEAST_CONTRAST)
    errors = weight * (squared + config.l1_weight * absolute + config.gradient_weight * edges)
    kl = 0.5 * (posterior.mean.square() + posterior.var - 1 - posterior.logvar).mean()
    psnr = 10 * torch.log10(4 / squared.detach().mean())
    metrics = {"l1": absolute.detach().mean().item(), "kl": kl.item(), "psnr_db": psnr.item()}
    return errors.mean() + config.kl_weight * kl, metrics
