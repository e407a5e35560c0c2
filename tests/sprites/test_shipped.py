"""The model inside the package: whole, small enough, and as good as its card says it is."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from vidaccel.config import GenerateConfig, load
from vidaccel.models.loading import SHIPPED, load_pipeline
from vidaccel.sampling import generate
from vidaccel.sprites.parse import parse
from vidaccel.sprites.score import score_clip

TEACHER = SHIPPED / "teacher"


@pytest.fixture(scope="module")
def loaded():
    return load_pipeline("sprites/teacher")


def test_all_shipped_weights_fit_and_are_half_precision():
    files = list(SHIPPED.rglob("*.safetensors"))
    assert sum(file.stat().st_size for file in SHIPPED.rglob("*") if file.is_file()) < 48e6
    for file in files:
        with safe_open(file, "pt") as tensors:
            assert {tensors.get_tensor(name).dtype for name in tensors.keys()} <= {torch.float16, torch.bfloat16}  # noqa: SIM118


def test_the_card_shows_the_measured_scores():
    card = (TEACHER / "README.md").read_text()
    for name, mark in json.loads((TEACHER / "score.json").read_text()).items():
        interval = f"{mark['low']:.1f} to {mark['high']:.1f}"
        assert f"| {name.replace('_', ' ')} | {mark['mean']:.1f} | {interval} |" in card


def test_the_readme_shows_the_measured_scores():
    readme = " ".join((Path(__file__).parents[2] / "README.md").read_text().split())
    score = json.loads((TEACHER / "score.json").read_text())
    total = score["total"]
    assert f"{total['mean']:.1f} of 100 ({total['low']:.1f} to {total['high']:.1f}, 256 held-out prompts)" in readme
    assert f"{score['shape']['mean']:.0f} in 100 shapes are right" in readme


def test_generate_uses_it_without_being_told(loaded):
    config = load("generate", GenerateConfig, "teacher")
    assert config.model == "sprites/teacher"
    assert Path(loaded.source) == TEACHER
    made = generate(loaded, ["a red circle moving right on black"], config, [0])
    assert (made.steps, made.passes) == (50, 100)
    assert made.frames.shape == (1, 17, 64, 64, 3)


@pytest.mark.slow
def test_it_heeds_the_prompt(loaded):
    """The background of each of four prompts, which chance would get right once or twice."""
    prompts = [
        "a red circle moving right on black",
        "a blue square standing still on white",
        "a yellow square moving left on gray",
        "a green circle moving down on white",
    ]
    made = generate(loaded, prompts, GenerateConfig(steps=20), list(range(4)))
    marks = [score_clip(frames, parse(prompt)) for frames, prompt in zip(made.frames, prompts, strict=True)]
    assert [mark["background"] for mark in marks] == [1.0] * 4
