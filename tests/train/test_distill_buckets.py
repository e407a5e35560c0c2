"""Clips of several sizes in one folder: batches of one size, and a student called for the size that most have."""

import json
import re
from dataclasses import replace
from datetime import UTC, datetime

import pytest
import torch

from tests.students import save_teacher
from tests.train.test_distill import CAPTIONS, TRAIN
from vidaccel.artefacts import write_run
from vidaccel.collect.encode import encode_texts, rows
from vidaccel.config.distill import DistillConfig
from vidaccel.config.predictor import PredictorConfig
from vidaccel.config.training import TrainConfig
from vidaccel.data.shards import write_shards
from vidaccel.errors import UserError
from vidaccel.models.loading import load_pipeline
from vidaccel.models.weight_hashes import encoder_hashes
from vidaccel.train.distill import distill
from vidaccel.train.methods import base
from vidaccel.train.methods.base import Distillation, drawn
from vidaccel.train.objective import generator_for
from vidaccel.train.predictor import training
from vidaccel.train.predictor.loss import PredictorLoss
from vidaccel.train.predictor.served import Starts
from vidaccel.train.predictor.task import task_of

SIZES = [(5, 32, 32), (5, 32, 48), (5, 32, 48), (5, 32, 48), (5, 32, 32)]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A Wan, and features of two sizes, the second the more common."""
    folder = tmp_path_factory.mktemp("buckets")
    loaded = load_pipeline(save_teacher(folder / "wan", "wan"))
    generator = torch.Generator().manual_seed(0)
    captions = [CAPTIONS[i % 3] for i in range(len(SIZES))]
    samples = rows(loaded, encode_texts(loaded, captions), [{"caption": c, "fps": 8} for c in captions], "float32")
    for (tensors, _), (_, height, width) in zip(samples, SIZES, strict=True):
        tensors["latent"] = torch.randn(4, 2, height // 8, width // 8, generator=generator)
    made = {"count": len(SIZES), "kind": "encoded", "settings": {}, "sizes": SIZES}
    write_shards(folder / "features", lambda indices: [samples[i] for i in indices], **made)
    about = {"format": "features/1", "command": "test", "config": {}, "seed": 0, "started": datetime.now(UTC)}
    write_run(folder / "features", **about, made_with=encoder_hashes(loaded), kind="encoded")
    return folder


def config(model, **changes) -> DistillConfig:
    own = {"teacher": str(model / "wan"), "features": str(model / "features"), "sample_steps": 3}
    return DistillConfig(**own | {"train": TrainConfig(**TRAIN | {"steps": 4})} | changes)


def test_batches_are_of_one_size_each(model, tmp_path, monkeypatch, caplog):
    caplog.set_level("INFO")
    shapes, draw = [], Distillation.draw

    def noted(task, index, generator):
        drawn = draw(task, index, generator)
        if index < 10**9:
            shapes.append(tuple(drawn[0].shape))
        return drawn

    monkeypatch.setattr(Distillation, "draw", noted)
    distill(config(model), tmp_path / "cfg")
    # Of an epoch of three batches two are of the larger clips.
    assert len(shapes) == 4 and sorted(shapes[:3]) == [(2, 4, 2, 4, 4), (2, 4, 2, 4, 6), (2, 4, 2, 4, 6)]
    assert "clips of 2 sizes, batches of one each" in caplog.text
    call = json.loads((tmp_path / "cfg" / "run.json").read_text())["call"]
    assert [call[name] for name in ("num_frames", "height", "width")] == [5, 32, 48]


def test_a_bank_is_of_one_size(model, tmp_path):
    with pytest.raises(UserError, match="have 2 sizes, and a bank is of one"):
        distill(config(model, bank="on"), tmp_path / "out")


def test_gates_are_of_clips_of_the_size_that_most_have_which_nothing_learns_from(model, tmp_path, monkeypatch):
    seen = []

    def noted(data, index, count, seed):
        seen.append(drawn(data, index, count, seed))
        return seen[-1]

    monkeypatch.setattr(base, "drawn", noted)
    distill(config(model, gate_samples=1), tmp_path / "cfg")
    assert {sample for batch in seen for sample in batch} == {0, 1, 2, 4}  # the last of the three is the third
    gates = json.loads((tmp_path / "cfg" / "gates.json").read_text())
    assert gates["samples"] == 1 and gates["guidance_gap"]["closed"]


class Clips:
    """In the place of a folder's: random frames of the size that each is brought to."""

    captions, sizes, fps = [CAPTIONS[i % 3] for i in range(len(SIZES))], SIZES, 8

    def __init__(self, folder):
        self.folder, self.files = folder, [f"{i}.mp4" for i in range(len(SIZES))]
        for file in self.files:
            (folder / file).touch()

    def __len__(self):
        return len(SIZES)

    def __getitem__(self, index):
        return torch.rand(3, *SIZES[index], generator=torch.Generator().manual_seed(index)) * 2 - 1, ""


