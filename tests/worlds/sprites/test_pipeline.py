"""The sprites model's parts before training."""

import pytest
import torch

from vidaccel.worlds.sprites.pipeline import build_autoencoder, build_transformer, deepen, inflate, whiten
from vidaccel.worlds.sprites.settings import AutoencoderTraining, TeacherTraining


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


@torch.no_grad()
def test_whitened_latents_weigh_alike_and_decode_to_the_same_pictures():
    model, clips = tiny_autoencoder(), torch.rand(8, 3, 5, 32, 32) * 2 - 1
    clips[:, :, :, :16] = torch.tensor([-1.0, 0.0, 1.0, 0.5]).repeat(2).view(-1, 1, 1, 1, 1)
    latents = model.encode(clips).latent_dist.mean
    decoded = model.decode(latents).sample
    before = torch.linalg.eigvalsh(covariance(latents))
    whiten(model, latents, noise=0.1)
    posterior = model.encode(clips).latent_dist
    torch.testing.assert_close(model.decode(posterior.mean).sample, decoded, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(posterior.std, torch.full_like(posterior.std, 0.1))

    share = before / before.mean()
    expected = share / (share + 0.1**2)
    after = torch.linalg.eigvalsh(covariance(posterior.mean))
    torch.testing.assert_close(after, expected / expected.mean(), atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(posterior.mean.mean((0, 2, 3, 4)), torch.zeros(16), atol=1e-4, rtol=0)


def covariance(latents: torch.Tensor) -> torch.Tensor:
    return torch.cov(latents.movedim(1, 0).flatten(1).double()).float()


def test_the_transformer_keeps_the_ratios_of_the_big_ones():
    """Many thin blocks: one single-stream block is under 4 % of the parameters."""
    model = build_transformer(TeacherTraining(), 16, 64)
    of_all = sum(p.numel() for p in model.parameters())
    of_block = sum(p.numel() for p in model.single_transformer_blocks[0].parameters())
    assert of_block / of_all < 0.04
    assert sum(model.config.rope_axes_dim) == model.config.attention_head_dim


def small_transformer(double_blocks: int, single_blocks: int, seed: int = 0):
    torch.manual_seed(seed)
    config = TeacherTraining(heads=2, head_dim=16, double_blocks=double_blocks, single_blocks=single_blocks)
    return build_transformer(config, 4, 8)


def forward(model):
    generator = torch.Generator().manual_seed(0)
    latent, text = torch.randn(2, 4, 2, 4, 4, generator=generator), torch.randn(2, 5, 8, generator=generator)
    mask = torch.ones(2, 5, dtype=torch.long)
    return model(latent, torch.tensor([100.0, 900.0]), text, mask, text[:, 0], return_dict=False)[0]


def test_a_deepened_transformer_is_the_same_function_and_every_block_of_it_learns():
    shallow, deep = small_transformer(1, 2), small_transformer(3, 4, seed=1)
    deepen(shallow, deep)
    torch.testing.assert_close(forward(deep), forward(shallow))
    forward(deep).square().mean().backward()
    for block in (*deep.transformer_blocks, *deep.single_transformer_blocks):
        norms = (block.norm,) if hasattr(block, "norm") else (block.norm1, block.norm1_context)
        assert all(norm.linear.weight.grad.abs().max() > 0 for norm in norms)


def test_blocks_that_cannot_be_shared_out_are_refused():
    with pytest.raises(ValueError, match="no multiple of 2"):
        deepen(small_transformer(1, 2), small_transformer(1, 3))
