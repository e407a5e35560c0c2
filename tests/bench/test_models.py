"""Which model a row runs on, and what it says where there is none."""

import pytest

from vidaccel.bench.models import Models
from vidaccel.bench.own_model import resolved
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


def test_a_student_that_stands_in_for_the_model_in_one_pass_is_said():
    methods = {"one": MethodConfig(weights="teacher"), "two": MethodConfig(weights="teacher", two_pass=True)}
    named = {"model": "sprites/teacher", "student": "sprites/student", "dtype": "float32"}
    alone, beside = (Models(BenchmarkConfig(**named, distilled=other), "cpu") for other in (None, "runs/cfg"))
    methods, lacking = resolved(methods, alone)
    said = alone.student_stands_for_teacher(methods, lacking)
    assert said is not None and said.startswith("one: on sprites/student at r = t, ") and "distilled=" in said
    assert beside.student_stands_for_teacher(methods, {}) is None
    assert alone.student_stands_for_teacher(methods, {"one"}) is None
