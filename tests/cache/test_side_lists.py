"""A pipeline whose trunk has blocks beside it, called with all that it takes: a control video, a mask, an image."""

import numpy as np
import pytest
import torch
from PIL import Image

import vidaccel
from tests.tiny import IMAGE, SIZE, tiny_pipeline
from vidaccel.config.generate import GenerateConfig
from vidaccel.errors import UserError
from vidaccel.families.registry import FAMILIES
from vidaccel.models.loading import LoadedPipeline
from vidaccel.sampling import run_pipeline

STEPS = 4


def images(seed: int, count: int) -> list[Image.Image]:
    pixels = np.random.default_rng(seed).integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)
    return [Image.fromarray(each) for each in pixels]


def latents(pipe, seed: int = 0, **more) -> torch.Tensor:
    control = {"video": images(seed, SIZE["num_frames"]), "mask": images(2, SIZE["num_frames"])}
    control |= {"reference_images": [Image.fromarray(IMAGE)], "conditioning_scale": 0.7}
    sampled = {"num_inference_steps": STEPS, "output_type": "latent", "generator": torch.Generator().manual_seed(0)}
    return pipe("a red circle", **SIZE, **sampled, **control | more).frames


@pytest.fixture(scope="module")
def pipe():
    return tiny_pipeline("wan_vace")


def test_full_steps_are_the_pipelines_own_and_predicted_ones_run_nothing_beside_the_trunk(pipe):
    runs: list[int] = []
    handle = pipe.transformer.vace_blocks[0].attn1.register_forward_hook(lambda *_: runs.append(1))
    plain = latents(pipe)
    assert plain.shape[2] == 3  # the image's frame, and two of the video
    for other in ({"seed": 1}, {"video": None, "mask": None}):
        assert not torch.equal(latents(pipe, **other), plain)
    with vidaccel.attach(pipe, predictor="reuse", steps=STEPS, every=1):
        assert torch.equal(latents(pipe), plain)
    runs.clear()
    for predictor in ("reuse", "taylor"):
        with vidaccel.attach(pipe, predictor=predictor, steps=STEPS, full_steps=[0, 2]) as attachment:
            found = latents(pipe)
        assert found.isfinite().all() and not torch.equal(found, plain)
        assert (attachment.full_passes, attachment.predicted_passes) == (4, 4)
    assert len(runs) == 8
    handle.remove()
    assert torch.equal(latents(pipe), plain)


def test_it_takes_one_prompt_at_a_time(pipe):
    loaded = LoadedPipeline(pipe, FAMILIES["wan_vace"], "here", SIZE, {})
    with pytest.raises(UserError, match="2 prompts at once, and the pipeline of Wan 2.1 VACE takes one"):
        run_pipeline(loaded, ["a", "b"], [0, 1], GenerateConfig(), None)
