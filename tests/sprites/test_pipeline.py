"""The sprites model's parts before training."""

import torch

from vidaccel.config import AutoencoderTraining, TeacherTraining
from vidaccel.sprites.pipeline import build_autoencoder, build_transformer, inflate


def tiny_autoencoder(seed: int = 0):
    torch.manual_seed(seed)
    return build_autoencoder(AutoencoderTraining(block_out_channels=[4, 4, 8, 8])).eval()


@torch.no_grad()
def test_inflating_changes_no_picture():
    """On one frame, repeated as its own past, only the sum of the time taps counts."""
    model, picture = tiny_autoencoder(), torch.rand(2, 3, 1, 32, 32) * 2 - 1
    latent = model.encode(picture).latent_dist.mean
    decoded = model.decode(latent).sample
    inflate(model)
    torch.testing.assert_close(model.encode(picture).latent_dist.mean, latent, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(model.decode(latent).sample, decoded, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_an_inflated_convolution_looks_at_the_present_alone():
    model = tiny_autoencoder()
    inflate(model)
    clip = torch.rand(1, 3, 5, 32, 32)
    other_past = torch.cat([torch.rand(1, 3, 4, 32, 32), clip[:, :, -1:]], dim=2)
    convolution = model.encoder.conv_in
    torch.testing.assert_close(convolution(clip)[:, :, -1], convolution(other_past)[:, :, -1])


def test_the_transformer_keeps_the_ratios_of_the_big_ones():
    """Many thin blocks: one single-stream block is under 4 % of the parameters."""
    model = build_transformer(TeacherTraining(), 16, 64)
    of_all = sum(p.numel() for p in model.parameters())
    of_block = sum(p.numel() for p in model.single_transformer_blocks[0].parameters())
    assert of_block / of_all < 0.04
    assert sum(model.config.rope_axes_dim) == model.config.attention_head_dim
