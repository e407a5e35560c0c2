"""Predicted steps to learn from: their times, and that states, caches and targets are the student's own."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.cache.toy import Plus
from tests.train.predictor.test_discriminator import student
from vidaccel.cache.trunk import Trunk
from vidaccel.models.grid import step_grid
from vidaccel.sampling import sample
from vidaccel.train.objective import generator_for
from vidaccel.train.predictor import pairs as module
from vidaccel.train.predictor.pairs import (
    FullStep,
    Pairs,
    Times,
    grid_times,
    noised_pair,
    restricted_times,
    stepped,
    trajectory_pair,
)

MANY = 100_000


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# Times


def test_restricted_times_are_those_of_the_method():
    (t, r), (later_t, later_r) = restricted_times(MANY, 0.4, 0.2, generator())
    assert ((r <= t) & (later_t <= t) & (later_r <= r) & (later_r <= later_t)).all()
    assert float((t - r).max()) <= 0.4 + 1e-6
    assert float(t.mean()) == pytest.approx(0.5, abs=0.005)
    passed = (t - later_t)[later_r > 0]  # neither end was cut off at 0
    torch.testing.assert_close(passed, (r - later_r)[later_r > 0])
    assert float(passed.max()) <= 0.2 + 1e-6
    inner = t > 0.6  # then no end ever is
    assert float((t - later_t)[inner].mean()) == pytest.approx(0.1, abs=0.002)
    assert float((t - r)[inner].mean()) == pytest.approx(0.2, abs=0.004)


@settings(deadline=None)
@given(st.integers(2, 12), st.floats(0.5, 8), st.floats(0.01, 1), st.integers(0, 2**31))
def test_grid_times_are_two_steps_of_the_grid(steps, shift, lag, seed):
    grid = step_grid(steps, shift)
    full, predicted = grid_times(64, grid, lag, generator(seed))
    place = {float(t): i for i, t in enumerate(grid)}
    for t, r, later_t, later_r in zip(*full, *predicted, strict=True):
        i, j = place[float(t)], place[float(later_t)]
        assert (place[float(r)], place[float(later_r)]) == (i + 1, j + 1)
        assert i < j < steps
        assert j == i + 1 or float(t) - float(later_t) <= lag


def test_every_near_pair_of_the_grid_is_as_likely():
    """Times 1, 0.75, 0.5, 0.25: with lag 0.5 the pairs are 01 02 12 13 23."""
    full, predicted = grid_times(MANY, step_grid(4, 1.0), 0.5, generator())
    counts = torch.stack([full.t, predicted.t]).unique(dim=1, return_counts=True)[1]
    assert len(counts) == 5
    assert float(counts.float().std() / counts.float().mean()) < 0.02


def test_one_step_of_the_sampler_by_hand():
    x = torch.tensor([10.0, 20.0]).view(2, 1, 1, 1, 1)
    u = torch.tensor([4.0, -2.0]).view(2, 1, 1, 1, 1)
    ended = stepped(x, Times(torch.tensor([0.75, 1.0]), torch.tensor([0.25, 0.0])), u)
    assert ended.flatten().tolist() == [10 - 0.5 * 4, 20 + 2]


# States, caches and targets


@torch.no_grad()
def test_a_noised_pair_sees_one_clip_and_noise_at_both_times():
    velocity, x_0, text = student("wan")
    eps = torch.randn_like(x_0)
    full = Times(torch.tensor([0.9, 0.5]), torch.tensor([0.8, 0.3]))
    predicted = Times(torch.tensor([0.7, 0.45]), torch.tensor([0.6, 0.25]))
    with Trunk(velocity.transformer, velocity.family) as trunk:
        pair = noised_pair(velocity, trunk, x_0, eps, text, None, full, predicted)
        x_t = torch.stack([0.1 * x_0[0] + 0.9 * eps[0], 0.5 * x_0[1] + 0.5 * eps[1]])
        with trunk.full():
            velocity(x_t, full.t, text, r=full.r)
        torch.testing.assert_close(pair.memory[0].tokens, trunk.memory()[0].tokens)
    assert torch.equal(pair.memory[0].t, full.t)
    torch.testing.assert_close(pair.x, torch.stack([0.3 * x_0[0] + 0.7 * eps[0], 0.55 * x_0[1] + 0.45 * eps[1]]))
    assert torch.equal(pair.target, velocity(pair.x, predicted.t, text, r=predicted.r))


@torch.no_grad()
@pytest.mark.parametrize("length", [1, 3])
def test_a_trajectory_pair_is_where_the_sampler_gets_to_with_predicted_steps(length):
    velocity, noise, text = student("hunyuan_video")
    grid, states, plus = step_grid(6, 3.0), [], Plus()
    sample(velocity, noise, text, grid, None, lambda index, x, u: states.append((x, u)))
    first = torch.tensor([2, 0])
    x, u = (torch.stack([states[i][part][b] for b, i in enumerate(first)]) for part in (0, 1))
    with Trunk(velocity.transformer, velocity.family) as trunk:
        pair = trajectory_pair(velocity, trunk, plus, [FullStep(first, x, u, {})], length, grid, text, None)
        remembered = trunk.memory()[0]
        for b, start in enumerate(first):  # one sample at a time, by the plain loop
            alone = {name: tensor[b : b + 1] for name, tensor in text.items()}
            with trunk.full():
                y = sample(velocity, states[start][0][b : b + 1], alone, grid[start : start + 2])
            with trunk.predicted(plus):
                y = sample(velocity, y, alone, grid[start + 1 : start + length + 1])
            torch.testing.assert_close(pair.x[b : b + 1], y, atol=1e-5, rtol=1e-4)
        kept = FullStep(first, x, u, remembered.tokens)
        stored = trajectory_pair(velocity, trunk, plus, [kept], length, grid, text, None)
    assert pair.times.t.tolist() == grid[first + length].tolist()
    assert pair.times.r.tolist() == grid[first + length + 1].tolist()
    assert torch.equal(pair.target, velocity(pair.x, pair.times.t, text, r=pair.times.r))
    torch.testing.assert_close(stored.x, pair.x, atol=1e-5, rtol=1e-4)
    assert stored.memory[0].tokens is remembered.tokens and torch.equal(stored.memory[0].t, remembered.t)
    assert pair.memory[0].t.tolist() == grid[first].tolist()


@torch.no_grad()
def test_a_trajectory_pair_of_two_full_steps_remembers_both():
    """The second sample has none before its first step, which then stands in for it."""
    velocity, noise, text = student("wan")
    grid, states = step_grid(6, 3.0), []
    sample(velocity, noise, text, grid, None, lambda index, x, u: states.append((x, u)))

    def full_step(indices: list[int]) -> FullStep:
        x, u = (torch.stack([states[i][part][b] for b, i in enumerate(indices)]) for part in (0, 1))
        return FullStep(torch.tensor(indices), x, u, {})

    full = [full_step([3, 0]), full_step([1, 0])]
    with Trunk(velocity.transformer, velocity.family, history=2) as trunk:
        pair = trajectory_pair(velocity, trunk, Plus(), full, 2, grid, text, None)
        for remembered, step in zip(pair.memory, full, strict=True):
            with trunk.full():
                velocity(step.x, grid[step.index], text, r=grid[step.index + 1])
            torch.testing.assert_close(remembered.tokens, trunk.memory()[0].tokens)
            assert torch.equal(remembered.t, grid[step.index])


def test_a_stretch_of_any_length_begins_anywhere_on_its_trajectory(monkeypatch):
    """One pass of one sample a step, whose generator is that of the step's number as well."""
    steps, drawn = 8, []
    run = {name: torch.zeros(steps, 1, 1, 1, 1) for name in ("x", "velocity")}
    source = SimpleNamespace(buckets=None, at=lambda position, seed: 0, read=lambda chosen: [(run, {})] * len(chosen))
    config = SimpleNamespace(pairs="trajectory", max_skipped=4, history=1)
    model = SimpleNamespace(embeds=lambda name: False)
    monkeypatch.setattr(module, "trajectory_pair", lambda *given: drawn.append((given[4], int(given[3][0].index))))
    pairs = Pairs(model, None, None, source, config, step_grid(steps, 1.0), 1.0, 1.0, seed=0)
    for step in range(400):
        pairs.draw(step, 1, step, generator_for(0, step))
    assert set(drawn) == {(length, first) for length in range(1, 5) for first in range(steps - length)}
