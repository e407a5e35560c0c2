"""`--plan` as a user meets it: of a training, and of what fits a card."""

import pytest
from typer.testing import CliRunner

from vidaccel.cli.main import app
from vidaccel.errors import UserError

DISTILL = ("distill", "--conf", "wan_14b/cfg")
CARD = ("benchmark", "--plan", "--conf", "wan_14b", "sizes=[[81,480,832]]")


def run(*words: str):
    return CliRunner().invoke(app, [*words])


def test_plan_of_a_distillation(tmp_path):
    result = run(*DISTILL, "--plan", "gpu=h100", "price=2.5", "gpus=[1,8]", "-o", str(tmp_path / "student"))
    assert result.exit_code == 0, result.output
    assert not (tmp_path / "student").exists()
    lines = [line.rstrip() for line in result.stdout.splitlines()]
    assert all(len(line) <= 80 for line in lines)
    assert "32,760 video and 512 text tokens" in result.stdout
    total = next(line.split() for line in lines if line.strip().startswith("total"))
    hours, money = (float(cell.replace(",", "")) for cell in total[-2:])
    assert money == pytest.approx(2.5 * hours, rel=0.01)
    cards = {line.split()[0]: line for line in lines if line.endswith(("fits", "too small"))}
    assert cards["1"].endswith("too small") and cards["8"].endswith("fits")
    assert "text encoder 11.4 GB, autoencoder 254 MB" in result.stdout


def test_plan_of_a_predictor():
    result = run("train-predictor", "--conf", "wan_1.3b", "--plan", "memory=24GB", "gpus=[1]")
    assert result.exit_code == 0, result.output
    assert "first stage" in result.stdout and "adversarial stage" in result.stdout and "search" in result.stdout
    assert "money" not in result.stdout and "in 24 GB" in result.stdout


def test_what_fits_a_card():
    result = run(*CARD, "only=[student-20,fora-3]", "memory=24GB", "gpu=rtx4090", "price=0.5")
    assert result.exit_code == 0, result.output
    assert all(len(line) <= 80 for line in result.stdout.splitlines())
    card = result.stdout.partition("on 24 GB")[2]
    rows = {
        line.split()[0]: " ".join(line.split()[3:])
        for line in card.splitlines()
        if line[1:].startswith(("student", "fora"))
    }
    assert rows["student-20"] == "too large 18.3 GB 4.91 GB"
    assert rows["fora-3"] == "too large too large too large"
    assert "quantize=fp8" in card and "offload=group" in card and "text encoder 11.4 GB" in card
    without = run(*CARD, "only=[student-20]", "gpu=a100")
    assert "fp8" not in without.stdout  # whose tensor cores have none


def test_two_transformers_are_held_both():
    result = run(*CARD[:3], "wan22", *CARD[4:], "only=[student-20]", "memory=48GB", "gpu=l40s")
    *_, row = (line.split()[2:] for line in result.stdout.splitlines() if line.startswith(" student-20"))
    assert " ".join(row) == "too large 32.8 GB 5.37 GB"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((*DISTILL, "--plan", "gpu=h9000"), ("gpu='h9000' is not possible", "h100")),
        ((*DISTILL, "--plan", "price=-1"), ("price=-1.0 is not possible", "0 or more")),
        ((*DISTILL, "--plan", "price=nan"), ("is not possible", "finite")),
        ((*DISTILL, "--plan", "price=cheap"), ("price", "cheap")),
        ((*DISTILL, "--plan", "memory=much"), ("memory='much' is not possible", "24GB")),
        ((*DISTILL, "gpu=h100"), ("gpu=h100 is for a plan", "add --plan")),
        ((*CARD, "memory=24"), ("is not possible", "24GB")),
        ((*CARD, "memory=24GB", "--json"), ("table alone", "--json")),
        (("benchmark", "--speedup", "memory=24GB"), ("memory=24GB is for a plan", "add --plan")),
        (("distill", "--plan", "teacher=runs/nowhere/here"), ("there is no folder", "size_of=")),
    ],
    ids=lambda each: " ".join(each),
)
def test_refusals(words, said):
    result = run(*words)
    assert result.exit_code == 2, result.output
    error, _, hint = result.stderr.partition("hint:")
    assert said[0] in error and said[1] in hint + error


def test_with_debug_the_error_itself_comes_out():
    result = run(*DISTILL, "--plan", "gpu=h9000", "--debug")
    assert isinstance(result.exception, UserError)


def test_settings_of_a_plan_are_explained():
    result = run("distill", "--explain", "mfu")
    assert result.exit_code == 0 and "HunyuanVideo" in result.stdout
    printed = run(*DISTILL, "--plan", "gpu=h100", "--print-conf")
    assert printed.exit_code == 0 and "method: cfg" in printed.stdout and "hours" not in printed.stdout
