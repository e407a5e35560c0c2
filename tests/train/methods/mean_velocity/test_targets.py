"""Mean velocities against flows whose trajectories are known in closed form.

dx/dt = a x from x_t at t reaches x_r = exp(-a (t - r)) x_t at r, so its mean velocity over [r, t] is
u(x, r, t) = x (1 - exp(-a (t - r))) / (t - r).
"""

import math
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vidaccel.errors import UserError
from vidaccel.models.grid import step_grid
from vidaccel.train.methods.mean_velocity.derivative import derivative_target
from vidaccel.train.methods.mean_velocity.intervals import restrict_at, sample_interval_ends, widest_interval
from vidaccel.train.methods.mean_velocity.jvp import exact, finite_difference
from vidaccel.train.methods.mean_velocity.method import weighted_error
from vidaccel.train.methods.mean_velocity.rollout import rollout_target
from vidaccel.train.methods.mean_velocity.settings import MeanVelocityTraining

A = 1.7


def teacher(x, t):
    return A * x


def mean_velocity(x, t, r):
    length = (t - r).view(-1, 1, 1, 1, 1)
    return x * torch.where(length == 0, A, (1 - torch.exp(-A * length)) / length.where(length != 0, 1))


def batch(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, 2, 1, 3, 3, generator=generator, dtype=dtype)
    return x, torch.tensor([1.0, 0.8, 0.5, 0.3], dtype=dtype), torch.tensor([0.8, 0.4, 0.5, 0.0], dtype=dtype)


def test_rollout_converges_to_the_mean_velocity_at_second_order():
    x, t, r = batch()
    errors = [(rollout_target(teacher, x, t, r, k) - mean_velocity(x, t, r)).abs().max() for k in (1, 2, 4, 8)]
    ratios = [float(a / b) for a, b in zip(errors, errors[1:], strict=False)]
    assert ratios[0] > ratios[1] > ratios[2] > 4  # towards four, halving the step
    assert ratios[2] < 4.4


def test_rollout_over_no_time_is_the_velocity():
    x, t, _ = batch()
    torch.testing.assert_close(rollout_target(teacher, x, t, t, 3), teacher(x, t))


