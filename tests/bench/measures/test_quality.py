"""Likeness to the baseline's videos, with a stand-in for the package that is not installed here."""

import sys
from importlib.machinery import ModuleSpec
from types import ModuleType

import numpy as np
import pytest
from torch import nn

from vidaccel.bench.measures import quality
from vidaccel.bench.measures.quality import mean_change, perceptual_distance, perceptual_network
from vidaccel.errors import UserError

BLACK, WHITE = (np.full((2, 8, 8, 3), level, dtype=np.uint8) for level in (0, 255))


class Distance(nn.Module):
    """Takes what lpips.LPIPS takes, [N, 3, H, W] in [-1, 1], and gives [N, 1, 1, 1] as it does."""

    def __init__(self, net: str, verbose: bool):
        super().__init__()

    def forward(self, pixels, wanted):
        assert pixels.shape == (2, 3, 8, 8) and pixels.abs().max() <= 1
        return (pixels - wanted).square().mean((1, 2, 3), keepdim=True)


@pytest.fixture
def package(monkeypatch):
    module = ModuleType("lpips")
    module.__spec__, module.LPIPS = ModuleSpec("lpips", None), Distance
    monkeypatch.setitem(sys.modules, "lpips", module)
    perceptual_network.cache_clear()
    yield module
    perceptual_network.cache_clear()


def test_lpips_where_it_is_installed(package):
    assert perceptual_distance(BLACK, BLACK) == 0
    assert perceptual_distance(BLACK, WHITE) == 4  # from -1 to 1


def test_no_lpips_where_it_is_not(monkeypatch):
    monkeypatch.setattr(quality.importlib.util, "find_spec", lambda name: None)
    perceptual_network.cache_clear()
    assert perceptual_distance(BLACK, WHITE) is None


def test_lpips_without_its_weights_is_refused(package):
    def offline(**settings):
        raise OSError("no network")

    package.LPIPS = offline
    with pytest.raises(UserError, match="LPIPS cannot get its weights: no network"):
        perceptual_network()


def test_mean_change():
    video = np.stack([BLACK[0], WHITE[0], WHITE[0]])
    assert mean_change(video) == 255 / 2
    assert mean_change(video[:1]) == 0
