"""Schedules: the search against brute force, and files that come back as they were."""

import json
import math
import random
from itertools import combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vidaccel.cache.schedule import (
    PUBLISHED,
    Schedule,
    candidates,
    every,
    pick,
    read_schedules,
    write_schedules,
)
from vidaccel.errors import UserError
from vidaccel.models.grid import step_grid


def total(full_steps, costs):
    ends = (*full_steps[1:], len(costs))
    return sum(costs[i][j] for i, j in zip(full_steps, ends, strict=True))


def brute_force(costs, budget):
    lists = [(0, *rest) for rest in combinations(range(1, len(costs)), budget - 1)]
    return min(total(full_steps, costs) for full_steps in lists)


@st.composite
def problems(draw):
    steps = draw(st.integers(1, 8))
    cost = st.one_of(st.integers(0, 20).map(float), st.just(math.inf))
    row = st.lists(cost, min_size=steps + 1, max_size=steps + 1)
    return draw(st.lists(row, min_size=steps, max_size=steps))


@given(problems())
@settings(max_examples=200, deadline=None)
def test_the_search_finds_the_cheapest_list_of_every_budget(costs):
    found = candidates(costs)
    for budget in range(1, len(costs) + 1):
        best = brute_force(costs, budget)
        assert (budget in found) == math.isfinite(best)
        if budget in found:
            ((error, full_steps),) = found[budget]
            assert len(full_steps) == budget and error == best
            assert total(full_steps, costs) == best


def test_a_search_worked_out_by_hand():
    # A stretch costs the square of its predicted steps, except that none may cross step 3.
    costs = [[math.inf if i < 3 < j else float((j - i - 1) ** 2) for j in range(7)] for i in range(6)]
    found = candidates(costs, 9)
    assert set(found) == {2, 3, 4, 5, 6}
    assert found[2] == [(8.0, (0, 3))]
    assert {full for _, full in found[4][:4]} == {(0, 1, 3, 4), (0, 1, 3, 5), (0, 2, 3, 4), (0, 2, 3, 5)}
    assert found[6] == [(0, (0, 1, 2, 3, 4, 5))]


def test_an_error_that_grows_later_is_avoided_early():
    def costs(growth):
        return [[(j - i - 1.0) * growth[j] for j in range(5)] for i in range(4)]

    assert candidates(costs([1, 10, 10, 1, 1]))[3][0][1] == (0, 1, 2)
    assert candidates(costs([1, 1, 1, 10, 10]))[3][0][1] == (0, 2, 3)


def test_fifty_steps_are_searched_whole():
    draw = random.Random(0)
    costs = [[draw.random() * (j - i) for j in range(51)] for i in range(50)]
    found = candidates(costs)
    assert set(found) == set(range(1, 51))
    for ((error, full_steps),) in found.values():
        assert error == pytest.approx(total(full_steps, costs))


@pytest.mark.parametrize("costs", [[[0.0, math.nan]], [[0.0, -1.0]], [[0.0]], [[0.0, 1.0, 2.0]]])
def test_costs_that_make_no_sense_are_refused(costs):
    with pytest.raises(ValueError, match="cost"):
        candidates(costs)


def test_lists_at_intervals():
    assert every(20, 4).full_steps == (0, 4, 8, 12, 16)
    assert every(5, 2).full_steps == (0, 2, 4)
    with pytest.raises(UserError):
        every(5, 0)


def test_the_published_lists_are_lists():
    for (steps, budget), full_steps in PUBLISHED.items():
        assert Schedule(steps, full_steps).budget == budget


def test_a_file_of_schedules_comes_back(tmp_path):
    made = [Schedule(8, (0, 3), "search", 5.0, 0.25), Schedule(8, PUBLISHED[8, 4]), Schedule(20, (0, 9), "search")]
    write_schedules(tmp_path / "schedule.json", reversed(made))
    assert read_schedules(tmp_path / "schedule.json") == made
    assert json.loads((tmp_path / "schedule.json").read_text())["2-of-8"] == {
        "steps": 8,
        "shift": 5.0,
        "times": step_grid(8, 5.0).tolist(),
        "full_steps": [0, 3],
        "budget": 2,
        "how": "search",
        "expected_error": 0.25,
    }


