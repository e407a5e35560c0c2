"""Methods are found by their line in one table, and their settings without torch."""

import json
import pkgutil
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from tests.train.methods import toy
from tests.train.methods.toy_settings import ToyTraining
from tests.train.test_distill import TRAIN, logged, settings, world  # noqa: F401  world is a fixture
from vidaccel.config import loader
from vidaccel.config.distill import DistillConfig, with_method_groups
from vidaccel.config.explained import explain
from vidaccel.config.training import TrainConfig
from vidaccel.errors import UserError
from vidaccel.models.loading import load_pipeline
from vidaccel.train.distill import distill
from vidaccel.train.methods import METHODS, Entry, method_of
from vidaccel.train.methods.base import Method, OtherTraining
from vidaccel.train.methods.decoder import DecoderTraining
from vidaccel.train.methods.mean_velocity.settings import TARGETS, MeanVelocityTraining
from vidaccel.train.methods.mean_velocity.target import Target


@pytest.fixture
def schema(monkeypatch):
    """The settings of `vidaccel distill` with the toy method in the table."""
    entry = Entry("tests.train.methods.toy:METHOD", "tests.train.methods.toy_settings:ToyTraining")
    monkeypatch.setitem(METHODS, "toy", entry)
    return with_method_groups(DistillConfig)


@pytest.mark.parametrize("name", METHODS)
def test_each_line_names_a_method(name):
    method, config = method_of(name), DistillConfig(method=name)
    if isinstance(method, OtherTraining):
        assert callable(method.run) and callable(pkgutil.resolve_name(method.plan)) and method.format.endswith("/1")
    else:
        assert isinstance(method, Method) and method.embeds in ("r", "g")
    assert (config.own_settings is None) == (METHODS[name].settings is None)


def test_the_table_and_all_settings_import_no_torch():
    code = "import sys, vidaccel.config.distill, vidaccel.train.methods; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"


def test_a_method_is_added_by_its_line(world, schema, tmp_path):  # noqa: F811
    """Its group of settings, its checks, its embedding and its loss; a run of two steps that ends in a model."""
    toy.SEEN.clear()
    teacher, features = world("wan")
    places = {"teacher": str(teacher), "features": str(features), "train": TrainConfig(**TRAIN)}
    config = schema(method="toy", toy=ToyTraining(end=0.25), sample_steps=2, **places)
    distill(config, tmp_path / "student", "cpu")
    assert toy.SEEN == ["preflight"]
    assert logged(tmp_path / "student", "end") == [0.25, 0.25]
    student = load_pipeline(tmp_path / "student")
    assert (student.conditioning.config.embeds, student.conditioning.config.restrict) == (("r",), 0.25)
    assert json.loads((tmp_path / "student" / "run.json").read_text())["config"]["toy"] == {"end": 0.25}
    with pytest.raises(UserError, match="knows r already"):
        distill(replace(config, teacher=str(tmp_path / "student")), tmp_path / "again", "cpu")
    with pytest.raises(UserError, match="toy.end was 0.25, now 0.5"):
        distill(replace(config, toy=ToyTraining()), tmp_path / "student", "cpu")


def test_its_settings_are_a_group_in_yaml_and_in_overrides(schema, tmp_path, caplog):
    (tmp_path / "mine.yaml").write_text("method: toy\ntoy: {finish: 0.75}\n")
    config = loader.load("distill", schema, str(tmp_path / "mine.yaml"))
    assert config.own_settings == ToyTraining(end=0.75)
    assert '"finish" is called "end" now' in caplog.text
    assert loader.load("distill", schema, str(tmp_path / "mine.yaml"), ["toy.end=0.1"]).toy.end == 0.1
    with pytest.raises(UserError, match="end=3.0 is not possible"):
        loader.load("distill", schema, str(tmp_path / "mine.yaml"), ["toy.end=3.0"])
    with pytest.raises(UserError, match='there is no setting "toy.ends"'):
        loader.load("distill", schema, str(tmp_path / "mine.yaml"), ["toy.ends=0.1"])


def test_a_method_that_is_not_there():
    with pytest.raises(UserError, match="method='toy' is not possible") as error:
        DistillConfig(method="toy")
    assert error.value.hint == "method is cfg or decoder or mean_velocity"


def test_a_run_does_not_care_for_the_settings_of_other_methods(world, schema, tmp_path):  # noqa: F811
    """Nor for whether there are any: one that was begun before a method was added goes on."""
    plain = settings(world, "wan")
    distill(plain, tmp_path / "student", "cpu")
    more = {name: getattr(plain, name) for name in ("teacher", "features", "train")}
    distill(schema(**more), tmp_path / "student", "cpu")
    state = next((tmp_path / "student" / "checkpoints").glob("step-*/state.json"))
    recorded = json.loads(state.read_text())
    recorded["identity"] |= {"settings.toy.end": 0.1}  # as earlier versions wrote the groups of all methods
    state.write_text(json.dumps(recorded))
    distill(schema(**more), tmp_path / "student", "cpu")


SOME = {
    "bank": "on",
    "lora": ["a"],
    "denoiser": "transformer",
    "merge_lora": False,
    "prompts": ["a"],
    "times": "uniform",
}
NUMBERS = dict.fromkeys(("guidance", "shift", "train_shift", "embedding_rate"), 2.0)
COUNTS = dict.fromkeys(("sample_steps", "gate_samples", "gate_runs"), 3)
OF_STUDENTS = SOME | NUMBERS | COUNTS | {"guidance_range": [1.0, 2.0], "negative_prompt": "a"}
CHANGED = [("decoder", name, value) for name, value in OF_STUDENTS.items()] + [
    ("decoder", "train", TrainConfig(lora_rank=2)),
    ("decoder", "train", TrainConfig(gates_every=2)),
    ("decoder", "mean_velocity", MeanVelocityTraining(restrict=0.4)),
    ("cfg", "gate_runs", 3),
    ("cfg", "mean_velocity", MeanVelocityTraining(restrict=0.4)),
    ("mean_velocity", "decoder", DecoderTraining(width=0.4)),
]


@pytest.mark.parametrize(("method", "name", "value"), CHANGED, ids=lambda value: str(value)[:24])
def test_a_setting_that_means_nothing_to_a_method_is_refused(method, name, value):
    with pytest.raises(UserError, match=rf"^{name}[\w.]*=.* means nothing to method={method}: \w+") as error:
        DistillConfig(method=method, **{name: value})
    assert error.value.hint.startswith("leave it out")
    assert DistillConfig(method=method, **{name: getattr(DistillConfig(), name)}) == DistillConfig(method=method)


@pytest.mark.parametrize("name", METHODS)
def test_what_means_nothing_to_it_are_settings(name):
    for key in (key for keys in METHODS[name].unread.values() for key in keys):
        assert explain(DistillConfig, key).startswith(f"{key}: ")


def test_a_target_of_mean_velocity_is_added_by_its_line(world, monkeypatch, tmp_path):  # noqa: F811
    monkeypatch.setitem(TARGETS, "instant", f"{__name__}:INSTANT")
    own = MeanVelocityTraining(target="instant")
    distill(settings(world, "wan", method="mean_velocity", mean_velocity=own), tmp_path / "student", "cpu")
    assert all(torch.tensor(logged(tmp_path / "student", "loss")).isfinite())
    with pytest.raises(UserError, match="target='nothing' is not possible") as error:
        MeanVelocityTraining(target="nothing")
    assert error.value.hint == "target is one of rollout, derivative, instant"


INSTANT = Target(lambda at, settings: at.teacher(at.x, at.t, at.t).detach())
"""The velocity at t, whatever the interval."""
