"""Paired differences against what is known of them in closed form."""

import math

import numpy as np
import pytest

from vidaccel.bench.measures.pairs import (
    BETTER,
    OPEN,
    TOO_FEW,
    WORSE,
    Difference,
    averages,
    differences,
    p_value,
    verdicts,
)

RNG = np.random.default_rng(0)
HARD = RNG.normal(50, 20, 400)
"""Scores of prompts that differ far more from each other than rows do."""
MEANINGS = [str(i) for i in range(400)]


def totals(means):
    return {"total": (4 * means["quality"] + means["semantic"]) / 5}


def test_a_constant_difference_has_no_width():
    found = differences({"total": HARD + 1.5}, {"total": HARD}, MEANINGS, None)["total"]
    assert found.delta == pytest.approx(1.5)
    assert found.high - found.low == pytest.approx(0, abs=1e-9) and found.low == pytest.approx(1.5)
    assert found.p < 1e-9


def test_equal_rows_do_not_differ():
    assert differences({"total": HARD}, {"total": HARD}, MEANINGS, None)["total"] == Difference(0, 0, 0, 1)


def test_a_pair_knows_what_two_intervals_do_not():
    noise = RNG.normal(0, 2, 400)
    found = differences({"total": HARD + 0.5 + noise}, {"total": HARD}, MEANINGS, None)["total"]
    error = noise.std() / math.sqrt(400)
    assert (found.low, found.high) == pytest.approx((found.delta - 1.96 * error, found.delta + 1.96 * error), abs=0.02)
    assert found.p == pytest.approx(math.erfc(found.delta / error / math.sqrt(2)), rel=0.3)


@pytest.mark.parametrize("times", [2, 3])
def test_prompts_that_are_there_twice_tell_no_more_than_once(times):
    a, b = HARD + RNG.normal(0, 5, 400), HARD
    once = differences({"total": a}, {"total": b}, MEANINGS, None)["total"]
    twice = [np.tile(each, times) for each in (a, b)]
    clustered = differences({"total": twice[0]}, {"total": twice[1]}, MEANINGS * times, None)["total"]
    assert clustered == pytest.approx(once)
    apart = [str(i) for i in range(400 * times)]
    narrow = differences({"total": twice[0]}, {"total": twice[1]}, apart, None)["total"]
    ratio = (narrow.high - narrow.low) / (once.high - once.low)
    assert ratio == pytest.approx(1 / math.sqrt(times), rel=0.08)


def test_totals_are_of_averages_over_the_prompts_that_have_a_dimension():
    drawn = np.array([[1.0, 1, 1], [0, 2, 1]])
    columns = {
        "semantic": np.array([0.0, 60, np.nan]),
        "quality": np.array([10.0, 20, 30]),
        "fidelity.ssim": np.ones(3),
    }
    found = averages(columns, drawn, totals)
    assert found["semantic"].tolist() == [30, 60] and found["fidelity.ssim"].tolist() == [1, 1]
    assert found["total"].tolist() == pytest.approx([(4 * 20 + 30) / 5, (4 * 70 / 3 + 60) / 5])


def test_only_prompts_that_both_have_count():
    ours, others = np.array([1.0, np.nan, 3.0, 4.0]), np.array([0.0, 100.0, np.nan, 2.0])
    found = differences({"a": ours, "b": ours}, {"a": others}, list("wxyz"), None)
    assert found.keys() == {"a"} and found["a"].delta == pytest.approx(1.5)


def test_few_meanings_prove_nothing():
    assert p_value(1.0, 0.0, 3) == 0.25
    assert p_value(1.0, 0.0, 1) == 1.0
    assert p_value(1.96, 1.0, 100) == pytest.approx(0.05, abs=1e-3)


def test_the_draw_is_the_same_each_time():
    noise = RNG.normal(0, 2, 400)
    first, again = (differences({"total": HARD + noise}, {"total": HARD}, MEANINGS, None) for _ in range(2))
    assert first == again


def test_verdicts_are_corrected_and_know_which_way_is_better():
    sure, likely, none = (Difference(d, d - 0.1, d + 0.1, p) for d, p in ((1.0, 0.001), (0.5, 0.03), (0.05, 0.4)))
    less = Difference(-1.0, -1.1, -0.9, 0.001)
    error = "own_fidelity.latent_relative_l2"
    told = verdicts([{"total": sure, error: less, "shape": sure}, {"total": likely, error: sure}], ["total", error], 64)
    assert [told[0][name]["verdict"] for name in ("total", error, "shape")] == [BETTER, BETTER, None]
    assert told[0]["shape"]["p_holm"] is None and told[0]["total"]["p_holm"] == pytest.approx(0.004)
    assert told[1][error]["verdict"] == WORSE and told[1]["total"]["verdict"] == BETTER  # the last: 0.03 as it is
    told = verdicts([{"total": likely}, {"total": none}], ["total"], 64)
    assert [each["total"]["verdict"] for each in told] == [OPEN, OPEN]  # 0.06 of two
    spread = Difference(1.0, -0.1, 2.1, 0.001)
    assert verdicts([{"total": spread}], ["total"], 64)[0]["total"]["verdict"] == OPEN


def test_so_few_prompts_that_nothing_could_be_told_are_said():
    """Five signs agree by chance once in 16; six once in 32, but one of two claims once in 16."""
    sure = Difference(1.0, 0.9, 1.1, 2.0**-5)
    several = [{"total": sure}, {"total": sure}]
    asked = ((several[:1], 5, TOO_FEW), (several[:1], 6, BETTER), (several, 6, TOO_FEW), (several, 7, OPEN))
    for found, meanings, verdict in asked:
        assert {each["total"]["verdict"] for each in verdicts(found, ["total"], meanings)} == {verdict}
