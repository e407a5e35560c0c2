"""The published configurations, each for a few steps of the shipped world, one after another."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from vidaccel.cli.main import app
from vidaccel.forecasters.learned import Predictor
from vidaccel.models.loading import load_pipeline

FEW = ["train.steps=2", "train.batch_size=1", "train.sample_every=0", "train.log_every=1", "clips=4"]
"""Of distillation."""


def run(*words: object) -> None:
    result = CliRunner().invoke(app, [*map(str, words), "--device", "cpu"])
    assert result.exit_code == 0, result.output


def logged(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def student(tmp_path_factory) -> Path:
    """Of the published CFG distillation, and of the published training for few steps after it."""
    folder = tmp_path_factory.mktemp("published")
    run("distill", "--conf", "sprites/published_cfg", "-o", folder / "cfg", *FEW)
    few = [*FEW, f"teacher={folder / 'cfg'}"]
    run("distill", "--conf", "sprites/published_mean_velocity", "-o", folder / "student", *few)
    return folder / "student"


def test_a_student_is_distilled(student):
    config = load_pipeline(student).conditioning.config
    assert (config.embeds, config.restrict, config.guidance_range) == (("r", "g"), 0.2, (1.0, 8.0))
    assert [line["restrict"] for line in logged(student)] == [0.2, 0.2]


def test_a_predictor_is_trained_and_serves(student, tmp_path):
    predictor = tmp_path / "predictor"
    stages = ["mse.steps=1", "adversarial.steps=2", "mse.batch_size=2", "adversarial.batch_size=2"]
    stages += ["mse.log_every=1", "adversarial.log_every=1", "clips=4", "search_prompts=1", "steps=3"]
    few = [f"student={student}", *stages]
    run("train-predictor", "--conf", "sprites/published", "-o", predictor, *few)
    assert Predictor.from_pretrained(predictor).config.architecture == "published"
    first, second = logged(predictor / "checkpoints" / "adversarial")
    assert first["loss"] == pytest.approx(first["discriminator"])
    assert second["loss"] == pytest.approx(second["mse"] + second["adversarial"])
    served = [f"model={student}", f"predictor={predictor}", "steps=3", "full_steps=[0]", "-o", tmp_path / "video.mp4"]
    run("generate", "a red circle moving right on black", *served)
