"""Formatting, quartiles and bootstrap intervals, by hand."""

import numpy as np
import pytest

from vidaccel.numbers import bootstrap, cluster_draws, holm, quartiles, si


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (999, "999 B"), (1234567, "1.23 MB"), (999999, "1 MB"), (5 * 10**15, "5 PB"), (10**22, "1e+04 EB")],
)
def test_bytes_for_people(count, text):
    assert si(count, "B") == text


def test_a_number_without_a_unit():
    assert (si(3876543), si(512), si(57344, "B")) == ("3.88 M", "512", "57.3 kB")


def test_quartiles():
    assert quartiles([4.0, 1.0, 3.0, 2.0, 5.0]) == {"median": 3.0, "p25": 2.0, "p75": 4.0, "rounds": 5}
    assert quartiles([7.0]) == {"median": 7.0, "p25": 7.0, "p75": 7.0, "rounds": 1}


def test_bootstrap_is_of_the_mean():
    assert bootstrap([2.0, 2.0]).tolist() == [2.0, 2.0]
    low, high = bootstrap([0.0, 1.0] * 50)
    # standard error 0.05, of which 1.96 each way
    assert low == pytest.approx(0.40, abs=0.02) and high == pytest.approx(0.60, abs=0.02)


def test_bootstrap_of_several_columns_resamples_rows():
    values = np.array([[0.0, 1.0], [1.0, 0.0], [np.nan, np.nan]])

    def means(drawn: np.ndarray) -> np.ndarray:
        return drawn[~np.isnan(drawn[:, 0])].mean(0) if (~np.isnan(drawn[:, 0])).any() else np.array([np.nan, np.nan])

    low, high = bootstrap(values, means, resamples=200)
    assert low.tolist() == [0.0, 0.0] and high.tolist() == [1.0, 1.0]


def test_whole_clusters_are_drawn_as_many_as_there_are():
    drawn = cluster_draws(["a", "b", "a", "c"], 500)
    assert drawn.shape == (500, 4) and np.array_equal(drawn[:, 0], drawn[:, 2])
    assert (drawn[:, [0, 1, 3]].sum(1) == 3).all()
    assert np.array_equal(drawn, cluster_draws(["a", "b", "a", "c"], 500))
    assert not np.array_equal(drawn, cluster_draws(["a", "b", "a", "c"], 500, seed=1))


@pytest.mark.parametrize(
    ("p_values", "corrected"),
    [
        ([], []),
        ([0.04], [0.04]),
        ([0.01, 0.04, 0.03, 0.005], [0.03, 0.06, 0.06, 0.02]),  # 0.04 is no less than 0.06 of the one before
        ([0.5, 0.6, 0.02], [1.0, 1.0, 0.06]),
        ([0.02, 0.02], [0.04, 0.04]),
    ],
)
def test_holm(p_values, corrected):
    assert holm(p_values) == pytest.approx(corrected)
