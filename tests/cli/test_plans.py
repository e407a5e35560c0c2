"""`--plan` as a user meets it: of a training, and of what fits a card."""

import gc

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


def test_a_plan_looks_for_no_garbage_on_its_way(monkeypatch):
    found = []

    def plan(config):
        found.append(gc.isenabled())
        raise UserError("planned", "enough")

    monkeypatch.setattr("vidaccel.api.plan", plan)
    assert run("benchmark", "--plan", "--conf", "sprites").exit_code == 2
    assert found == [False] and gc.isenabled()


def card(*words: str) -> tuple[dict[str, list[str]], str]:
    """Cells of each row behind its seconds, and all that is said of a card on one line."""
    result = run("benchmark", "--plan", "memory=24GB", *words)
    assert result.exit_code == 0, result.output
    lines = result.stdout.partition("\non 24 GB")[2].splitlines()
    assert all(len(line) <= 80 for line in lines)
    table = [line.split() for line in lines if line[1:].startswith(("method", "student", "fora"))]
    cells = {name: " ".join(rest).replace(" GB", "").split() for name, _, *rest in table}
    return cells, " ".join(" ".join(lines).split())


def test_what_fits_a_card_of_two_transformers():
    words = ("--conf", "wan22", "sizes=[[81,480,832]]", "only=[student-20,fora-3]")
    cells, said = card(*words, "gpu=rtx4090", "price=0.5")
    assert cells == {"method": ["money", "model+fp8", "group"], "student-20": ["0.0738", "18.3", "5.63"]}
    assert "fit by none, at the least: fora-3 (45.9 GB)" in said
    assert "no row fits by whole (72.5 GB), fp8 (44.4 GB), model (32.3 GB)" in said
    assert "model+fp8: offload=model quantize=fp8" in said and "28.1 GB to the card, 14.1 GB with quantize=fp8" in said
    assert "own memory, 68.8 GB in all" in said and "text encoder 11.4 GB" in said
    without = card(*words, "gpu=rtx3090")[1]
    assert "quantize=int8 compile=true" in without and "fp8" not in without  # whose tensor cores have none


def test_masks_of_every_pair_are_trimmed_on_a_card():
    words = ("--conf", "hunyuan_video_15", "sizes=[[121,720,1280]]", "only=[student-20]")
    cells, said = card(*words, "gpu=rtx4090")
    assert cells["student-20"] == ["18.7", "10.6"]
    assert "group: offload=group trim_text=true" in said


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


@pytest.mark.parametrize("words", ["distill teacher=", "train-predictor student="])
def test_what_is_not_trained_is_not_planned(saved, words):
    result = run(*f"{words}{saved('sana_video')}".split(), "--plan")
    assert result.exit_code == 2 and "Sana-Video puts an instruction" in result.stderr


def test_with_debug_the_error_itself_comes_out():
    result = run(*DISTILL, "--plan", "gpu=h9000", "--debug")
    assert isinstance(result.exception, UserError)


def test_settings_of_a_plan_are_explained():
    result = run("distill", "--explain", "mfu")
    assert result.exit_code == 0 and "HunyuanVideo" in result.stdout
    printed = run(*DISTILL, "--plan", "gpu=h100", "--print-conf")
    assert printed.exit_code == 0 and "method: cfg" in printed.stdout and "hours" not in printed.stdout
