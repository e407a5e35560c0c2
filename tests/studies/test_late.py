"""When a difference between clips is settled: the closed form, and pairs that differ in one thing."""

import random
from statistics import NormalDist
from types import SimpleNamespace

import pytest
import torch
from typer.testing import CliRunner

from studies import late
from vidaccel.worlds.sprites.pipeline import build_autoencoder
from vidaccel.worlds.sprites.settings import AutoencoderTraining


@pytest.mark.parametrize(("d", "t"), [(42.1, 0.94), (27.4, 0.91), (9.8, 0.79), (2.4, 0.48), (3.4, 0.57), (1.5, 0.37)])
def test_times_of_known_distances(d, t):
    assert late.told_apart_at(d) == pytest.approx(t, abs=0.006)


def test_equal_clips_are_never_told_apart():
    assert late.told_apart_at(0.0) == 0.0
    assert late.told_apart_at(5.0, right=0.99) < late.told_apart_at(5.0) < late.told_apart_at(6.0)


@pytest.mark.parametrize(("d", "right"), [(1.5, 0.9), (9.8, 0.9), (9.8, 0.75)])
def test_the_best_classifier_is_right_that_often_at_that_time(d, right):
    """The likelihood ratio of Gaussian noise picks the nearer of the two clips."""
    generator = torch.Generator().manual_seed(0)
    one, other = torch.randn(2, 20, generator=generator)
    other = one + d * (other - one) / (other - one).norm()
    t, count = late.told_apart_at(d, right), 40_000
    x = (1 - t) * one + t * torch.randn(count, 20, generator=generator)
    nearer = (x - (1 - t) * one).norm(dim=1) < (x - (1 - t) * other).norm(dim=1)
    assert float(nearer.float().mean()) == pytest.approx(right, abs=0.006)
    assert NormalDist().cdf((1 - t) * d / (2 * t)) == pytest.approx(right)


@pytest.mark.parametrize("name", late.DIFFERENCES)
def test_pairs_differ_and_stay_within_pixels(name):
    one, other = late.DIFFERENCES[name](random.Random(0))
    assert one.shape == other.shape == (3, 17, 64, 64)
    assert not torch.equal(one, other) and max(one.abs().max(), other.abs().max()) <= 1
    assert torch.equal(one, late.DIFFERENCES[name](random.Random(0))[0])


def test_a_cell_of_one_latent_frame_is_four_frames_of_eight_pixels():
    one, other = late.cell(0.4, False, random.Random(3))
    where = (one != other).any(0).nonzero()
    low, high = where.amin(0).tolist(), where.amax(0).tolist()
    assert low[0] % 4 == 1 and [last - first + 1 for first, last in zip(low, high, strict=True)] == [4, 8, 8]


def test_every_difference_is_measured_of_any_autoencoder(tmp_path, monkeypatch):
    monkeypatch.setattr(late, "DIFFERENCES", {name: late.DIFFERENCES[name] for name in list(late.DIFFERENCES)[:2]})
    build_autoencoder(AutoencoderTraining(block_out_channels=[4, 4, 4, 4])).save_pretrained(tmp_path / "own")
    words = [str(tmp_path / "own"), "--pairs", "2", "--scenes", "2", "-o", str(tmp_path / "late.json")]
    told = CliRunner().invoke(late.app, words)
    assert told.exit_code == 0, told.output
    assert (tmp_path / "late.json").exists() and told.output.count("\n") == 5
    rows = late.measured(late.open_autoencoder(str(tmp_path / "own")), 2, 0)
    assert all(row.t == late.told_apart_at(row.d) and row.quartiles[0] <= row.d for row in rows.values())


def test_a_folder_without_an_autoencoder_is_named(tmp_path):
    told = CliRunner().invoke(late.app, [str(tmp_path)])
    assert told.exit_code == 2 and "has no autoencoder" in told.output


class Half(torch.nn.Module):
    """An autoencoder that gives back part of a clip."""

    def __init__(self, share: float):
        super().__init__()
        self.share = share

    def forward(self, clips):
        return SimpleNamespace(sample=self.share * clips)


def test_what_comes_back_of_lamps():
    whole, half = (late.through(Half(share), 4, 0) for share in (1.0, 0.5))
    assert (whole.pattern, half.pattern) == (pytest.approx(1), pytest.approx(0.5))
    assert whole.lamps > 90 and whole.total > 95 and half.lamps < 50
