"""Benchmarks that commit 9cb9f0f began go on: their settings have names of then, their rows are kept."""

import json
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from vidaccel.bench import runner
from vidaccel.cli.main import app

ARTEFACTS = Path(__file__).parents[1] / "artefacts_9cb9f0f"
WORDS = {
    "bench-timing": ["--speedup"],
    "bench-scoring": ["--speedup", "--quality", "only=[student,searched,first-block]", "rounds=2"],
}


@pytest.fixture
def artefacts(tmp_path, monkeypatch) -> None:
    """A copy of all of them is the working directory."""
    monkeypatch.chdir(shutil.copytree(ARTEFACTS, tmp_path / "artefacts"))


def benchmark(folder: str, *more: str, monkeypatch: pytest.MonkeyPatch):
    """As the command that began the folder, on the machine and the commit that did."""
    began_on = json.loads(Path(folder, "settings.json").read_text())["environment"]
    monkeypatch.setattr(runner, "environment", lambda device: began_on)
    words = ["benchmark", *WORDS[folder], "--conf", "conf/benchmark.yaml", "-o", folder, *more]
    return CliRunner().invoke(app, words)


def rows(folder: str) -> dict[str, dict]:
    return {file.name: json.loads(file.read_text()) for file in Path(folder, "rows").glob("*.json")}


@pytest.mark.parametrize("folder", WORDS)
def test_a_benchmark_goes_on(artefacts, monkeypatch, folder):
    expected, before = json.loads(Path("expected.json").read_text())[folder], rows(folder)
    result = benchmark(folder, monkeypatch=monkeypatch)
    assert result.exit_code == 0, result.output
    after, whole = rows(folder), expected["whole_rounds_before"]
    assert {name: len(row["rounds"]) for name, row in after.items()} == expected["rounds_after"]
    for name, row in before.items():
        assert after[name]["counts"] == row["counts"]
        assert after[name]["rounds"][:whole] == row["rounds"][:whole]
        assert after[name]["videos"][: len(row["videos"])] == row["videos"]
    found = {run["method"]: run for run in json.loads(Path(folder, "results.json").read_text())["runs"]}
    assert list(found) == list(expected["results"])
    for name, values in expected["results"].items():
        fidelity = values.pop("fidelity") or {}
        assert {key: found[name][key] for key in values} == values
        for key, value in (found[name]["fidelity"] or {}).items():
            assert value == (fidelity[key] and pytest.approx(fidelity[key], rel=1e-4))


def test_another_benchmark_is_still_told_from_it(artefacts, monkeypatch):
    result = benchmark("bench-timing", "methods.linear.on_skipped=reuse", monkeypatch=monkeypatch)
    assert result.exit_code == 2
    assert "holds another benchmark: config.methods.linear.on_skipped was 'linear', now 'reuse'\n" in result.stderr
