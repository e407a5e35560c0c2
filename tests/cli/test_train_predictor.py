"""`vidaccel train-predictor` through real files: what it writes, what it says, and how it refuses."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

import vidaccel
from tests.students import student
from tests.train.test_distill import write_features
from vidaccel.cache.schedule import every, read_schedules
from vidaccel.cli.main import app
from vidaccel.config.predictor import PredictorConfig
from vidaccel.errors import UserError
from vidaccel.models.loading import load_pipeline

TRAIN = {"steps": 2, "batch_size": 2, "warmup": 0, "log_every": 1}


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """A folder with a student, and features for it."""
    folder = tmp_path_factory.mktemp("world")
    write_features(folder / "features", load_pipeline(student(folder, "wan")))
    return folder


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def run(world: Path, *words: str):
    small = [f"{stage}.{key}={value}" for stage in ("mse", "adversarial") for key, value in TRAIN.items()]
    small += [f"student={world / 'student'}", "blocks=1", "discriminator.width=8", "search_prompts=2"]
    small += ["pairs=data", "history=1"]
    return CliRunner().invoke(app, ["train-predictor", "--conf", "sprites", *small, *words])


def test_trains_searches_and_says_the_schedules(world):
    result = run(world, "--features", str(world / "features"), "-o", "predictor")
    assert result.exit_code == 0, result.output
    *lines, last, shared = result.stdout.splitlines()
    use = f"vidaccel generate PROMPT model={world / 'student'} predictor=predictor budget=2 steps=4"
    assert last == f"predictor: the predictor and these schedules; `{use}` runs it"
    assert shared == "to share: predictor without checkpoints/ and trajectories/"
    assert "info: step 2: loss " in result.stderr  # there is no terminal to show a bar
    schedules = read_schedules("predictor/schedule.json")
    assert [line.partition(" of 4 steps full, expected error ")[0] for line in lines] == ["1", "2", "3", "4"]
    assert lines[3] == "4 of 4 steps full, expected error 0.000: 0 1 2 3"
    assert all(line.endswith(": " + " ".join(map(str, schedules[i].full_steps))) for i, line in enumerate(lines))
    assert "% of the student's" in result.stderr

    again = run(world, f"features={world / 'features'}", "-o", "predictor", "stage=search")
    assert again.exit_code == 0 and again.stdout == result.stdout
    # Without --conf it is the training's settings that are gone by: its student, its features.
    words = ["train-predictor", "-o", "predictor", "stage=search", "steps=3"]
    again = CliRunner().invoke(app, words)
    assert again.exit_code == 0, again.output
    assert again.stdout.startswith("1 of 3 steps full")
    assert {schedule.steps for schedule in read_schedules("predictor/schedule.json")} == {3, 4}
    said = CliRunner().invoke(app, [*words, "blokcs=2"])
    assert said.exit_code == 2 and 'did you mean "blocks"?' in said.stderr


MISTAKES = {
    "an unknown setting": (["blokcs=2"], 'did you mean "blocks"?'),
    "two full steps of noised clips": (["history=2"], "needs pairs=trajectory"),
    "three full steps": (["history=3"], "is 1 or 2"),
    "an impossible stage": (["stage=seek"], "all or search"),
    "no such student": (["student=./nowhere"], "nowhere"),
    "no such features": (["--features", "nowhere"], "there is no folder nowhere"),
    "depths out of order": (["discriminator.depths=[0.5,0.2]"], "rises"),
    "nothing to search for": (["stage=search", "-o", "none"], "there is no folder none"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_end_with_a_line_and_a_hint(world, mistake):
    words, expected = MISTAKES[mistake]
    result = run(world, *words)
    assert result.exit_code == 2, result.output
    assert expected in result.stderr
    assert "hint: " in result.stderr and "Traceback" not in result.stderr


def test_print_conf_can_be_read_back(world):
    printed = run(world, "--print-conf", "lag=0.1")
    assert printed.exit_code == 0 and "lag: 0.1\n" in printed.stdout
    Path("mine.yaml").write_text(printed.stdout)
    back = CliRunner().invoke(app, ["train-predictor", "--conf", "mine.yaml", "--print-conf"])
    assert back.stdout == printed.stdout


@pytest.mark.parametrize("name", ["reuse", "taylor", "linear"])
def test_schedules_of_forecasters_without_training(world, name):
    result = run(world, "--features", str(world / "features"), f"forecaster={name}", "budgets=[1,2]", "-o", "found")
    assert result.exit_code == 0, result.output
    *lines, last = result.stdout.splitlines()
    which = "found" if name == "linear" else f"{name} schedule=found/schedule.json"
    use = f"vidaccel generate PROMPT model={world / 'student'} predictor={which} budget=1"
    assert last == f"found: these schedules; `{use} steps=4` runs it"
    assert [line.partition(" of 4 steps full, expected error ")[0] for line in lines] == ["1", "2"]
    assert [schedule.budget for schedule in read_schedules("found/schedule.json")] == [1, 2]
    assert {path.name for path in Path("found").iterdir() if not path.name.startswith(".")} == {
        "schedule.json",
        "run.json",
        *(["model.safetensors"] if name == "linear" else []),
    }
    other = run(world, "--features", str(world / "features"), f"forecaster={name}", "budgets=[9]", "-o", "found")
    assert other.exit_code == 2 and "there are 4 steps" in other.stderr
    how = ["predictor=found"] if name == "linear" else [f"predictor={name}", "schedule=found/schedule.json"]
    words = ["generate", "a red circle", f"model={world / 'student'}", *how]
    made = CliRunner().invoke(app, [*words, "budget=2", "-o", "out.mp4"])
    assert made.exit_code == 0, made.output


def test_a_folder_of_schedules_is_a_predictor_of_the_model_that_it_was_searched_for(world):
    result = run(world, "--features", str(world / "features"), "forecaster=taylor", "budgets=[2]", "-o", "found")
    assert result.exit_code == 0, result.output
    assert "the search takes " in result.stderr and " on 3 prompts (--plan says the hours)" in result.stderr
    loaded = load_pipeline(world / "student")
    call = {"output_type": "latent", "num_inference_steps": 4}
    made = []
    for how in ({"predictor": "found", "budget": 2}, {"predictor": "taylor", "schedule": "found/schedule.json"}):
        with vidaccel.attach(loaded, steps=4, **how) as attachment:
            made.append(loaded.pipe("a red circle", generator=torch.Generator().manual_seed(0), **call).frames)
        assert (attachment.full_passes, attachment.predicted_passes) == (2, 2)
    assert torch.equal(*made)
    other = load_pipeline(world / "teacher")
    with pytest.raises(UserError, match="the schedules were searched for .*student .* and this is .*teacher"):
        vidaccel.attach(other, predictor="found", steps=4, budget=2)
    with pytest.raises(UserError, match="the schedule is for the grid of shift 2"):  # which is another's too
        vidaccel.attach(other, predictor="found", steps=4, budget=2, force=True)


def test_schedules_of_other_grids_stay_unless_they_are_of_another_forecaster(world):
    def found(*words):
        result = run(world, "--features", str(world / "features"), "budgets=[1]", "-o", "found", *words)
        assert result.exit_code == 0, result.output
        return [schedule.steps for schedule in read_schedules("found/schedule.json")]

    assert found("forecaster=reuse") == [4]
    assert found("forecaster=reuse", "steps=5") == [4, 5]
    assert found("forecaster=linear", "steps=3") == [3]
    assert found("forecaster=linear", "steps=2") == [2, 3]
    assert {name.split(".")[0] for name in load_file("found/model.safetensors")} == {"2", "3"}
    assert found("forecaster=taylor", "steps=6") == [6] and not Path("found/model.safetensors").exists()


def test_a_grid_of_listed_times_is_searched_and_generated_on(world):
    features = ("--features", str(world / "features"))
    result = run(world, *features, "forecaster=reuse", "budgets=[2]", "timesteps=[1000,757,522]", "-o", "found")
    assert result.exit_code == 0, result.output
    (schedule,) = read_schedules("found/schedule.json")
    assert schedule.steps == 3 and schedule.shift is None and schedule.times == (1.0, 0.757, 0.522, 0.0)
    words = ["generate", "a red circle", f"model={world / 'student'}", "predictor=reuse"]
    words += ["schedule=found/schedule.json", "budget=2", "-o", "out.mp4"]
    made = CliRunner().invoke(app, [*words, "sigmas=[1,0.757,0.522,0]", "--json"])
    assert made.exit_code == 0, made.output
    report = json.loads(made.stdout)
    assert report["steps"] == 3 and report["shift"] is None and report["passes"] == {"full": 2, "predicted": 1}
    assert report["times"] == [1.0, 0.757, 0.522, 0.0]
    assert "the times 1, 0.757, 0.522, 0 (of the settings; by flow-match Euler)" in made.stderr
    other = CliRunner().invoke(app, [*words, "sigmas=[1,0.9,0.5]"])
    assert other.exit_code == 2 and "the schedule is for the grid of the times 1, 0.757, 0.522, 0" in other.stderr
    for wrong, why in (
        ("steps=4", "steps is 3 or left out: sigmas says it"),
        ("shift=3", "shift goes without sigmas"),
        ("timesteps=[1000,500]", "timesteps goes without sigmas"),
    ):
        refused = CliRunner().invoke(app, [*words, "sigmas=[1,0.757,0.522]", wrong])
        assert refused.exit_code == 2 and why in refused.stderr


def test_the_command_at_the_end_has_all_that_the_model_was_loaded_with(monkeypatch):
    from vidaccel.cli.train_predictor import _generating

    monkeypatch.setenv("HOME", str(Path.cwd()))
    Path("student.safetensors").touch()
    of_file = PredictorConfig(student="~/student.safetensors", model="base", lora=["a.safetensors:1", "b.safetensors"])
    file = Path.cwd() / "student.safetensors"
    given = f"PROMPT model=base student={file} lora=[a.safetensors:1,b.safetensors] predictor=out"
    assert _generating(of_file, Path("out"), [every(4, 2)]) == f"`vidaccel generate {given} budget=2 steps=4`"
    listed = PredictorConfig(student="student", forecaster="reuse", timesteps=[1000, 500])
    given = "PROMPT model=student predictor=reuse schedule=out/schedule.json budget=1 timesteps=[1000,500]"
    assert _generating(listed, Path("out"), [every(2, 2)]) == f"`vidaccel generate {given}`"  # one word each


@pytest.mark.parametrize("forecaster", ["learned", "reuse", "multistep"])
def test_a_model_that_no_file_is_given_with_is_refused(forecaster):
    result = CliRunner().invoke(app, ["train-predictor", f"forecaster={forecaster}", "model=mine", "-o", "out"])
    assert result.exit_code == 2 and "error: model=mine is for a student that is a file" in result.stderr
    assert "hint: name what the predictor is for as student=" in result.stderr and not Path("out").exists()
