"""The benchmark on a model that does not ship, as a user types it: what it takes from the model, what it leaves out."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from typer.testing import CliRunner

from tests.students import save, save_teacher, trained
from vidaccel.bench.models import Models
from vidaccel.bench.own_model import _foreign, fitted
from vidaccel.cache.schedule import every, write_schedules
from vidaccel.cli.main import app
from vidaccel.config.benchmark import BenchmarkConfig
from vidaccel.forecasters.learned import new_predictor
from vidaccel.models.files import local_path
from vidaccel.models.loading import load_pipeline
from vidaccel.models.weight_hashes import student_hash

QUICK = ["--speedup", "--quality", "timed_seconds=0", "rounds=2", "dtype=float32", "-o", "out"]


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def run(*words: str):
    return CliRunner().invoke(app, ["benchmark", *words])


def rows() -> dict[str, dict]:
    return {run["method"]: run for run in json.loads(Path("out/results.json").read_text())["runs"]}


@pytest.mark.usefixtures("no_report")
@pytest.mark.parametrize("family", ["cogvideox", "hunyuan_video", "ltx_video"])
def test_what_can_be_had_without_training(family):
    """Nothing is said of the model but where it is; it is made for 6 steps of 5 frames of 32 x 32.

    Of the family that is the configuration's own, of one that predicts v, and of one whose caches nothing else runs:
    those of the others are tried in baselines/test_baselines.py, and tests/docs brings their models here.
    """
    save_teacher(Path("mine"), family)
    result = run(*QUICK, "model=mine", "scored_prompts=1")
    assert result.exit_code == 0, result.output
    assert f"{family}, 5 frames of 32 x 32" in result.stdout
    assert ("info: family=" in result.stderr) == (family != "hunyuan_video")
    assert "warning" not in result.stderr and "could not" not in result.stdout and "not run" not in result.output
    meaning = "latent: latent error, the distance of the final latents to full's from the same noise; 0 is identical"
    assert meaning in " ".join(result.stdout.split())
    assert "full passes: " not in result.stdout and "own latent: " not in result.stdout  # of columns that are not shown
    found = rows()
    assert {
        name: run["passes"]["full"] for name, run in found.items() if name != "teacache" and "-cfg" not in name
    } == {
        "full": 12,
        "taylor-every-2": 6,
        "taylor-every-3": 4,
        "taylor-every-5": 4,
        "reuse-every-2": 6,
        "reuse-every-3": 4,
        "fora-every-3": 4,
    }
    assert all(run["fidelity"]["latent_relative_l2"] > 0 for name, run in found.items() if name != "full")
    assert {run["total"] for run in found.values()} == {None}


@pytest.mark.usefixtures("no_report")
def test_what_ships_of_another_world_is_left_out_and_said():
    save_teacher(Path("mine"), "wan")
    only = "only=[taylor-every-3,student-8,student-4,predictor-8-searched,fora-3,fora-6]"
    sampling = ["methods.cfg-50.steps=6", "methods.taylor-every-3.steps=6", "sizes=[[5,32,32]]", "guidance=3"]
    result = run(*QUICK, "--conf", "sprites", "model=mine", only, "prompts=[a red circle,blue]", *sampling)
    assert result.exit_code == 0, result.output
    assert "mine is no model of sprites: without student, predictor, scorer" in result.stderr
    why = "student-8, student-4, predictor-8-searched (no student= is named); fora-3, fora-6 (no distilled= is named)"
    assert f"info: not run: {why}\n" in result.stderr
    assert f"not run: {why}" in " ".join(result.stdout.split())
    assert "warning" not in result.stderr
    found = rows()
    assert found["fora-3"]["error"] == "not run: no distilled= is named"
    assert found["taylor-every-3"]["prompts"] == found["cfg-50"]["prompts"] == 2  # all that there are, of 64
    assert found["cfg-50"]["family"] == "wan" and found["cfg-50"]["total"] is None


@pytest.mark.parametrize("scorer", ["sprites", "sprites/lamps"])
def test_no_set_of_a_worlds_prompts_is_for_another_worlds_model(scorer):
    save_teacher(Path("mine"), "wan")
    config = BenchmarkConfig(model="mine", scorer=scorer)
    assert _foreign(config, load_pipeline("mine")) == ["scorer"]
    assert _foreign(config, load_pipeline("sprites/teacher")) == []


@pytest.mark.parametrize(("scorer", "lacks"), [("sprites", False), ("sprites/lamps", True)])
def test_words_of_scored_prompts_that_the_model_lacks_are_named(scorer, lacks, caplog):
    config = BenchmarkConfig(model="sprites/teacher", scorer=scorer, dtype="float32")
    fitted(config, Models(config, "cpu"))
    assert ('"lamps"' in caplog.text and "the model does not know" in caplog.text) == lacks


def test_a_model_of_the_world_keeps_its_scorer_under_any_name(tmp_path):
    shutil.copytree(local_path("sprites/teacher"), "mine")
    config = BenchmarkConfig(
        model="mine", student="sprites/student", scorer="sprites", dtype="float32", sizes=None, prompts=["a", "b"]
    )
    kept = fitted(config, Models(config, "cpu"))
    assert (kept.student, kept.scorer, kept.scored_prompts) == ("sprites/student", "sprites", 2)
    assert kept.sizes == [[17, 64, 64]]


def chain(family: str, **teacher: str) -> None:
    """A model, its student in one pass, one in 4 steps of that, and a predictor with schedules for it."""
    loaded = load_pipeline(save_teacher(Path("model"), family))
    save(Path("cfg"), loaded, trained(loaded, ("g",)), steps=6, config={"teacher": "model", "method": "cfg"} | teacher)
    loaded = load_pipeline("cfg")
    save(Path("student"), loaded, trained(loaded), config={"teacher": "cfg", "method": "mean_velocity"})
    loaded = load_pipeline("student")
    tokens = {name: torch.randn(1, 8, 24) for name in ("hidden_states", "encoder_hidden_states")}
    made_for = {"steps": 4, "shift": 2.0, "student": student_hash(loaded)}
    predictor = new_predictor(loaded.pipe.transformer, loaded.family, tokens, tokens, blocks=1, **made_for)
    predictor.save_pretrained(Path("predictor"))
    write_schedules(Path("predictor/schedule.json"), [every(4, 2)])


def test_all_stages_stand_in_one_table():
    chain("hunyuan_video")
    only = "full,taylor-every-3,cfg-distilled-50,student,predictor-two-fifths,predictor-one-fifth,eight"
    words = [f"only=[{only}]", "methods.cfg-distilled-50.steps=6", "methods.eight={budget: 8, as_called: true}"]
    words = ["--conf", "mine", "student=student", "predictor=predictor", *words]
    result = run(*QUICK, *words, "scored_prompts=1")
    assert result.exit_code == 0, result.output
    assert "info: model=model distilled=cfg, which student was distilled from" in result.stderr
    assert Path("student/README.md").read_text().startswith("# A student of model\n")
    assert "by way of cfg, distilled to" in Path("student/README.md").read_text()
    why = "predictor-one-fifth (the same row as predictor-two-fifths: 2 of 4 steps full); "
    why += "eight (all of its 4 steps would be full (take a budget below 4))"
    assert f"not run: {why}" in " ".join(result.stdout.split())
    found = rows()
    passes = {name: tuple(run["passes"].values()) for name, run in found.items() if run["passes"]}
    expected = {
        "full": (12, 0, 0),
        "taylor-every-3": (4, 0, 8),
        "cfg-distilled-50": (6, 0, 0),
        "student": (4, 0, 0),
        "predictor-two-fifths": (2, 2, 0),
    }
    assert passes | expected == passes
    plan = run("--plan", *words)
    assert plan.exit_code == 0 and f"not run: {why}" in " ".join(plan.stdout.split())
    planned = json.loads(run("--plan", "--json", *words).stdout)["runs"]
    assert {each["method"]: tuple(each["passes"].values()) for each in planned if each["passes"]} == expected
    assert (
        found["full"]["settings"]["guidance"] == 4.0
    )  # the student's, of which a scale of the teacher's own says less
    assert found["student"]["size"] == {"num_frames": 5, "height": 32, "width": 32}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda: shutil.rmtree("cfg"), "cfg, which student was distilled from, is not here"),
        (lambda: save_teacher(Path("model"), "wan"), "model is no longer the model that cfg was distilled from"),
        (lambda: None, "model is no student"),
    ],
)
def test_a_student_whose_models_are_not_there_any_more(change, said):
    chain("hunyuan_video")
    change()
    student = "model" if "no student" in said else "student"
    result = run(*QUICK, "--conf", "mine", f"student={student}", "predictor=predictor")
    assert result.exit_code == 2
    assert f"error: {said}" in result.stderr and "model=FOLDER" in result.stderr
    assert not Path("out").exists()


def test_no_model_at_all():
    result = run(*QUICK, "--conf", "mine")
    assert result.exit_code == 2 and not Path("out").exists()
    assert "error: no model is named\nhint: set model=FOLDER (or student=FOLDER)" in result.stderr


def test_a_file_that_builds_on_its_own_name_is_told():
    Path("mine.yaml").write_text("defaults: [mine, _self_]\n")
    result = run("--print-conf", "--conf", "mine.yaml")
    assert result.exit_code == 2
    assert "mine.yaml builds on itself" in result.stderr and "another name" in result.stderr


def test_the_configuration_goes_by_the_model():
    assert yaml.safe_load(run("--print-conf", "model=mine").stdout)["baseline"] == "full"
    assert yaml.safe_load(run("--print-conf", "model=sprites/teacher").stdout)["scorer"] == "sprites"
    assert yaml.safe_load(run("--print-conf").stdout)["model"] == "sprites/teacher"


def test_a_plan_takes_family_and_call_from_the_model():
    save_teacher(Path("mine"), "wan")
    result = run("--plan", "--json", "model=mine", "only=[taylor-every-3]")
    assert result.exit_code == 0, result.output
    assert "info: family=wan, which mine is of" in result.stderr
    full, predicted = json.loads(result.stdout)["runs"]
    assert (full["family"], full["steps"], full["passes"]["full"]) == ("wan", 6, 12)
    assert (predicted["full_steps"], full["size"]["num_frames"]) == ([0, 3], 5)
    wider = json.loads(run("--plan", "--json", "model=mine", "only=[taylor-every-3]", "width=64").stdout)["runs"][0]
    assert wider["size"] == {"num_frames": 5, "height": 32, "width": 64}
    said = " ".join(run("--plan", "model=mine", "only=[taylor-every-3]").stdout.split())
    held = {name: sum(file.stat().st_size for file in Path("mine", name).glob("*.safetensors")) for name in ("vae",)}
    assert full["plan"]["beside_bytes"] | held == full["plan"]["beside_bytes"] and "transformer" not in held
    assert "memory is the transformer's alone; text_encoder " in said and " B beside it" in said.replace("kB", "B")
    flat, short = (run("--plan", "model=mine", f"sizes={size}") for size in ("[5,32,32]", "[[5,32]]"))
    assert "hint: write sizes=[[5, 32, 32]]" in flat.stderr and "num_frames=81 height=480 width=832" in short.stderr
