"""A pipeline of two streams, video and sound, with further passes a step and a scheduler for each stream."""

import copy

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

import vidaccel
from tests.tiny import SIZE, tiny_pipeline
from vidaccel.models.watched import watched_steps

STEPS = 4
DISTILLED = [1, 0.99375, 0.725, 0.421875]
"""Some of the times of its distilled model, which no shift makes."""


def made(pipe, **more) -> tuple[torch.Tensor, torch.Tensor]:
    """Latents of video and of sound, by all passes that the pipeline makes: guidance of two kinds more than usual."""
    sampled = {"num_inference_steps": STEPS, "output_type": "latent", "max_sequence_length": 16, "frame_rate": 8}
    sampled |= {"generator": torch.Generator().manual_seed(0), "spatio_temporal_guidance_blocks": [1]}
    output = pipe("a red circle", **SIZE, **sampled | more)
    return output.frames, output.audio


@pytest.fixture(scope="module")
def pipe():
    return tiny_pipeline("ltx2")


def same(one: tuple, other: tuple) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_each_pass_of_a_step_is_predicted_from_its_own(pipe):
    plain = made(pipe)
    with vidaccel.attach(pipe, predictor="reuse", steps=STEPS, every=1) as attachment:
        assert same(made(pipe), plain)
    assert (attachment.full_passes, attachment.predicted_passes) == (4 * STEPS, 0)  # two in a doubled batch
    for predictor in ("reuse", "taylor"):
        with vidaccel.attach(pipe, predictor=predictor, steps=STEPS, full_steps=[0, 2]) as attachment:
            found = made(pipe)
        assert all(each.isfinite().all() for each in found)
        assert not any(torch.equal(a, b) for a, b in zip(found, plain, strict=True))  # neither video nor sound
        assert (attachment.full_passes, attachment.predicted_passes) == (8, 8)
    assert same(made(pipe), plain)


def test_listed_times_are_those_of_both_streams(pipe):
    one_pass = {"guidance_scale": 1.0, "stg_scale": 0.0, "modality_scale": 1.0}
    one_pass |= {f"audio_{name}": None for name in tuple(one_pass)}
    own = pipe.scheduler
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0)
    expected = made(pipe, sigmas=DISTILLED, **one_pass)
    pipe.scheduler = own
    with vidaccel.attach(pipe, predictor="reuse", sigmas=DISTILLED, full_steps=[0, 1, 2, 3]) as attachment:
        assert same(made(pipe, **one_pass), expected)
    assert attachment.full_passes == STEPS and pipe.scheduler is own


def test_steps_of_a_copied_scheduler_are_not_watched():
    scheduler, seen = FlowMatchEulerDiscreteScheduler(), []
    scheduler.set_timesteps(2)
    with watched_steps(scheduler, seen.append):
        copied = copy.deepcopy(scheduler)
        for each, start in ((scheduler, 1.0), (copied, 5.0)):
            each.step(torch.zeros(1), each.timesteps[0], torch.full((1,), start))
    assert seen == [torch.ones(1)] and (scheduler.step_index, copied.step_index) == (1, 1)
    assert "step" not in vars(scheduler)
