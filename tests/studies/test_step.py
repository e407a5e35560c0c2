"""What a step costs, on a tiny student: the arithmetic of the ratios, and that everything runs."""

import json

import pytest
from typer.testing import CliRunner

from studies import step
from tests.students import student


def test_ratios_are_of_neighbours(monkeypatch):
    """Four steps of a second each; the hook costs a tenth; a predicted step a fifth of a hooked one."""

    class Model:
        def default(self, name):
            return {"steps": 4}[name]

    def seconds(loaded, predictor=None, steps=None, full_steps=()):
        alone = 4.0 * next(slower)
        return {0: alone, 4: 1.1 * alone, 1: 1.1 * alone * (1 + 3 * 0.2) / 4}[len(full_steps)]

    slower = iter([each for each in (9, 1, 1, 2, 3) for _ in range(3)])  # the machine's own pace, round by round
    monkeypatch.setattr(step, "denoise_seconds", seconds)
    measured = step.measured(Model(), "reuse", 3)
    assert measured["hook"]["median"] == pytest.approx(0.1) == measured["hook"]["p75"]
    assert measured["predicted"]["median"] == pytest.approx(0.2) and measured["predicted"]["rounds"] == 3


def test_it_runs(tmp_path):
    words = ["--model", str(student(tmp_path, "wan")), "--predictor", "reuse", "--rounds", "1"]
    result = CliRunner().invoke(step.app, words)
    assert result.exit_code == 0, result.output
    measured = json.loads(result.stdout)
    assert measured["steps"] == 4 and measured["hook"]["rounds"] == measured["predicted"]["rounds"] == 1
