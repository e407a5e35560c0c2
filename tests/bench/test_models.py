"""Which model a row runs on, and what it says where there is none."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from tests.models.test_adapters import comfyui
from tests.students import save_teacher
from vidaccel.bench.models import Models
from vidaccel.bench.output_folder import parents
from vidaccel.bench.own_model import fitted, resolved
from vidaccel.bench.reports.wording import in_words
from vidaccel.cache.schedule import every, write_schedules
from vidaccel.config.benchmark import BenchmarkConfig, MethodConfig
from vidaccel.errors import UserError


def test_without_a_student_the_teacher_runs_in_two_passes_and_the_others_say_why():
    models = Models(BenchmarkConfig(model="sprites/teacher", student="sprites/nobody", dtype="float32"), "cpu")
    assert models.pipeline(MethodConfig(weights="teacher", two_pass=True)).family.name == "hunyuan_video"
    missing = "no model is shipped as sprites/nobody"
    for weights, message in (
        ("student", missing),
        ("teacher", f"a single pass of the teacher needs guidance distilled into it: {missing}"),
    ):
        with pytest.raises(UserError) as error:
            models.pipeline(MethodConfig(weights=weights))
        assert error.value.message == message
        assert "vidaccel distill" in error.value.hint


def test_rows_of_schedules_alone_name_their_folder_and_one_line_says_what_it_lacks(tmp_path):
    write_schedules(tmp_path / "schedule.json", [every(8, 2)])
    models = Models(BenchmarkConfig(model="a", student="b", predictor="sprites/predictor"), "cpu")
    here = str(tmp_path)
    rows = {
        "found": MethodConfig(steps=8, budget=4, on_skipped="reuse", predictor=here),
        "not searched": MethodConfig(steps=8, budget=3, on_skipped="taylor", predictor=here),
        "not named": MethodConfig(steps=8, budget=4, on_skipped="linear"),
        "no folder": MethodConfig(steps=8, budget=4, on_skipped="reuse", predictor="runs/nowhere"),
    }
    assert models.searched(rows["found"]).full_steps == (0, 2, 4, 6)
    assert resolved(rows, models) == (
        rows,
        {
            "not searched": "no schedule for budget=3 with steps=8",
            "not named": "no methods.NAME.predictor= is named",
            "no folder": "there is no predictor runs/nowhere",
        },
    )


def test_a_forecaster_is_made_once_for_each_way_of_sampling():
    models = Models(BenchmarkConfig(model="a", student="b", distilled="b"), "cpu")
    row, loaded = MethodConfig(steps=4, every=2, on_skipped="taylor"), SimpleNamespace(pipe=None, family=None)
    own = models._forecaster(row, loaded)
    assert models._forecaster(replace(row, decoder="narrow"), loaded) is own  # which changes no latent
    # Of one model, in two passes, and as the model of the instantaneous velocity that a student is.
    others = {"two_pass": True}, {"weights": "teacher"}, {"guidance": 2.0}, {"order": 2}
    assert len({id(made) for made in [own, *(models._forecaster(replace(row, **o), loaded) for o in others)]}) == 5
    models.begin(models.config)  # another benchmark, which may have other prompts to fit it to
    assert models._forecaster(row, loaded) is not own


def test_lora_files_are_of_the_model_and_of_rows_that_name_their_own():
    config = BenchmarkConfig(model="a", student="b", distilled="c", lora=["all.safetensors:0.5"])
    models, two = Models(config, "cpu"), {"weights": "teacher", "two_pass": True}
    own = {"model": "a", "lora": ["own.safetensors"]}
    expected = {
        ("a", "all.safetensors:0.5"): two,
        ("a",): two | {"lora": []},
        ("a", "own.safetensors"): own,
        ("b",): {},
        ("c",): {"weights": "teacher"},
    }
    assert [models.weights(MethodConfig(**row)) for row in expected.values()] == list(expected)


def test_a_row_with_a_lora_file_runs_on_a_model_of_its_own(tmp_path):
    save_teacher(tmp_path / "wan", "wan")
    save_file(comfyui(), tmp_path / "lora.safetensors")
    lora = [str(tmp_path / "lora.safetensors")]
    config = BenchmarkConfig(model=str(tmp_path / "wan"), family="wan", dtype="float32")
    models, row = Models(config, "cpu"), MethodConfig(model=config.model, guidance=1.0)
    plain, given = (models.pipeline(replace(row, lora=each)).pipe.transformer for each in (None, lora))
    assert plain is not given and plain is models.pipeline(row).pipe.transformer
    assert not torch.equal(plain.blocks[0].attn1.to_q.weight, given.blocks[0].attn1.to_q.weight)
    settings = {"model": config.model, "two_pass": True, "lora": lora}
    assert in_words({"settings": settings, "passes": None, "steps": 4, "on": "teacher"}) == (
        "wan, 4 steps of two passes, with lora.safetensors"
    )
    found = parents(replace(config, lora=lora), {"one": replace(row, lora=lora)})
    assert found.keys() == {"model", "lora.0", "one.model", "one.lora.0"} and found["lora.0"] == found["one.lora.0"]


@pytest.mark.parametrize(("said", "message"), [({"guidance_2": 3.0}, "has one transformer"), ({}, None)])
def test_what_two_passes_are_told_is_checked_and_said_before_anything_runs(said, message, caplog):
    config = BenchmarkConfig(
        model="sprites/teacher", student="sprites/student", negative_prompt="a dog", dtype="float32", **said
    )
    if message:
        with pytest.raises(UserError, match=message):
            fitted(config, Models(config, "cpu"))
    else:
        fitted(config, Models(config, "cpu"))
        assert "negative_prompt='a dog' is that of rows of two passes, and sprites/student was" in caplog.text


def test_a_student_that_stands_in_for_the_model_in_one_pass_is_said():
    methods = {"one": MethodConfig(weights="teacher"), "two": MethodConfig(weights="teacher", two_pass=True)}
    named = {"model": "sprites/teacher", "student": "sprites/student", "dtype": "float32"}
    alone, beside = (Models(BenchmarkConfig(**named, distilled=other), "cpu") for other in (None, "runs/cfg"))
    methods, lacking = resolved(methods, alone)
    said = alone.student_stands_for_teacher(methods, lacking)
    assert said is not None and said.startswith("one: on sprites/student at r = t, ") and "distilled=" in said
    assert beside.student_stands_for_teacher(methods, {}) is None
    assert alone.student_stands_for_teacher(methods, {"one"}) is None
