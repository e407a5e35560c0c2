"""`vidaccel benchmark` as a user meets it."""

import json

import pytest
from typer.testing import CliRunner

from vidaccel.cli.main import app


def run(*words: str):
    return CliRunner().invoke(app, ["benchmark", *words])


def test_tables():
    result = run("--plan", "--conf", "hunyuan_video", "only=[predictor-8-of-20]", "sizes=[[129, 704, 704]]")
    assert result.exit_code == 0, result.output
    assert "63,888 video and 256 text tokens" in result.stdout
    assert "12,821,012,544 parameters" in result.stdout
    row = next(line.split() for line in result.stdout.splitlines() if line.strip().startswith("predictor-8-of-20"))
    assert row[1:5] == ["20", "8", "+", "12"]
    assert 11.8 <= float(row[-1].removesuffix("x")) <= 12.0
    assert all(len(line) <= 80 for line in result.stdout.splitlines())
    said = " ".join(result.stdout.split())
    assert "memory is the transformer's alone; " in said and " GB, autoencoder " in said and "beside it" in said


def test_json(schema):
    result = run("--plan", "--json")
    assert result.exit_code == 0, result.output
    results = json.loads(result.stdout)
    schema.validate(results)
    assert results["baseline"] == results["runs"][0]["method"] == "cfg-50"
    assert results["environment"]["device"] == "meta"


def test_a_row_of_ones_own(tmp_path):
    (tmp_path / "mine.yaml").write_text("defaults: [wan_1.3b, _self_]\nmethods: {mine: {steps: 6}}\nonly: [mine]\n")
    result = run("--plan", "--json", "--conf", str(tmp_path / "mine.yaml"))
    assert result.exit_code == 0, result.output
    baseline, mine = json.loads(result.stdout)["runs"]
    assert (baseline["method"], mine["method"], mine["full_steps"]) == ("cfg-50", "mine", [0, 1, 2, 3, 4, 5])


def test_print_conf():
    result = run("--print-conf", "--conf", "wan_14b")
    assert result.exit_code == 0
    assert "family: wan" in result.stdout and "predictor-4-of-8" in result.stdout


@pytest.mark.parametrize(
    ("words", "message", "hint"),
    [
        (["--plan", "--conf", "hunyuan"], 'no configuration "hunyuan" for benchmark', 'did you mean "hunyuan_video"?'),
        (["--plan", "sizes=[[17, 64, 72]]"], "width=72 does not fit", "nearest valid: 64 or 80"),
        (["--plan", "only=[zzz]"], 'there is no method "zzz"', "choose from: cache-dit"),
        (["--plan", "fast"], '"fast" is neither a flag nor a key=value setting', "write settings as key=value"),
    ],
)
def test_refusals(words, message, hint):
    result = run(*words)
    assert result.exit_code == 2
    assert result.stderr.startswith(f"error: {message}")
    assert f"hint: {hint}" in result.stderr
    assert result.stdout == ""


def test_rows_that_only_a_run_knows_are_named_below_the_table():
    result = run("--plan", "--conf", "wan_1.3b", "only=[student-8,teacache-0.15]")
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines()[-1] == "known when they run: teacache-0.15"
