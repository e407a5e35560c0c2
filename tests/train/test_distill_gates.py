"""Clips in memory, clips that are kept out for the gates, and who said what a student is made for."""

import json
import logging
from dataclasses import replace
from functools import partial

import pytest
import torch

from tests.train.test_distill import logged, settings, world  # noqa: F401
from vidaccel.collect.bank import Bank
from vidaccel.collect.encode import encode_texts
from vidaccel.errors import UserError
from vidaccel.models.loading import load_pipeline
from vidaccel.train import distill as module
from vidaccel.train.clips import open_data, training_clips
from vidaccel.train.curves import draw_curves
from vidaccel.train.distill import distill
from vidaccel.train.methods.base import taken

BANK = {"bank": "on", "train": {"steps": 2}}


def test_clips_in_memory_train_as_those_of_the_folder_do(world, tmp_path):  # noqa: F811
    distill(settings(world, "wan", train={"steps": 2}), tmp_path / "folder", "cpu")
    distill(settings(world, "wan", **BANK), tmp_path / "memory", "cpu")
    # A bank holds texts in what they are stored in, and Wan's are not cut: the same numbers.
    assert logged(tmp_path / "memory", "loss") == pytest.approx(logged(tmp_path / "folder", "loss"), rel=1e-4)


def test_gates_are_of_clips_that_are_kept_out_and_stand_on_the_card(world, tmp_path, caplog):  # noqa: F811
    caplog.set_level(logging.INFO)
    distill(settings(world, "hunyuan_video", gate_samples=2, **BANK), tmp_path / "cfg", "cpu")
    gates = json.loads((tmp_path / "cfg" / "gates.json").read_text())
    assert gates["samples"] == 1  # of three clips not more than one
    assert "the last 1 of 3 clips are kept out" in caplog.text
    assert gates["guidance_gap"]["closed"].keys() == {"1.5", "2", "3", "4"}
    assert "below its gate of 0.45" in caplog.text  # two steps teach nothing
    card = (tmp_path / "cfg" / "README.md").read_text()
    assert "## How far it has learnt" in card and "guidance gap closed" in card

    few = settings(world, "hunyuan_video", method="mean_velocity", gate_samples=1, gate_runs=0, **BANK)
    distill(few, tmp_path / "few", "cpu")
    assert json.loads((tmp_path / "few" / "gates.json").read_text())["mean_velocity_gap"] == {}
    looking = replace(few, train=replace(few.train, gates_every=1))
    with pytest.raises(UserError, match="gates_every=1, and gates of method=mean_velocity are taken on runs"):
        distill(looking, tmp_path / "looking", "cpu")


def test_gates_on_the_way_are_curves_and_change_nothing_else(world, tmp_path):  # noqa: F811
    train = {"steps": 3, "log_every": 2}
    own = {"bank": "on", "gate_samples": 1, "guidance_range": [1.0, 4.0]}
    distill(settings(world, "hunyuan_video", **own, train=train), tmp_path / "plain", "cpu")
    distill(settings(world, "hunyuan_video", **own, train=train | {"gates_every": 1}), tmp_path / "looked", "cpu")
    lines = [json.loads(line) for line in (tmp_path / "looked" / "metrics.jsonl").read_text().splitlines()]
    names = {f"guidance_gap_closed/g={g}" for g in ("1.5", "2", "3", "4")}
    assert [line["step"] for line in lines] == [1, 2, 3] and all(names <= line.keys() for line in lines)
    at_the_end = json.loads((tmp_path / "looked" / "gates.json").read_text())["guidance_gap"]["closed"]
    assert lines[-1]["guidance_gap_closed/g=3"] == pytest.approx(at_the_end["3"], abs=1e-6)
    assert (tmp_path / "looked" / "gates.png").read_bytes().startswith(b"\x89PNG")
    assert not (tmp_path / "plain" / "gates.png").exists()
    for name in ("gates.json", "transformer/diffusion_pytorch_model.safetensors"):
        assert (tmp_path / "looked" / name).read_bytes() == (tmp_path / "plain" / name).read_bytes()


