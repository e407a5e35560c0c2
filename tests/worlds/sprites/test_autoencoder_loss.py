"""The autoencoder's loss on stand-ins whose answer is worked out by hand."""

from types import SimpleNamespace

import pytest
import torch

from vidaccel.config.training import TrainConfig
from vidaccel.train.trainer import train
from vidaccel.worlds.sprites.autoencoder_loss import autoencoder_loss
from vidaccel.worlds.sprites.pipeline import INITIAL_LOG_VARIANCE, build_autoencoder
from vidaccel.worlds.sprites.settings import AutoencoderTraining


def stand_in(mean: float, log_variance: float, output: torch.Tensor) -> SimpleNamespace:
    """A model whose posterior and reconstruction do not depend on its input."""
    moments = torch.cat([torch.full((1, 2, 1, 2, 2), mean), torch.full((1, 2, 1, 2, 2), log_variance)], dim=1)

    def same(x):
        return x

    return SimpleNamespace(encoder=lambda v: moments, quant_conv=same, post_quant_conv=same, decoder=lambda z: output)


def test_perfect_reconstruction_from_the_prior_costs_nothing():
    video = torch.rand(1, 3, 1, 8, 8)
    loss, metrics = autoencoder_loss(stand_in(0.0, 0.0, video), video, AutoencoderTraining(), torch.Generator())
    assert loss.item() == pytest.approx(0.0, abs=1e-7)
    assert metrics["kl"] == pytest.approx(0.0, abs=1e-7)


def test_each_term_by_hand():
    """Off by 0.5 everywhere: squared 0.25, absolute 0.5, no edge differs; KL of N(1, e^-2): (1 + e^-2 - 1 + 2) / 2.
    The clip's variance of 0.18 makes its errors count 0.1 / (0.18 + 0.02) times."""
    video = torch.tensor([-1.0, 1.0]).mul(0.18**0.5).repeat(96).view(1, 3, 1, 8, 8)
    config = AutoencoderTraining(l1_weight=0.1, gradient_weight=1.0, kl_weight=0.01)
    loss, metrics = autoencoder_loss(stand_in(1.0, -2.0, video + 0.5), video, config, torch.Generator())
    kl = (1 + torch.exp(torch.tensor(-2.0)) - 1 + 2).item() / 2
    assert metrics["kl"] == pytest.approx(kl, rel=1e-5)
    assert metrics["psnr_db"] == pytest.approx(12.041, abs=1e-3)  # 10 log10(4 / 0.25)
    assert loss.item() == pytest.approx(0.5 * (0.25 + 0.1 * 0.5) + 0.01 * kl, rel=1e-5)


def test_little_contrast_weighs_more():
    """The same relative error of a faint clip and of a strong one."""
    config = AutoencoderTraining(l1_weight=0.0, kl_weight=0.0)
    strong = torch.randn(1, 3, 1, 8, 8)
    strong = (strong - strong.mean()) / strong.std(correction=0)

    def loss(video: torch.Tensor) -> float:
        return autoencoder_loss(stand_in(0.0, 0.0, 0.9 * video), video, config, torch.Generator())[0].item()

    assert loss(0.1 * strong) / loss(strong) == pytest.approx(0.01 * (1.0 + 0.02) / (0.01 + 0.02), rel=1e-4)


def test_the_posterior_starts_narrow():
    model = build_autoencoder(AutoencoderTraining(block_out_channels=[4, 4, 4, 4]))
    posterior = model.encode(torch.rand(1, 3, 5, 32, 32) * 2 - 1).latent_dist
    torch.testing.assert_close(posterior.logvar, torch.full_like(posterior.logvar, INITIAL_LOG_VARIANCE))


def test_training_lowers_the_loss(tmp_path):
    torch.manual_seed(0)
    model = build_autoencoder(AutoencoderTraining(block_out_channels=[4, 4, 4, 4]))
    video = torch.zeros(2, 3, 1, 16, 16) + torch.tensor([-0.5, 0.5]).view(2, 1, 1, 1, 1)
    seen = []

    def loss(model, index, generator):
        value, metrics = autoencoder_loss(model, video, AutoencoderTraining(), generator)
        seen.append(value.item())
        return value, metrics

    train(model, loss, TrainConfig(steps=40, learning_rate=3e-3, warmup=5), tmp_path, seed=0, title="test", settings={})
    assert min(seen[-5:]) < 0.5 * seen[0]
