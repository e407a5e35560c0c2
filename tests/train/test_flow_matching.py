"""Closed forms of the time distribution and the loss."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vidaccel.models.grid import step_grid
from vidaccel.train.flow_matching import flow_matching_loss, noised, sample_guidance, sample_times


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("distribution", ["logit_normal", "uniform"])
@pytest.mark.parametrize("shift", [1.0, 3.0, 5.0])
def test_median_time_is_the_shifted_half(shift, distribution):
    # both have median 1/2, and the shift maps 1/2 to s / (1 + s)
    times = sample_times(100_000, shift, generator(), distribution)
    assert times.median().item() == pytest.approx(shift / (1 + shift), abs=0.01)


def test_scales_are_uniform_in_their_range():
    g = sample_guidance(100_000, 1.0, 8.0, torch.Generator().manual_seed(0))
    assert float(g.min()) >= 1 and float(g.max()) <= 8
    assert float(g.mean()) == pytest.approx(4.5, abs=0.02)


def test_each_sample_is_noised_at_its_own_time():
    """x_0 = 2 and eps = 10: at t = 0, 1/4 and 1 that is 2, 3/4 * 2 + 1/4 * 10 = 4, and 10."""
    x_0, eps = torch.full((3, 1, 2, 1, 1), 2.0), torch.full((3, 1, 2, 1, 1), 10.0)
    x = noised(x_0, eps, torch.tensor([0.0, 0.25, 1.0]))
    assert x.flatten(1).tolist() == [[2.0, 2.0], [4.0, 4.0], [10.0, 10.0]]


@given(st.floats(0.1, 10.0), st.integers(0, 100))
def test_times_are_inside_the_unit_interval(shift, seed):
    times = sample_times(1000, shift, generator(seed))
    assert times.min() > 0 and times.max() < 1


def test_uniform_times_are_those_of_steps_on_a_grid_of_that_shift():
    times, grid = sample_times(100_000, 4.0, generator(), "uniform"), step_grid(10, 4.0)
    shares = [((times < upper) & (times >= lower)).float().mean() for upper, lower in pairwise(grid)]
    assert torch.stack(shares) == pytest.approx(0.1, abs=0.005)


def test_the_true_velocity_has_no_loss():
    """On one known x_0, v = (x_t - x_0) / t recovers eps - x_0 exactly."""
    x_0 = torch.randn(4, 2, 3, 2, 2, dtype=torch.float64)

    def exact(x_t, t):
        return (x_t - x_0) / t.view(-1, 1, 1, 1, 1)

    assert flow_matching_loss(lambda x, t: exact(x, t), x_0, 3.0, generator()).item() < 1e-9


def test_a_constant_model_has_the_variance_as_loss():
    """Predicting 0 leaves E |eps - x_0|^2 = 1 + x_0^2 for constant x_0."""
    x_0 = torch.full((64, 4, 4, 8, 8), 2.0)
    loss = flow_matching_loss(lambda x, t: torch.zeros_like(x), x_0, 3.0, generator())
    assert loss.item() == pytest.approx(5.0, rel=0.02)


def test_same_generator_same_loss():
    x_0 = torch.randn(2, 1, 1, 2, 2)
    losses = {flow_matching_loss(lambda x, t: x, x_0, 3.0, generator(7)).item() for _ in range(3)}
    assert len(losses) == 1
