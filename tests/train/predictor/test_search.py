"""What stretches of predicted steps cost: worked out by hand for velocities that are known, and against whole runs."""

from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch

from tests.cache.toy import Plus
from tests.train.predictor.test_discriminator import student
from vidaccel.cache.schedule import candidates
from vidaccel.cache.trunk import Trunk
from vidaccel.config.predictor import PredictorConfig
from vidaccel.config.training import TrainConfig
from vidaccel.errors import UserError
from vidaccel.forecasters.reuse import Reuse
from vidaccel.forecasters.taylor import Taylor
from vidaccel.models.grid import Grid, step_grid
from vidaccel.sampling import sample
from vidaccel.train.predictor.search import list_errors, passes_of_search, stretch_costs
from vidaccel.train.predictor.task import check_student, search_of

REUSE = Reuse()


class Switch:
    """A trunk that only says which way it is set."""

    predicting = False

    def reset(self):
        """Nothing is remembered."""

    @contextmanager
    def full(self, t=None):
        yield

    @contextmanager
    def predicted(self, forecaster, t=None):
        self.predicting = True
        yield
        self.predicting = False


def toy(slope: float, wrong: float):
    """u = slope x, and `wrong` more where it is predicted, as the function and its trunk."""
    switch = Switch()
    return (lambda x, t, text, r, g: slope * x + wrong * switch.predicting), switch


@pytest.fixture
def noise():
    return torch.ones(2, 1, 1, 1, 1)


def test_a_constant_error_adds_up_over_the_time_that_is_predicted(noise):
    grid = step_grid(5, 2.0)
    velocity, switch = toy(0.0, 0.1)
    costs = stretch_costs(velocity, switch, REUSE, noise, {}, grid)
    assert costs.shape == (5, 6)
    for i in range(5):
        for j in range(i + 1, 6):
            assert float(costs[i, j]) == pytest.approx((0.1 * float(grid[i + 1] - grid[j])) ** 2, rel=1e-4, abs=1e-12)


def test_an_error_counts_as_what_it_has_grown_to_in_the_end(noise):
    """x falls by the factor 1 - 2 (s_k - s_k+1) a step, an error that is there at j by all those from j on."""
    grid, wrong = step_grid(4, 1.0), 0.1
    velocity, switch = toy(2.0, wrong)
    costs = stretch_costs(velocity, switch, REUSE, noise, {}, grid)
    factor = 1 - 2 * 0.25
    final = factor**4
    one_predicted = 0.25 * wrong  # the next predicted step halves it and adds as much again
    for i, j, error in ((0, 2, one_predicted), (1, 3, one_predicted), (0, 3, one_predicted * (factor + 1))):
        expected = (error * factor ** (4 - j) / final) ** 2
        assert float(costs[i, j]) == pytest.approx(expected, rel=1e-4)


def test_growth_between_the_ends_where_it_is_measured_is_interpolated(noise):
    """Exactly, where each step multiplies an error by the same number; in as many passes as are said before."""
    grid, (velocity, switch) = step_grid(8, 1.0), toy(2.0, 0.1)
    found, calls = [], []

    def counted(*args, **kwargs):
        calls[-1] += not switch.predicting
        return velocity(*args, **kwargs)

    for every in (1, 3):
        calls.append(0)
        found.append(stretch_costs(counted, switch, REUSE, noise, {}, grid, growth_every=every))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-12)
    assert not torch.equal(*found)
    settings = [PredictorConfig(forecaster="reuse", budgets=[1], growth_every=every) for every in (1, 3)]
    one, third = (passes_of_search(config, 8, prompts=1, checked=0).full for config in settings)
    assert one - third == calls[0] - calls[1] == (6 + 5 + 4 + 3 + 2 + 1) - (6 + 3)


def test_a_perfect_forecaster_costs_nothing(noise):
    velocity, switch = toy(1.5, 0.0)
    assert not stretch_costs(velocity, switch, REUSE, noise, {}, step_grid(6, 3.0)).any()


def test_costs_are_averaged_over_prompts():
    grid = step_grid(3, 1.0)
    velocity, switch = toy(0.0, 0.3)
    one, two = (torch.full((1, 1, 1, 1, 1), float(n)) for n in (1, 2))
    both = stretch_costs(velocity, switch, REUSE, torch.cat([one, two]), {}, grid)
    alone = [stretch_costs(velocity, switch, REUSE, noise, {}, grid) for noise in (one, two)]
    torch.testing.assert_close(both, sum(alone) / 2)
    torch.testing.assert_close(alone[0], 4 * alone[1])