def test_the_one_schedule_that_fits_is_picked():
    two, four, long = made = [Schedule(8, (0, 3)), Schedule(8, PUBLISHED[8, 4]), Schedule(20, (0, 9))]
    assert pick(made, 4) is four
    assert pick(made, 2, 8) is two
    assert pick(made, None, 20) is pick(made, 2, 20) is long
    for budget, steps, message in [
        (3, None, "no schedule for budget=3\nhint: choose budget=2 or 4 with steps=8; budget=2 with steps=20"),
        (2, 10, "no schedule for budget=2 with steps=10"),
        (2, None, "2 schedules for budget=2\nhint: choose budget=2 with steps=8; budget=2 with steps=20"),
        (None, None, "3 schedules for any steps"),
    ]:
        with pytest.raises(UserError, match=message):
            pick(made, budget, steps)


def test_a_file_of_one_schedule_needs_no_key(tmp_path):
    entry = {"steps": 8, "shift": 5.0, "full_steps": [0, 3], "budget": 2, "how": "list", "expected_error": None}
    (tmp_path / "schedule.json").write_text(json.dumps(entry))
    schedules = read_schedules(tmp_path / "schedule.json")
    assert pick(schedules, None) == Schedule(8, (0, 3), shift=5.0)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is no schedule"),
        ("[]", "is no schedule"),
        ('{"8": 3}', "is no schedule"),
        ('{"format": "schedule/2"}', "of format schedule/2"),
        ('{"3": {"steps": 8, "full_steps": [0, 3], "budget": 3}}', "2 full steps under budget 3"),
        ('{"2": {"steps": 8, "full_steps": [0, 3], "budget": 2, "pace": 1}}', "pace"),
        ('{"2": {"steps": 8, "full_steps": [3, 0], "budget": 2}}', "not in order"),
        ('{"2": {"steps": 8, "full_steps": [0, 3], "budget": 2, "how": "guess"}}', "made by 'guess'"),
    ],
)
def test_a_damaged_file_is_named(tmp_path, content, message):
    path = tmp_path / "schedule.json"
    path.write_text(content)
    with pytest.raises(UserError, match=message):
        read_schedules(path)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(UserError, match="cannot be read"):
        read_schedules(tmp_path / "schedule.json")


def test_candidates_are_the_cheapest_lists_where_costs_know_the_step_before():
    generator = random.Random(0)
    steps = 6
    costs = [[[generator.random() for _ in range(steps + 1)] for _ in range(steps)] for _ in range(steps)]
    costs[0][1][3] = math.inf

    def cost(full):
        ways = zip((full[0], *full), full, (*full[1:], steps), strict=False)
        return sum(costs[h][i][j] for h, i, j in ways)

    found = candidates(costs, 4)
    for budget in range(1, steps + 1):
        every_list = [(0, *rest) for rest in combinations(range(1, steps), budget - 1)]
        ordered = sorted((cost(full), full) for full in every_list if math.isfinite(cost(full)))[:4]
        assert [full for _, full in found[budget]] == [full for _, full in ordered]
        assert [error for error, _ in found[budget]] == pytest.approx([error for error, _ in ordered])


def test_candidates_without_a_step_before_are_the_same_after_each():
    generator = random.Random(1)
    plain = [[generator.random() for _ in range(6)] for _ in range(5)]
    assert candidates([plain] * 5, 3) == candidates(plain, 3)


@pytest.mark.parametrize(("forecaster", "way"), [("learned", "stage=search"), ("multistep", "forecaster=multistep")])
def test_a_grid_without_schedules_says_the_command_that_searches_some(tmp_path, forecaster, way):
    from vidaccel.cache.attach import _picked

    write_schedules(tmp_path / "schedule.json", [Schedule(8, (0, 2))])
    (tmp_path / "run.json").write_text(json.dumps({"config": {"student": "runs/student", "forecaster": forecaster}}))
    with pytest.raises(UserError) as caught:
        _picked(tmp_path / "schedule.json", tmp_path, 2, 6)
    command = f"vidaccel train-predictor -o {tmp_path} {way} student=runs/student steps=6"
    assert command in caught.value.hint and "budget=2 with steps=8" in caught.value.hint
    with pytest.raises(UserError) as caught:  # there are some for these steps
        _picked(tmp_path / "schedule.json", tmp_path, 3, 8)
    assert "train-predictor" not in caught.value.hint
