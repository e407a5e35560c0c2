"""Rows of equal compute and own full runs, by hand."""

import pytest

from vidaccel.bench.counterparts import (
    as_timed,
    by_flops,
    compared_with,
    equal_row,
    few_step_rows,
    own_row,
    own_runs,
    references,
    training_free,
)
from vidaccel.bench.rows import Row
from vidaccel.config.benchmark import MethodConfig

SIZE = (5, 32, 32)
SIX = MethodConfig(steps=20, budget=6)
"""With c = 0.07 as much as 6 + 14 x 0.07 = 6.98 full passes."""
METHODS = {
    "cfg-50": MethodConfig(weights="teacher", two_pass=True),
    "student-20": MethodConfig(steps=20),
    "six": SIX,
    "reuse": MethodConfig(steps=20, full_steps=[0, 5, 9], on_skipped="reuse"),
    "tea": MethodConfig(steps=20, cache="teacache", settings={"threshold": 0.1}),
}


def counted(name: str, method: MethodConfig, full: int, flops: float) -> Row:
    passes = {"full": full, "predicted": method.steps - full, "skipped": 0}
    return Row(name, method, SIZE, counts={"flops": flops, "passes": passes})


@pytest.fixture
def rows() -> list[Row]:
    amounts = {"cfg-50": (100, 10000), "student-20": (20, 2020), "six": (6, 704.98), "reuse": (3, 320), "tea": (9, 950)}
    return [counted(name, METHODS[name], *amounts[name]) for name in METHODS]


def test_full_pass_equivalents(rows):
    cfg, student, six = rows[:3]
    assert (by_flops(cfg, own_row(cfg, rows)), by_flops(student, student)) == (100, 20)
    assert by_flops(six, own_row(six, rows)) == pytest.approx(6.98)
    assert by_flops(six, None) is None
    seconds = [{"denoise_seconds": {"median": s}, "passes": {"full": 20}} for s in (2.0, 0.74)]
    assert as_timed(seconds[1], seconds[0]) == pytest.approx(7.4)
    assert as_timed({"denoise_seconds": None}, seconds[0]) is None


def test_the_rows_of_equal_compute_are_made_and_named(rows):
    known = METHODS | {"fast": MethodConfig(steps=7)}
    made = few_step_rows(rows, known)
    assert {row.name: row.method.steps for row in made} == {"fast": 7, "student-8": 8, "student-4": 4, "student-5": 5}
    assert all(row.method == MethodConfig(steps=row.method.steps) and row.size == SIZE for row in made)
    assert few_step_rows([*rows, *made], known) == []


def test_a_row_is_held_against_no_less_compute(rows):
    six, reuse, tea = rows[2:]
    few = [Row(f"student-{steps}", MethodConfig(steps=steps), SIZE) for steps in (3, 4, 6, 7, 8, 10)]
    for row, cost, expected in ((six, 6.98, 7), (six, 7.04, 7), (six, 7.4, 8), (reuse, 3.17, 4), (tea, 9.4, 10)):
        assert equal_row(row, cost, [*rows, *few]).method.steps == expected
    assert equal_row(six, 8.5, [*rows, *few]) is None  # nothing of 9 steps
    assert equal_row(rows[1], 20, rows) is None and equal_row(six, None, rows) is None


def test_two_passes_a_step_are_two():
    method = MethodConfig(weights="teacher", steps=20, two_pass=True, full_steps=[0, 9], on_skipped="reuse")
    own = MethodConfig(weights="teacher", steps=20, two_pass=True)
    rows = [counted("own", own, 40, 4000), counted("reuse", method, 4, 760)]
    assert [(row.name, row.method.steps) for row in few_step_rows(rows, {})] == [
        ("teacher-4-cfg", 4),
        ("teacher-5-cfg", 5),
    ]


def test_a_grid_of_listed_times_is_held_against_fewer_steps_of_the_models_own():
    own = MethodConfig(timesteps=[1000, 757, 522])
    method = MethodConfig(timesteps=[1000, 757, 522], full_steps=[0], on_skipped="reuse")
    eight = MethodConfig(steps=8)
    rows = [counted("listed", own, 3, 300), counted("reuse", method, 1, 120), counted("8", eight, 8, 800)]
    (few,) = few_step_rows(rows, {})
    assert few.method == MethodConfig(steps=2) and equal_row(rows[1], 1.2, [*rows, few]) is few
    assert [row.name for row in [*rows, few] if compared_with(row, rows[0])] == ["reuse", few.name]
    assert [row.name for row in [*rows, few] if compared_with(row, rows[2])] == [few.name]


def test_own_runs_that_are_missing():
    assert own_runs(METHODS) == {}
    found = own_runs(
        {"four": MethodConfig(steps=8, budget=4, shift=3.0), "tea": METHODS["tea"], "mine": MethodConfig()}
    )
    assert found == {"student-8-shift-3": MethodConfig(steps=8, shift=3.0)}  # caches bring none of their own


def test_what_is_compared_with_what(rows):
    eight, four = Row("student-8", MethodConfig(steps=8), SIZE), Row("4", MethodConfig(steps=8, budget=4), SIZE)
    every = [eight, four, *rows]
    assert [row.name for row in references(every)] == ["student-20", "student-8"]
    student = rows[1]
    assert [row.name for row in every if compared_with(row, student)] == ["student-8", "4", "six", "reuse", "tea"]
    assert [row.name for row in every if compared_with(row, eight)] == ["4"]  # none of more steps than it has
    assert not compared_with(Row("other grid", MethodConfig(steps=4, shift=3.0), SIZE), student)
    searched = Row("searched", MethodConfig(steps=20, budget=10, on_skipped="reuse", predictor="lists"), SIZE)
    assert not any(compared_with(row, searched) for row in every)  # which is no full run


def test_training_free():
    assert [name for name, method in METHODS.items() if training_free(method)] == ["reuse", "tea"]
