"""Trainings and a scoring that commit 9cb9f0f began, and was stopped in, go on: but one as it would have then.

Its state.json has settings by the names of then (`equal_share`, `longest`), and those of every method.
Each goes on in a process of its own: what other tests did to torch in this one changes last bits, which an optimiser
makes whole steps of.
"""

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file
from torch.testing import assert_close
from typer.testing import CliRunner

from tests.train.torchrun import program
from vidaccel.cli.main import app

EARLIER = Path(__file__).parents[1] / "artefacts_9cb9f0f"
EXPECTED = json.loads((EARLIER / "expected.json").read_text())
RESUMED = Path(__file__).parent / "resumed_predictor.safetensors"
"""What the predictor's training ends in since stretches begin anywhere, and the metrics of its last step."""
LAST_STEP = {
    "step": 3,
    "loss": 4.3386125564575195,
    "grad_norm": 10.770980938670057,
    "lr": 0.01,
    "mse": 0.7503530979156494,
    "reuse": 0.5786581039428711,
    "share": 1.3944427967071533,
    "discriminator": 1.9994287490844727,
    "adversarial": 0.944740891456604,
    "skipped": 0,
}


@pytest.fixture
def earlier(tmp_path, monkeypatch) -> Path:
    """A copy of the folders of then, in which to work: they name each other by relative paths."""
    folder = shutil.copytree(EARLIER, tmp_path / "earlier")
    monkeypatch.chdir(folder)
    return folder


def metrics(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def same_weights(one: Path, other: Path) -> None:
    made, expected = load_file(one), load_file(other)
    assert made.keys() == expected.keys()
    for name in made:
        assert_close(made[name], expected[name], rtol=1e-3, atol=1e-4)  # a step of the half precision that is stored


def same_metrics(lines: list[dict], expected: list[dict]) -> None:
    assert len(lines) == len(expected)
    for line, wanted in zip(lines, expected, strict=True):
        assert {key: line[key] for key in wanted} == pytest.approx(wanted, rel=1e-4)


def test_a_distillation_goes_on(earlier):
    file, expected = earlier / "distill-interrupted" / "metrics.jsonl", EXPECTED["distill-interrupted"]
    before = file.read_text()
    program("distill", "--conf", "conf/distill.yaml", "-o", "distill-interrupted")
    assert before.count("\n") == expected["lines_kept"] and file.read_text().startswith(before)  # with their seconds
    same_metrics(metrics(file), expected["metrics"])
    for name in ("transformer/diffusion_pytorch_model.safetensors", "conditioning/model.safetensors"):
        same_weights(earlier / "distill-interrupted" / name, earlier / "student" / name)


def test_a_predictors_training_goes_on(earlier):
    """The step that was left goes by another pair than then, when the length of a stretch decided where it began."""
    stages, expected = ("mse", "adversarial"), EXPECTED["predictor-interrupted"]
    files = {stage: earlier / "predictor-interrupted" / "checkpoints" / stage / "metrics.jsonl" for stage in stages}
    before = {stage: file.read_text() for stage, file in files.items()}
    assert [text.count("\n") for text in before.values()] == expected["lines_kept"]
    program("train-predictor", "--conf", "conf/train-predictor.yaml", "-o", "predictor-interrupted")
    for stage, file in files.items():
        assert file.read_text().startswith(before[stage])
    same_metrics(metrics(files["mse"]), expected["mse"])
    same_metrics(metrics(files["adversarial"]), [*expected["adversarial"][:-1], LAST_STEP])
    same_weights(earlier / "predictor-interrupted" / "model.safetensors", RESUMED)


def test_settings_that_differ_are_still_refused(earlier):
    words = ["distill", "--conf", "conf/distill.yaml", "-o", "distill-interrupted"]
    result = CliRunner().invoke(app, [*words, "mean_velocity.r_equals_t_share=0.4"])
    assert result.exit_code == 2
    assert "settings.mean_velocity.r_equals_t_share was 0.3, now 0.4" in " ".join(result.output.split())


def test_scoring_goes_on(earlier):
    """By whole batches: of ten prompts the last is missing, and the last two are marked again, to the same marks."""
    file = earlier / "score" / "marks.jsonl"
    before = file.read_text()
    file.write_text("".join(before.splitlines(keepends=True)[:9]))
    words = ("predictor=sprites/predictor", "steps=8", "budget=4", "--prompts", "10", "-o", "score")
    program("score", "sprites/student", *words, module="vidaccel.sprites")
    assert file.read_text().splitlines()[:8] == before.splitlines()[:8]
    old = EXPECTED["score"]["last_marks"]["marks"]
    again = metrics(file)[-1]["marks"]
    assert {name: again[name] for name in old} == pytest.approx(old, abs=0.02)  # there are more by now
