"""Which model a row runs on, and what it says where there is none."""

import pytest

from vidaccel.bench.models import Models
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
