"""How the model is run, from the command line."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tests.students import save_teacher
from vidaccel.cli.main import app
from vidaccel.kernels import select


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return save_teacher(tmp_path_factory.mktemp("models") / "wan", "wan")


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def run(*args: str):
    return CliRunner().invoke(app, ["generate", "a red circle", "steps=1", *map(str, args)])


def test_generate_runs_the_model_as_it_is_told_and_says_how(model):
    select._say_once.cache_clear()
    settings = {"kernels": "auto", "attention": "_native_math", "trim_text": True}
    result = run(f"model={model}", *(f"{key}={value}" for key, value in settings.items()), "--json")
    assert result.exit_code == 0, result.output
    made = json.loads(result.stdout)
    nothing = {"trim_text": False}  # Wan's text has no mask
    others = {"kernels": "reference", "quantize": "none", "compile": False, "decode": "auto"}
    assert made["runtime"] == settings | others | nothing
    assert "info: kernels: auto is reference on cpu" in result.stderr


def test_the_defaults_are_the_stock_model(model):
    assert run(f"model={model}", "-o", "a.gif").exit_code == 0
    assert run(f"model={model}", "kernels=reference", "attention=native", "-o", "b.gif").exit_code == 0
    assert Path("a.gif").read_bytes() == Path("b.gif").read_bytes()


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("kernels=fusd", "kernels is one of reference, fused, auto"),
        ("attention=falsh", 'did you mean "flash"?'),
        ("attention=_native_cudnn", "needs a CUDA device"),
        ("quantize=int4", "quantize is one of none, int8, fp8"),
        ("quantize=fp8", "hint: "),
        ("compile=perhaps", "compile"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_loaded(word, said):
    result = run("model=./nowhere", word)
    assert result.exit_code == 2
    error, hint = result.stderr.strip().split("\n")[-2:]
    assert error.startswith("error: ") and hint.startswith("hint: ")
    assert said in error + hint and "nowhere" not in error
    assert not list(Path().iterdir())