def test_gates_that_fail_cost_a_warning_each_and_no_training(world, tmp_path, caplog, monkeypatch):  # noqa: F811
    def failing(task, held_out):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(module, "method_of", lambda name, own=module.method_of: replace(own(name), gates=failing))
    train = {"steps": 2, "gates_every": 1}
    (tmp_path / "student").mkdir()
    (tmp_path / "student" / "gates.json").write_text("{}")  # of fewer steps, which were made before
    distill(settings(world, "hunyuan_video", bank="on", gate_samples=1, train=train), tmp_path / "student", "cpu")
    assert "the look at step 2 failed (failure 2); training goes on: out of memory" in caplog.text
    assert "computing the gates failed (failure 1); the student is saved: out of memory" in caplog.text
    assert logged(tmp_path / "student", "step") == [1, 2] and not (tmp_path / "student" / "gates.json").exists()
    assert load_pipeline(tmp_path / "student").conditioning is not None


def test_curves_go_on_where_a_number_is_missing(tmp_path):
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text(
        '{"step": 1, "loss": 2}\n{"step": 2, "gap/a": 0.5, "other/b": null}\n{"step": 3, "other/b": 1}\n'
    )
    draw_curves(metrics, ["gap/a", "other/b"], tmp_path / "drawn.png")
    assert (tmp_path / "drawn.png").stat().st_size > 1000


def test_without_gates_nothing_is_kept_out(world, tmp_path):  # noqa: F811
    distill(settings(world, "hunyuan_video", train={"steps": 1}), tmp_path / "plain", "cpu")
    assert not (tmp_path / "plain" / "gates.json").exists()
    assert "How far it has learnt" not in (tmp_path / "plain" / "README.md").read_text()


def test_who_said_what_the_student_is_made_for(world, tmp_path, caplog):  # noqa: F811
    caplog.set_level(logging.INFO)
    distill(settings(world, "wan", guidance=2.5, train={"steps": 1}), tmp_path / "student", "cpu")
    (line,) = [record.getMessage() for record in caplog.records if "is made for" in record.getMessage()]
    assert "guidance=2.5 (of the settings)" in line
    assert "height=32" in line and ("(of the features)" in line or "(of the model)" in line)


@pytest.mark.parametrize("device, bank, free", [("cuda", "auto", 1), ("cuda", "auto", 2**40), ("cpu", "off", 0)])
def test_of_clips_that_memory_is_not_for_only_those_of_the_gates_lie_there(world, monkeypatch, device, bank, free):  # noqa: F811
    config = settings(world, "wan", bank=bank, gate_samples=2)
    loaded = load_pipeline(config.teacher)
    data, made_of = open_data(loaded, config)
    loads, of = [], Bank.of
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, free))
    monkeypatch.setattr(
        Bank,
        "of",
        lambda features, *others: loads.append(len(features)) or of(features, torch.device("cpu"), *others[1:]),
    )
    unconditional = partial(encode_texts, loaded, [""])
    clips = training_clips(loaded, config, data, made_of, torch.device(device), unconditional)
    whole = free > 1
    assert loads == ([3] if whole else [1]) and isinstance(clips.data, Bank) == whole
    assert len(clips.data) == 2 and len(clips.held_out) == 1 and clips.made_of["kept_out"] == 1
    last = data[2][0]["latent"]
    assert torch.equal(clips.held_out.latents[0], last)
    assert not any(torch.equal(taken_by(clips.data, i), last) for i in range(2))


def taken_by(data, index: int) -> torch.Tensor:
    return taken(data, [index], torch.device("cpu"))["latent"][0]


def test_one_clip_leaves_none_to_keep_out(world):  # noqa: F811
    config = settings(world, "wan", gate_samples=4, bank="on")
    loaded = load_pipeline(config.teacher)
    data, made_of = open_data(loaded, config)
    unconditional = partial(encode_texts, loaded, [""])
    clips = training_clips(loaded, config, data.part([0]), made_of, torch.device("cpu"), unconditional)
    assert len(clips.data) == 1 and clips.held_out is None
