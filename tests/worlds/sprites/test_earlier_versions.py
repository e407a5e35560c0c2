"""Scores that commit 9cb9f0f began go on."""

import json
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from vidaccel.worlds.sprites.__main__ import app

ARTEFACTS = Path(__file__).parents[2] / "artefacts_9cb9f0f"


def test_scores_go_on_and_end_as_they_did(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(ARTEFACTS / "score", "score")
    file = Path("score/marks.jsonl")
    lines, total = file.read_text().splitlines(), json.loads(Path("score/score.json").read_text())["total"]
    command = "score sprites/student predictor=sprites/predictor steps=8 budget=4 --prompts 10 -o score"
    result = CliRunner().invoke(app, command.split())
    assert result.exit_code == 0, result.output
    again = file.read_text().splitlines()
    assert again[:8] == lines[:8]  # of the whole batch; the others are made once more
    for line, old in zip(map(json.loads, again), map(json.loads, lines), strict=True):
        assert line | {"marks": None} == old | {"marks": None}
        there = {name: line["marks"][name] for name in old["marks"]}  # there are more by now
        assert there == pytest.approx(old["marks"], abs=0.01)  # the shipped predictor has scalars on top since
    assert json.loads(Path("score/score.json").read_text())["total"] == pytest.approx(total, rel=1e-3)
