"""README's way of a model of one's own, command by command, from a plain folder and clips.

At default settings, but for the number of steps of trainings and of the student, the size of the videos and how often
times are taken; for families but one, of the steps of full and cfg-distilled-50 too.
"""

import json
import shlex
import subprocess
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from tests.docs.pages import ROOT, blocks
from tests.tiny import SIZE, tiny_pipeline
from vidaccel.cli.main import app
from vidaccel.data.clips import write_clips
from vidaccel.models.loading import load_pipeline

TITLE = "## Your own model, start to finish\n"
CAPTIONS = ["a red circle", "a blue square", "a green circle on white"]
FEWER = {
    "collect-features": [f"{key}={value}" for key, value in SIZE.items()],
    "distill": ["train.steps=2", "train.accumulate=1", "sample_steps=4"],
    "train-predictor": ["mse.steps=2", "mse.accumulate=1"],
    "generate": ["budget=2"],
    "benchmark": [
        "timed_seconds=0",
        "prompts=[a red circle]",
        "only=[full,cfg-distilled-50,student,predictor-two-fifths]",
    ],
}
"""What is not the point, on the machine of a test."""
FEWER_STEPS = [
    *(f"methods.full.{setting}" for setting in ("as_called=false", "two_pass=true", "steps=6")),
    "methods.cfg-distilled-50.steps=6",
]
CHEAPEST = "ltx_video"
FAMILIES = (CHEAPEST, "hunyuan_video_15")
"""One stream and two; guidance by an argument of the call and by a guider; with nothing beside the text, and with more.
Wan goes the same way in test_accelerate.py, HunyuanVideo in tests/bench/test_own_model.py, and what the commands are
made of is tried of every family in tests/families/test_every_family.py."""


def the_way() -> list[str]:
    page = ROOT / "README.md"
    text = page.read_text(encoding="utf-8")
    first = text[: text.index(TITLE)].count("\n")
    code = next(code for code in blocks(page) if code.line > first)
    return code.text.replace("\\\n", " ").splitlines()


def test_it_is_eight_lines():
    lines = the_way()
    done = [shlex.split(line)[1] if line.startswith("vidaccel") else shlex.split(line)[0] for line in lines]
    trained = ["collect-features", "distill", "distill", "train-predictor"]
    assert done == [*trained, "generate", "generate", "benchmark", "tar"]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_command_of_it_runs(family, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    steps = 50 if family == CHEAPEST else 6
    fewer = FEWER | {"benchmark": [*FEWER["benchmark"], *([] if family == CHEAPEST else FEWER_STEPS)]}
    tiny_pipeline(family).save_pretrained("path/to/model")
    frames = np.random.default_rng(0).integers(0, 256, (3, 8, 40, 48, 3), dtype=np.uint8)
    write_clips("clips", zip(frames, CAPTIONS, strict=True), fps=16)
    for line in the_way():
        words = shlex.split(line)
        if words[0] == "tar":
            subprocess.run(words, check=True)
            continue
        result = CliRunner().invoke(app, [*words[1:], *fewer[words[1]]])
        assert result.exit_code == 0, f"{line}\n{result.output}"
        assert "warning: guidance" not in result.stderr and "learns scales" not in result.stderr
        if words[1] == "generate":
            full = "right path/to/model, 50 steps, 100 passes, guidance 5"
            made = full if "--compare" in words else "5 frames 32x32; 4 steps, 2 full + 2 predicted passes, guidance 5"
            assert made in result.stdout
    student = load_pipeline("runs/student")
    assert student.call | SIZE | {"guidance": 5.0, "steps": 4} == student.call
    assert {path.name for path in Path("runs").rglob("README.md")} and Path("runs/predictor/README.md").is_file()
    rows = {run["method"]: run for run in json.loads(Path("runs/bench/results.json").read_text())["runs"]}
    passes = {name: (run["passes"]["full"], run["passes"]["predicted"]) for name, run in rows.items() if run["passes"]}
    expected = {
        "full": (2 * steps, 0),
        "cfg-distilled-50": (steps, 0),
        "student": (4, 0),
        "predictor-two-fifths": (2, 2),
    }
    assert passes | expected == passes and {run["error"] for run in rows.values()} == {None}
    assert {run["family"] for run in rows.values()} == {family} and rows["student"]["size"] == SIZE
