"""The loss of a distilled decoder in closed form."""

import math

import pytest
import torch

from vidaccel.errors import UserError
from vidaccel.train.methods.decoder import DecoderTraining
from vidaccel.train.methods.decoder.loss import decoder_loss, psnr

RAMP = torch.arange(4.0).view(1, 1, 1, 1, 4).expand(1, 3, 2, 5, 4)
"""An error that rises by 1 along x alone: mean 1.5, mean square 3.5."""


@pytest.mark.parametrize(("error", "pixels"), [("l1", 1.5), ("l2", 3.5)])
def test_a_ramp(error, pixels):
    target = torch.zeros_like(RAMP)
    settings = DecoderTraining(error=error, space=0.5, time=10.0)
    loss, metrics = decoder_loss(RAMP, target, settings)
    assert float(loss) == pytest.approx(pixels + 0.5)  # every difference along x is 1; none along y and in time
    assert float(metrics[error]) == pytest.approx(pixels)
    assert float(metrics["psnr_db"]) == pytest.approx(10 * math.log10(4 / 3.5))


def test_a_flicker_counts_in_time_alone():
    error = torch.tensor([1.0, -1.0, 1.0]).view(1, 1, 3, 1, 1).expand(2, 3, 3, 4, 4)
    loss, _ = decoder_loss(error, torch.zeros_like(error), DecoderTraining(error="l1", space=7.0, time=0.25))
    assert float(loss) == pytest.approx(1 + 0.25 * 2)


def test_one_frame_has_no_difference_in_time_and_equal_frames_no_loss():
    frame = torch.rand(1, 3, 1, 4, 4)
    loss, metrics = decoder_loss(frame, frame, DecoderTraining())
    assert float(loss) == 0 and float(metrics["psnr_db"]) > 100
    assert float(psnr(torch.full((2,), 0.2))) == pytest.approx(20)


def test_what_stands_for_lpips_sees_every_frame_and_is_weighted():
    seen = []

    def distance(ours, theirs):
        seen.append((ours.shape, theirs.shape))
        return (ours - theirs).flatten(1).mean(1)

    frames = torch.ones(2, 3, 5, 4, 6)
    settings = DecoderTraining(space=0.0, time=0.0, lpips=3.0)
    loss, metrics = decoder_loss(frames, torch.zeros_like(frames), settings, distance)
    assert seen == [((10, 3, 4, 6),) * 2] and float(loss) == 4 and float(metrics["lpips"]) == 1


@pytest.mark.parametrize(
    "wrong", [{"width": 0.0}, {"width": 1.5}, {"widths": []}, {"error": "huber"}, {"crop": [1, 2]}, {"noise": -1.0}]
)
def test_settings_that_mean_nothing_are_refused(wrong):
    with pytest.raises(UserError):
        DecoderTraining(**wrong)
