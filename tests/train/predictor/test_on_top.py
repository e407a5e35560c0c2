"""Scalars on top of a trained network, by the command: what it writes, that it serves, resume and refusals."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from tests.students import student
from tests.train.test_distill import CAPTIONS, write_features
from vidaccel.artefacts import read_run, sha256_file, verify_files
from vidaccel.cache.attach import attach
from vidaccel.cache.schedule import read_schedules
from vidaccel.cli.main import app
from vidaccel.forecasters.checkpoint import SCALARS_FILE
from vidaccel.forecasters.learned import Predictor
from vidaccel.models.calling import call_arguments
from vidaccel.models.loading import load_pipeline
from vidaccel.train.predictor.scalars import relative_error

SCALARS = {"runs": 8, "checked_prompts": 2, "tried": 2}
SMALL = SCALARS | {"search_prompts": 2, "blocks": 1, "mse.batch_size": 3, "mse.steps": 2, "mse.save_every": 1}


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """A folder with a student, features, and a predictor with scalars on top."""
    folder = tmp_path_factory.mktemp("world")
    loaded = load_pipeline(student(folder, "hunyuan_video"))
    write_features(folder / "features", loaded)
    result = run(folder, "-o", str(folder / "predictor"))
    assert result.exit_code == 0, result.output
    return folder


def run(world: Path, *words: str):
    given = {word.partition("=")[0] for word in words}
    settings = [f"{key}={value}" for key, value in SMALL.items() if key not in given]
    settings += [f"student={world / 'student'}", "--features", str(world / "features"), "--device", "cpu"]
    return CliRunner().invoke(app, ["train-predictor", "--conf", "sprites", *settings, *words])


def test_the_command_writes_scalars_on_top_that_serve(world):
    folder = world / "predictor"
    scalars = Predictor.from_pretrained(folder).scalars
    assert scalars is not None and scalars.config.lists
    schedules = {each.budget: each for each in read_schedules(folder / "schedule.json")}
    assert sorted(schedules) == [1, 2, 3, 4]
    record = read_run(folder, "predictor/1")
    verify_files(folder, record)
    assert SCALARS_FILE in record["files"]
    said = {tuple(each["full_steps"]): each for each in record["fitted"]}
    assert {each.full_steps for each in scalars.config.lists} == said.keys()
    for each in scalars.config.lists:
        assert each.network and schedules[len(each.full_steps)].full_steps == each.full_steps
        errors = said[each.full_steps]
        assert errors["error"] == each.error == schedules[len(each.full_steps)].expected_error < errors["network"]
    budget = len(scalars.config.lists[-1].full_steps)
    words = ["a red circle", f"model={world / 'student'}", f"predictor={folder}", f"budget={budget}", "--json"]
    result = CliRunner().invoke(app, ["generate", *words, "-o", str(world / "out.mp4")])
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["passes"] == {"full": budget, "predicted": 4 - budget}
    assert {"predictor/model.safetensors", f"predictor/{SCALARS_FILE}"} <= report["hashes"].keys()
    result = CliRunner().invoke(app, ["generate", *words, "guidance=9", "-o", str(world / "out.mp4")])
    assert result.exit_code == 2 and "guidance=9, and the scalars were fitted" in result.stderr


def test_the_error_is_that_of_the_pipeline_as_it_serves(world):
    """On the prompts that it was tried on, from their noise, beside the pipeline's full run; a list of full steps
    without scalars is served by the network alone."""
    loaded = load_pipeline(world / "student")
    loaded.pipe.set_progress_bar_config(disable=True)
    predictor = Predictor.from_pretrained(world / "predictor")
    assert predictor.scalars is not None
    made = predictor.scalars.config.lists[-1]
    loaded.hook.guidance = 4.0

    def latents() -> torch.Tensor:
        generators = (torch.Generator().manual_seed(seed) for seed in (8, 9))
        call = {"output_type": "latent", **call_arguments(loaded)}
        return torch.cat([loaded.pipe(CAPTIONS[-1], generator=each, **call).frames for each in generators])

    own = latents()
    with attach(loaded, predictor=world / "predictor", budget=len(made.full_steps)):
        served = latents()
    assert made.error == pytest.approx(relative_error(served, own), rel=1e-2)
    elsewhere = [full for full in ([0, 1], [0, 2], [0, 3]) if not predictor.scalars.find(full, 4)][0]
    with attach(loaded, predictor=world / "predictor", steps=4, full_steps=elsewhere):
        fallen_back = latents()
    predictor.scalars = None
    with attach(loaded, predictor=predictor, steps=4, full_steps=list(made.full_steps)):
        assert not torch.allclose(latents(), served)
    with attach(loaded, predictor=predictor, steps=4, full_steps=elsewhere):
        assert torch.equal(latents(), fallen_back)


def test_the_same_again_and_another_grid_beside_it(world, tmp_path):
    folder = tmp_path / "predictor"
    shutil.copytree(world / "predictor", folder)
    before = (folder / SCALARS_FILE).read_bytes()
    assert run(world, "-o", str(folder)).exit_code == 0
    assert (folder / SCALARS_FILE).read_bytes() == before
    result = run(world, "stage=search", "steps=5", "budgets=[2]", "-o", str(folder))
    assert result.exit_code == 0, result.output
    found = Predictor.from_pretrained(folder).scalars
    assert found is not None and {each.steps for each in found.config.lists} == {4, 5}
    assert {each["steps"] for each in read_run(folder, "predictor/1")["fitted"]} == {4, 5}
    assert run(world, "-o", str(folder), "tried=1").exit_code == 0
    again = Predictor.from_pretrained(folder).scalars
    assert again is not None and {each.steps for each in again.config.lists} == {4, 5}
    result = run(world, "-o", str(folder), "scalars=false")
    assert result.exit_code == 0 and not (folder / SCALARS_FILE).exists()


def test_scalars_are_fitted_on_the_grid_that_the_network_was_made_for(world, tmp_path):
    """Which a search that names no grid is for as well."""
    folder, times = tmp_path / "predictor", [1.0, 0.9, 0.6, 0.3, 0.0]
    shutil.copytree(world / "predictor", folder)
    made = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(made | {"steps": 4, "shift": None, "times": times}))
    record = json.loads((folder / "run.json").read_text())
    record["files"]["config.json"] = sha256_file(folder / "config.json")
    (folder / "run.json").write_text(json.dumps(record))
    result = run(world, "stage=search", "budgets=[2]", "scalars=true", "-o", str(folder))
    assert result.exit_code == 0, result.output
    (fitted,) = read_run(folder, "predictor/1")["fitted"]
    found = Predictor.from_pretrained(folder).scalars
    assert found is not None and [list(each.times) for each in found.config.lists] == [times]
    assert fitted["full_steps"] == list(found.config.lists[0].full_steps)


MISTAKES = {
    "scalars on top of scalars": (["scalars=true", "forecaster=multistep"], "is for forecaster=learned"),
    "nothing to try on": (["scalars=true", "checked_prompts=0"], "checked_prompts"),
    "scalars in the loop and none at the end": (["scalars_every=1", "scalars=false"], "scalars_every"),
    "fewer runs than unknowns": (["scalars=true", "runs=3"], "3 runs for"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_end_with_a_line_and_a_hint(world, tmp_path, mistake):
    words, expected = MISTAKES[mistake]
    result = run(world, "-o", str(tmp_path / "new"), *words)
    assert result.exit_code == 2 and expected in result.stderr and "Traceback" not in result.stderr


def test_damaged_scalars_are_named(world, tmp_path):
    folder = tmp_path / "predictor"
    shutil.copytree(world / "predictor", folder)
    (folder / SCALARS_FILE).write_text("{}")
    words = ["a red circle", f"model={world / 'student'}", f"predictor={folder}", "budget=2"]
    result = CliRunner().invoke(app, ["generate", *words, "-o", str(tmp_path / "o.mp4")])
    assert result.exit_code == 2 and SCALARS_FILE in result.stderr


def test_without_enough_runs_the_network_is_left_alone(world, tmp_path):
    """Where nobody asked for scalars, while it is trained too."""
    result = run(world, "-o", str(tmp_path / "alone"), "runs=3", "scalars_every=1")
    assert result.exit_code == 0 and "the network is trained alone: 3 runs are too few" in result.stderr
    assert "no scalars on top of the network: 3 runs for" in result.stderr
    assert not (tmp_path / "alone" / SCALARS_FILE).exists()