def test_clips_of_several_sizes_are_encoded_while_training(model, tmp_path, monkeypatch):
    asked = []

    def opened(folder, **size):
        asked.append(size["sizes"])
        return Clips(tmp_path)

    monkeypatch.setattr("vidaccel.collect.source.ClipFolder", opened)
    shapes, take = [], base.taken

    def noted(data, chosen, device):
        shapes.append(take(data, chosen, device)["latent"].shape[1:])
        return take(data, chosen, device)

    monkeypatch.setattr(base, "taken", noted)
    sizes = [[5, 32, 32], [5, 32, 48]]
    distill(config(model, features=None, data="clips", sizes=sizes, gate_samples=1), tmp_path / "cfg")
    assert asked == [tuple(map(tuple, sizes))] and set(shapes) == {(4, 2, 4, 4), (4, 2, 4, 6)}
    call = json.loads((tmp_path / "cfg" / "run.json").read_text())["call"]
    assert [call[name] for name in ("num_frames", "height", "width")] == [5, 32, 48]
    assert json.loads((tmp_path / "cfg" / "gates.json").read_text())["samples"] == 1


@pytest.mark.parametrize(
    "asked, rule",
    [
        ({"sizes": [[5, 32, 32]]}, "goes with data=, without features"),
        ({"features": None, "data": "clips", "sizes": [[5, 32, 32]], "height": 32}, "without num_frames, height"),
        ({"features": None, "data": "clips", "sizes": [[5, 32]]}, r"is a list of \[frames, height, width\]"),
        (
            {"method": "decoder", "features": None, "data": "clips", "sizes": [[5, 32, 32]]},
            "a decoder is taught by clips of one size",
        ),
    ],
)
def test_sizes_that_make_no_sense_are_refused(model, asked, rule):
    with pytest.raises(UserError) as error:
        config(model, **asked)
    assert re.search(rule, f"{error.value.message}; {error.value.hint}")


def of_predictor(model, **asked) -> PredictorConfig:
    stage = TrainConfig(**TRAIN)
    own = {"student": str(model / "wan"), "features": str(model / "features"), "guidance": 1.0, "shift": 3.0}
    return PredictorConfig(**own, blocks=1, mse=stage, adversarial=replace(stage, steps=0), **asked)


def test_a_predictor_learns_from_batches_of_one_size_each_and_serves_that_which_most_have(model, caplog):
    caplog.set_level("INFO")
    task = task_of(load_pipeline(model / "wan"), of_predictor(model), None)
    assert "clips of 2 sizes, batches of one each" in caplog.text and len(task.data) == 5
    with task.trunks:
        predictor, pairs = training._start(task)
        loss, shapes = PredictorLoss(task.student, task.trunks, predictor), []
        for index in range(3):
            pair = pairs.draw(index, 2, index, generator_for(0, index))
            shapes.append(tuple(pair.x.shape))
            assert loss(pair)[0].isfinite()
    assert sorted(shapes) == [(2, 4, 2, 4, 4), (2, 4, 2, 4, 6), (2, 4, 2, 4, 6)]
    assert len(task.samples) == 3 and Starts.of(task, 9).shape == (4, 2, 4, 6)


@pytest.mark.parametrize("asked", [{"forecaster": "reuse"}, {"stage": "search"}])
def test_schedules_are_searched_on_those_of_the_size_that_most_have(model, asked):
    task = task_of(load_pipeline(model / "wan"), of_predictor(model, **asked), None)
    assert len(task.data) == 3 and {task.data[i][0]["latent"].shape[-1] for i in range(3)} == {6}