@pytest.mark.parametrize("derivative", ["exact", "finite_difference"])
def test_the_meanflow_identity_holds_for_the_true_mean_velocity(derivative):
    """v - (t - r) Du/Dt of the true mean velocity is that mean velocity itself."""
    x, t, r = batch()
    config = MeanVelocityTraining(derivative=derivative, difference_step=1e-4)
    target = derivative_target(mean_velocity, teacher(x, t), x, t, r, config, warmup=1.0)
    inner = t < 1  # at t = 1 the difference is one-sided, and only first order
    torch.testing.assert_close(target[inner], mean_velocity(x, t, r)[inner], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(target, mean_velocity(x, t, r), rtol=1e-3, atol=1e-3)


def test_without_warmup_the_target_is_the_velocity():
    x, t, r = batch()
    config = MeanVelocityTraining(derivative="exact")
    assert torch.equal(derivative_target(mean_velocity, teacher(x, t), x, t, r, config, warmup=0.0), teacher(x, t))


def test_a_clipped_tangent_is_shorter_than_one_and_keeps_its_direction():
    x, t, r = batch()
    x = 100 * x
    plain, clipped = (
        teacher(x, t) - derivative_target(mean_velocity, teacher(x, t), x, t, r, config, 1.0)
        for config in (MeanVelocityTraining(derivative="exact", tangent_clip=c) for c in (None, 0.1))
    )
    for i in (0, 1, 3):  # in 2, r = t
        assert clipped[i].square().mean().sqrt() < t[i] - r[i]
        torch.testing.assert_close(clipped[i] / clipped[i].norm(), plain[i] / plain[i].norm())


def test_derivatives_by_hand():
    """u = t x along v = 3: Du/Dt = t v + x."""
    x, t, r = batch()

    def u(x, t, r):
        return t.view(-1, 1, 1, 1, 1) * x

    v = torch.full_like(x, 3.0)
    expected = t.view(-1, 1, 1, 1, 1) * v + x
    torch.testing.assert_close(exact(u, x, t, r, v), expected)
    inner = t < 1
    torch.testing.assert_close(finite_difference(u, x, t, r, v, 0.01)[inner], expected[inner])
    forward = finite_difference(u, x, t, r, v, 0.01)[~inner]  # looks back from t = 1: off by h v
    torch.testing.assert_close(forward, (expected - 0.01 * v)[~inner])


def test_a_function_of_nothing_has_no_derivative():
    x, t, r = batch()
    assert not exact(lambda x, t, r: torch.ones_like(x), x, t, r, x).any()


def test_widest_interval_of_ten_steps_with_shift_5_is_0_36():
    assert widest_interval(10, 5.0) == pytest.approx(5 / 14, abs=1e-6)
    assert round(widest_interval(10, 5.0), 2) == 0.36
    assert widest_interval(4, 1.0) == pytest.approx(0.25)


@given(st.integers(1, 60), st.floats(0.5, 12))
def test_no_interval_of_the_grid_is_wider(steps, shift):
    grid = step_grid(steps, shift)
    assert widest_interval(steps, shift) == pytest.approx(float((grid[:-1] - grid[1:]).max()))
    assert float(grid[0]) == pytest.approx(1) and float(grid[-1]) == 0


def test_restrict_factor_moves_in_a_straight_line():
    config = MeanVelocityTraining(restrict=0.8, restrict_end=0.2)
    assert [round(restrict_at(config, 0.5, p), 6) for p in (0, 0.5, 1)] == [0.8, 0.5, 0.2]
    assert restrict_at(MeanVelocityTraining(restrict=None), 0.36, 0.7) == 0.36
    assert restrict_at(MeanVelocityTraining(restrict=0.2), 0.36, 0.7) == 0.2


@given(st.floats(0.01, 1), st.floats(0, 1), st.integers(0, 2**31))
def test_intervals_stay_within_the_restriction(restrict, r_equals_t_share, seed):
    generator = torch.Generator().manual_seed(seed)
    t = torch.rand(64, generator=generator)
    r = sample_interval_ends(t, restrict, r_equals_t_share, generator)
    assert ((r >= 0) & (r <= t) & (t - r <= restrict + 1e-6)).all()


def test_interval_lengths_are_uniform_and_the_share_of_equals_is_as_asked():
    t = torch.full((100_000,), 0.9)
    r = sample_interval_ends(t, 0.4, 0.25, torch.Generator().manual_seed(0))
    equal = r == t
    assert float(equal.float().mean()) == pytest.approx(0.25, abs=0.01)
    lengths = (t - r)[~equal]
    assert float(lengths.mean()) == pytest.approx(0.2, abs=0.005)
    assert float(lengths.std()) == pytest.approx(0.4 / math.sqrt(12), abs=0.005)


def test_error_is_weighted_by_its_own_size_and_leaves_out_what_is_not_finite():
    predicted = torch.zeros(3, 1, 1, 1, 2, requires_grad=True)
    target = torch.tensor([1.0, 3.0, math.nan]).view(3, 1, 1, 1, 1).expand(3, 1, 1, 1, 2)
    plain, left_out = weighted_error(predicted, target, 0.0, 1e-3)
    assert (float(plain), int(left_out)) == (pytest.approx((1 + 9) / 2), 1)
    adaptive, _ = weighted_error(predicted, target, 1.0, 1e-3)
    assert float(adaptive) == pytest.approx((1 / 1.001 + 9 / 9.001) / 2)
    adaptive.backward()
    assert predicted.grad.isfinite().all()
    assert float(predicted.grad[2].abs().sum()) == 0
    assert float(predicted.grad[1, 0, 0, 0, 0]) == pytest.approx(-3 / 9.001 / 2, rel=1e-3)


def test_nothing_finite_is_no_loss():
    target = torch.full((2, 1, 1, 1, 1), math.nan)
    loss, left_out = weighted_error(torch.zeros(2, 1, 1, 1, 1), target, 0.0, 1e-3)
    assert loss.isnan()  # which the training loop skips and counts
    assert int(left_out) == 2


def test_of_two_transformers_nothing_is_asked_of_one_at_the_others_times():
    """Its teacher gives nothing below b, where the other takes over: every target is still the mean velocity."""
    b, x = 0.6, torch.randn(64, 1, 1, 2, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    t = torch.linspace(b, 1, 64, dtype=torch.float64)
    r = sample_interval_ends(t, 0.4, 0.0, torch.Generator().manual_seed(2), low=b)
    assert (r >= b).all() and (r == b).any() and (r > b).any()

    def own(u):
        def of_own_times(x, t, *r):
            outside = (torch.stack([t, *r]) < b - 1e-9).any(0) | (t > 1)
            return torch.where(outside.view(-1, 1, 1, 1, 1), torch.nan, u(x, t, *r))

        return of_own_times

    expected = mean_velocity(x, t, r)
    torch.testing.assert_close(rollout_target(own(teacher), x, t, r, 8), expected, rtol=1e-3, atol=1e-3)
    for derivative in ("exact", "finite_difference"):
        config = MeanVelocityTraining(derivative=derivative, difference_step=0.02)
        target = partial(derivative_target, own(mean_velocity), teacher(x, t), x, t, r, config, warmup=1.0)
        torch.testing.assert_close(target(span=(b, 1.0)), expected, rtol=0.02, atol=0.05)
        assert derivative == "exact" or target().isnan().any()


def test_the_widest_interval_of_a_transformer_ends_where_the_other_begins():
    """Shift 3 in 4 steps: 1, 0.9, 0.75, 0.5, 0."""
    assert widest_interval(4, 3.0, (0.8, 1.0)) == pytest.approx(0.1)
    assert widest_interval(4, 3.0, (0.7, 1.0)) == pytest.approx(0.15)
    assert widest_interval(4, 3.0, (0.0, 0.75)) == pytest.approx(0.5)  # at the boundary it is still the first's
    assert widest_interval(2, 9.0, (0.9, 1.0)) == pytest.approx(0.1)
    with pytest.raises(UserError, match="no step of 2 at shift 9 begins from t = 0 to 0.9"):
        widest_interval(2, 9.0, (0.0, 0.9))  # nor is 0.9 that, which is less in float32
    with pytest.raises(UserError, match="no step of 4 at shift 3 begins from t = 0 to 0.4"):
        widest_interval(4, 3.0, (0.0, 0.4))
