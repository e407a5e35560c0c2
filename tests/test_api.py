"""`import vidaccel`: every public function through real files, and what they and the commands have in common."""

import inspect
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest

import vidaccel
from tests.bench.conftest import schema  # noqa: F401 (a fixture)
from tests.students import student
from tests.tiny import SIZE
from tests.train.test_distill import write_features
from vidaccel import api
from vidaccel.cli import benchmark, collect_features, distill, train_predictor
from vidaccel.config.generate import GenerateConfig
from vidaccel.config.loader import SCHEMAS, load, settings_of
from vidaccel.errors import UserError
from vidaccel.models.loading import load_pipeline
from vidaccel.sampling import generate, predicted_steps

# ruff: noqa: F811 (fixtures)

TRAIN = {"steps": 2, "batch_size": 2, "warmup": 0, "log_every": 1}
COMMANDS = {
    "collect-features": (api.collect_features, collect_features.collect_features),
    "distill": (api.distill, distill.distill),
    "train-predictor": (api.train_predictor, train_predictor.train_predictor),
    "benchmark": (api.benchmark, benchmark.benchmark),
}


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """A folder with a student of a tiny Wan, its teacher, and features for them."""
    folder = tmp_path_factory.mktemp("world")
    write_features(folder / "features", load_pipeline(student(folder, "wan")))
    return folder


def test_importing_it_loads_nothing_heavy():
    code = "import sys, vidaccel; dir(vidaccel), vidaccel.UserError, vidaccel.generate; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"torch", "diffusers", "numpy", "hydra", "omegaconf"} & set(done.stdout.split())


def test_the_public_names_are_there_and_as_the_stub_says():
    assert set(vidaccel.__all__) <= set(dir(vidaccel))
    for name in vidaccel.__all__:
        assert getattr(vidaccel, name) is not None
    stub = (Path(vidaccel.__file__).parent / "__init__.pyi").read_text()
    said = {f"from {module} import {name} as {name}" for name, module in vidaccel._MODULES.items()}
    assert said | {"__version__: str", ""} == set(stub.splitlines())
    with pytest.raises(AttributeError, match="no attribute 'generat'"):
        _ = vidaccel.generat
    assert (Path(vidaccel.__file__).parent / "py.typed").exists()


@pytest.mark.parametrize("command", COMMANDS)
def test_the_commands_functions_are_called_alike(command):
    function, _ = COMMANDS[command]
    given = list(inspect.signature(function).parameters.values())
    assert [p.name for p in given[:3]] == ["config", "output", "device"]
    assert [p.kind for p in given[:2]] == [inspect.Parameter.POSITIONAL_OR_KEYWORD] * 2
    assert all(p.kind is inspect.Parameter.KEYWORD_ONLY for p in given[2:-1])
    assert (given[-1].name, given[-1].kind) == ("overrides", inspect.Parameter.VAR_KEYWORD)
    assert given[2].default == "auto"


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_has_each_parameter_of_its_function(command):
    function, of_command = COMMANDS[command]
    known = inspect.signature(of_command).parameters.keys() | {"config", "command", "overrides"}
    assert inspect.signature(function).parameters.keys() <= known


@pytest.mark.parametrize("command", [*COMMANDS, "generate", "plan"])
def test_no_setting_is_hidden_by_a_parameter(command):
    function = getattr(api, command.replace("-", "_"))
    settings = {field.name for field in fields(SCHEMAS["benchmark" if command == "plan" else command])}
    assert not settings & inspect.signature(function).parameters.keys()


# settings


def test_settings_are_a_name_a_file_or_the_dataclass(tmp_path):
    (tmp_path / "mine.yaml").write_text("defaults: [teacher, _self_]\nsteps: 3\n")
    assert settings_of("generate", "teacher", {}) == load("generate", GenerateConfig, "teacher")
    assert settings_of("generate", tmp_path / "mine.yaml", {"guidance": 2}).steps == 3
    own = GenerateConfig(steps=7)
    assert settings_of("generate", own, {"full_steps": (0, 2)}).full_steps == [0, 2] and own.full_steps is None
    assert settings_of("generate", own, {"model": tmp_path}).model == str(tmp_path)


@pytest.mark.parametrize("changes", [{"train.steps": 5}, {"train": {"steps": 5}}])
def test_a_setting_in_a_group_leaves_the_others(changes):
    before, after = (settings_of("distill", "sprites/cfg", given) for given in ({}, changes))
    assert after.train.steps == 5 != before.train.steps
    assert after.train.batch_size == before.train.batch_size


def test_text_is_never_taken_for_anything_else():
    for text in ("null", "it's, a", "[1]", "1e3"):
        assert settings_of("generate", "teacher", {"model": text}).model == text


def test_rows_are_added_by_name():
    rows = settings_of("benchmark", "wan_1.3b", {"methods": {"my-row.2": {"steps": 6}}}).methods
    assert rows["my-row.2"].steps == 6 and len(rows) > 1


@pytest.mark.parametrize(
    ("config", "changes", "message"),
    [
        ("techer", {}, 'no configuration "techer" for generate'),
        ("nowhere.yaml", {}, "no configuration file nowhere.yaml"),
        ("teacher", {"stpes": 3}, 'there is no setting "stpes"'),
        ("teacher", {"steps": 0}, "steps=0 is not possible"),
        ("teacher", {"steps": "many"}, "steps: "),
        ("teacher", {"steps": object()}, "steps: "),
        ("teacher", {"steps.of": 3}, "steps"),
        (3, {}, "int is not what generate is configured by"),
    ],
)
def test_mistakes_in_settings_are_said(config, changes, message):
    with pytest.raises(UserError) as caught:
        settings_of("generate", config, changes)
    assert message in caught.value.message and caught.value.hint


