"""Distances between sets of points, against what they are in closed form."""

import numpy as np
import pytest

from vidaccel.bench.measures.distribution import frechet, kernel_distance
from vidaccel.bench.measures.quality import distribution

RNG = np.random.default_rng(0)
POINTS = RNG.normal(size=(500, 3))


def test_frechet_of_a_shift_and_of_a_stretch():
    assert frechet(POINTS, POINTS) == pytest.approx(0, abs=1e-9)
    assert frechet(POINTS + [1, 2, 0], POINTS) == pytest.approx(5)
    stretch = np.square(2 * POINTS.std(0) - POINTS.std(0)).sum() + np.square(POINTS.mean(0)).sum()
    assert frechet(2 * POINTS, POINTS) == pytest.approx(stretch, rel=1e-6)


def test_frechet_of_covariances_that_do_not_commute():
    one, other = np.array([[2.0, 1], [1, 1]]), np.array([[1.0, 0], [0, 3]])
    root = np.linalg.cholesky
    square = np.concatenate([np.eye(2), -np.eye(2)])  # mean 0 and covariance 1 / 2
    values = np.linalg.eigvals(one @ other / 4)
    expected = (np.trace(one) + np.trace(other)) / 2 - 2 * np.sqrt(values).sum()
    assert frechet(square @ root(one).T, square @ root(other).T) == pytest.approx(expected)


def test_weights_are_how_often_a_point_is_there():
    weights = RNG.integers(0, 3, 500).astype(float)
    repeated = np.repeat(POINTS, weights.astype(int), axis=0)
    assert frechet(POINTS, POINTS[:90], weights) == pytest.approx(frechet(repeated, POINTS[:90]))


def test_the_kernel_distance_has_no_bias():
    same = [kernel_distance(*RNG.normal(size=(2, 40, 3))) for _ in range(200)]
    assert abs(np.mean(same)) < 3 * np.std(same) / np.sqrt(200) and min(same) < 0
    assert kernel_distance(POINTS + 1, POINTS) > 0.5
    by_hand = kernel_distance(np.array([[1.0], [0.0]]), np.array([[0.0], [2.0]]))
    assert by_hand == 1 + 1 - 2 * (1 + 1 + 1 + 27) / 4


def test_a_distribution_is_of_all_that_the_videos_show():
    videos = [{"features": [[x, y, z], [-x, -y, -z]]} for x, y, z in POINTS[:100]]
    others = [{"features": [[x + 1, y, z]]} for x, y, z in POINTS[100:400]]
    found = distribution(videos, others, [str(i) for i in range(100)])
    low, high = found["interval"]
    assert found["clips"] == 100 and low < found["frechet"] < high and 0.6 < found["frechet"] < 1.4
    assert distribution([{"features": []}], others, ["a"]) is None
    assert distribution([{}], [], ["a"]) is None  # of a row of before