@torch.no_grad()
def test_the_cost_of_a_last_stretch_is_the_error_of_the_run_that_has_only_it():
    velocity, noise, text = student("wan")
    grid, forecaster = step_grid(5, 3.0), Plus()
    with Trunk(velocity.transformer, velocity.family) as trunk:
        costs = stretch_costs(velocity, trunk, forecaster, noise, text, grid)
        full = sample(velocity, noise, text, grid)
        for first in (0, 2):
            x = sample(velocity, noise, text, grid[: first + 1]) if first else noise
            with trunk.full():
                x = sample(velocity, x, text, grid[first : first + 2])
            with trunk.predicted(forecaster):
                x = sample(velocity, x, text, grid[first + 1 :])
            wrong = (x - full).square().mean(dim=(1, 2, 3, 4)) / full.square().mean(dim=(1, 2, 3, 4))
            assert float(costs[first, 5]) == pytest.approx(float(wrong.mean()), rel=1e-3)
        assert (costs[0, 2:] > 0).all()
        assert candidates(costs.tolist())[5][0][1] == (0, 1, 2, 3, 4)


@torch.no_grad()
def test_the_costs_of_a_forecaster_that_looks_back_know_the_full_step_before():
    velocity, noise, text = student("wan")
    grid, forecaster = step_grid(6, 3.0), Taylor(grid=Grid.shifted(6, 3.0))
    with Trunk(velocity.transformer, velocity.family, history=2) as trunk:
        costs = stretch_costs(velocity, trunk, forecaster, noise, text, grid)
        assert costs.shape == (6, 6, 7)
        states = [noise]
        for step in range(6):
            states.append(sample(velocity, states[-1], text, grid[step : step + 2]))
        for before, first in ((1, 4), (3, 4), (0, 2), (0, 0)):
            trunk.reset()
            for step in sorted({before, first}):
                with trunk.full(grid[step]):
                    x = sample(velocity, states[step], text, grid[step : step + 2])
            for step in range(first + 1, 6):
                with trunk.predicted(forecaster, grid[step]):
                    x = sample(velocity, x, text, grid[step : step + 2])
            wrong = (x - states[-1]).square().mean(dim=(1, 2, 3, 4)) / states[-1].square().mean(dim=(1, 2, 3, 4))
            assert float(costs[before, first, 6]) == pytest.approx(float(wrong.mean()), rel=1e-3)
        assert costs[1, 4, 6] != costs[3, 4, 6]


@torch.no_grad()
@pytest.mark.parametrize("history", [1, 2])
def test_lists_run_together_as_they_serve_alone(history):
    velocity, noise, text = student("wan")
    grid = Grid.shifted(5, 3.0)
    forecaster = Taylor(grid=grid) if history == 2 else Reuse()
    lists = [(0,), (0, 2), (0, 1, 3), (0, 1, 4), (0, 1, 2, 3, 4)]
    with Trunk(velocity.transformer, velocity.family, history=history) as trunk:
        found = dict(list_errors(velocity, trunk, forecaster, noise, text, grid, None, lists))
        own = sample(velocity, noise, text, grid.tensor)
        for full in lists:
            trunk.reset()
            x = noise
            for step in range(5):
                t = grid.tensor[step]
                with trunk.full(t) if step in full else trunk.predicted(forecaster, t):
                    x = sample(velocity, x, text, grid.tensor[step : step + 2])
            wrong = (x - own).square().mean(dim=(1, 2, 3, 4)) / own.square().mean(dim=(1, 2, 3, 4))
            torch.testing.assert_close(found[full].float(), wrong, rtol=1e-3, atol=1e-8)
    assert found[0, 1, 2, 3, 4].max() == 0


def test_a_search_that_an_earlier_version_made_is_known_as_done():
    """By what commit 1fa21bf wrote for these settings: what was added since is left out as long as it is not said."""
    earlier = "5c30bca691c558d02113b2a825cb60246eacf3ae2b01232b4222bf2886cbe652"

    def asked(**changes) -> str:
        return search_of(PredictorConfig(student="s", **{"forecaster": "reuse"} | changes), "hash", {"clips": 3})

    assert asked() == asked(mse=replace(PredictorConfig().mse, gates_every=7)) == asked(growth_every=1) == earlier
    served = {"forecaster": "learned", "pairs": "served", "adversarial": TrainConfig(steps=0)}
    others = {
        asked(growth_every=3),
        asked(guidance_2=2.0),
        asked(prompts="a"),
        asked(**served),
        asked(**served, scalars_every=9),
    }
    assert len(others | {earlier}) == 6


def test_prompts_that_cannot_be_read_are_refused_before_the_model_is(tmp_path):
    asked = PredictorConfig(student=str(tmp_path / "none"), forecaster="reuse", prompts=str(tmp_path / "prompts.txt"))
    with pytest.raises(UserError, match=r"cannot read the prompts in .*prompts\.txt"):
        check_student(asked)