# functions


def test_generate_gives_the_frames_that_the_command_writes(world):
    prompts = ["a red circle", "a blue square"]
    made = vidaccel.generate(prompts, model=world / "student", steps=2, seed=3)
    assert [frames.shape for frames in made] == [(SIZE["num_frames"], 32, 32, 3)] * 2
    assert all(frames.dtype == np.uint8 for frames in made)
    alone = vidaccel.generate(prompts[1], GenerateConfig(model=str(world / "student"), steps=2, seed=4))
    assert np.array_equal(alone, made[1]) and not np.array_equal(*made)


def test_generate_uses_the_predictor_that_is_named_and_leaves_none_behind(world):
    given = {"model": world / "student", "steps": 4}
    full = vidaccel.generate("a red circle", **given)
    predicted = vidaccel.generate("a red circle", **given, predictor="reuse", every=2)
    config = GenerateConfig(model=str(world / "student"), steps=4, predictor="reuse", full_steps=[0, 2])
    loaded = load_pipeline(config.model)
    with predicted_steps(loaded, config) as attachment:
        expected = generate(loaded, ["a red circle"], config, [0], attachment).frames[0]
    assert np.array_equal(predicted, expected) and not np.array_equal(full, predicted)
    assert np.array_equal(vidaccel.generate("a red circle", **given), full)


def test_generate_of_the_shipped_model_takes_back_its_own_schedule():
    few = vidaccel.generate("a red circle moving right on black", steps=4, every=2)
    assert few.ndim == 4 and few.dtype == np.uint8


def test_collect_features(tmp_path):
    planned = vidaccel.collect_features("sprites", None, dry_run=True, clips=2)
    assert not any(tmp_path.iterdir())
    made = vidaccel.collect_features("sprites", tmp_path / "features", clips=2)
    assert made == planned and made.count == 2 and (tmp_path / "features" / "run.json").exists()


def test_distill(world, tmp_path):
    made = vidaccel.distill(
        "sprites/cfg", tmp_path / "cfg", teacher=world / "teacher", features=world / "features", train=TRAIN
    )
    assert made == tmp_path / "cfg"
    assert vidaccel.generate("a red circle", model=made, steps=2).shape == (SIZE["num_frames"], 32, 32, 3)


def test_train_predictor_is_attached_from_its_folder(world, tmp_path):
    small = {"student": world / "student", "features": world / "features", "blocks": 1, "search_prompts": 2}
    small |= {"discriminator.width": 8, "pairs": "data", "history": 1, "mse": TRAIN, "adversarial": TRAIN}
    schedules = vidaccel.train_predictor("sprites", tmp_path / "predictor", **small)
    assert [schedule.budget for schedule in schedules] == [1, 2, 3, 4]
    assert isinstance(schedules[0], vidaccel.Schedule)
    predictor = vidaccel.Predictor.from_pretrained(tmp_path / "predictor")
    assert predictor.config.blocks == 1
    loaded = vidaccel.load_pipeline(world / "student")
    with vidaccel.attach(loaded, predictor=tmp_path / "predictor", steps=4, budget=2):
        pass


def test_benchmark(world, schema, tmp_path):
    conf = "family: wan\nbaseline: full\nmethods: {full: {steps: 2}}\nsizes: [[5, 32, 32]]\n"
    (tmp_path / "mine.yaml").write_text(conf)
    quick = {"rounds": 2, "timed_seconds": 0, "prompts": ["a red circle"], "timed_prompts": 1}
    quick |= {"model": world / "student", "student": world / "student"}
    quick |= {"methods": {"reuse": {"steps": 2, "full_steps": [0], "on_skipped": "trunk"}}}
    results = vidaccel.benchmark(tmp_path / "mine.yaml", tmp_path / "bench", **quick)
    schema.validate(results)
    assert [(run["method"], run["error"]) for run in results["runs"]] == [("full", None), ("reuse", None)]
    assert (tmp_path / "bench" / "results.json").exists() and results["command"] == "vidaccel.benchmark"


def test_plan(schema):
    results = vidaccel.plan("wan_1.3b", only=["student-8"])
    schema.validate(results)
    assert [run["method"] for run in results["runs"]] == ["cfg-50", "student-8"]


def test_errors_are_a_users():
    with pytest.raises(UserError, match="compare_to=sprites/teacher is for .*--compare"):
        vidaccel.generate("a red circle", compare_to="sprites/teacher")
    for wrong in (
        lambda: vidaccel.generate("a red circle", model="nowhere/at-all"),
        lambda: vidaccel.generate("a red circle", device="gpu7"),
        lambda: vidaccel.collect_features("sprites", None),
        lambda: vidaccel.distill("sprites/no", "out"),
        lambda: vidaccel.train_predictor("sprites", "out", blokcs=1),
        lambda: vidaccel.benchmark("sprites", "out", only=["zzz"]),
        lambda: vidaccel.plan("sprites", family="none"),
    ):
        with pytest.raises(vidaccel.UserError) as caught:
            wrong()
        assert caught.value.hint
