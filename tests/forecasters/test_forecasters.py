"""Forecasters without a network: polynomials, and the ridge against a least-squares solver in float64."""

import pytest
import torch

from tests.cache.toy import TOY, Toy
from vidaccel.cache.trunk import Trunk
from vidaccel.forecasters.base import Cached
from vidaccel.forecasters.linear import LinearMap, fit_linear
from vidaccel.forecasters.reuse import Reuse
from vidaccel.forecasters.taylor import Taylor
from vidaccel.models.grid import Grid, step_grid


def tokens(value: torch.Tensor | float, shape=(2, 3, 4)) -> dict[str, torch.Tensor]:
    return {"hidden_states": torch.zeros(shape, dtype=torch.float64) + value}


def at(t: float) -> torch.Tensor:
    return torch.tensor(t, dtype=torch.float64)


def test_reuse_gives_the_newest_tokens():
    memory = (Cached(tokens(1.0), None), Cached(tokens(2.0), None))
    assert Reuse()({}, memory)["hidden_states"] is memory[0].tokens["hidden_states"]


@pytest.mark.parametrize("order", [1, 2, 3])
def test_taylor_continues_polynomials_of_its_order_exactly(order):
    def polynomial(t):
        return sum((k + 1) * t**k for k in range(order + 1)) - 2

    times = [0.45, 0.7, 0.75, 1.0][: order + 1]
    taylor = Taylor(order)
    memory = tuple(Cached(tokens(polynomial(t)), at(t)) for t in times)
    assert taylor.history == order + 1 == len(memory)
    forecast = taylor({}, memory, at(0.3))["hidden_states"]
    torch.testing.assert_close(forecast, tokens(polynomial(0.3))["hidden_states"])
    beyond = tuple(Cached(tokens(t ** (order + 1)), at(t)) for t in times)
    assert (taylor({}, beyond, at(0.3))["hidden_states"] - 0.3 ** (order + 1)).abs().min() > 1e-4


def test_taylor_worked_out_by_hand_with_a_time_for_each_sample():
    # From 4 at t = 1 and 6 at t = 0.75: slope -8, so 10 at 0.25; the second sample goes from 1 at 0.5 and 2 at 0.25.
    start, next_ = torch.tensor([4.0, 1.0]), torch.tensor([6.0, 2.0])
    memory = tuple(
        Cached({"hidden_states": value.reshape(2, 1, 1)}, torch.tensor(t))
        for value, t in ((next_, [0.75, 0.25]), (start, [1.0, 0.5]))
    )
    forecast = Taylor()({}, memory, torch.tensor([0.25, 0.0]))
    assert forecast["hidden_states"].flatten().tolist() == [10.0, 3.0]


def test_with_the_shift_of_a_grid_its_steps_are_even():
    for shift in (1.0, 5.0):
        grid = step_grid(10, shift)
        memory = tuple(Cached(tokens(float(step)), grid[step]) for step in (4, 1))
        forecast = Taylor(grid=Grid.shifted(10, shift))({}, memory, grid[6])
        torch.testing.assert_close(forecast["hidden_states"], tokens(6.0)["hidden_states"], rtol=1e-5, atol=0)
        assert (Taylor(grid=Grid.shifted(10, 2.0))({}, memory, grid[6])["hidden_states"] - 6).abs().min() > 0.01


def test_taylor_reuses_while_there_is_one_full_pass_and_keeps_the_type():
    memory = (Cached({"hidden_states": torch.ones(1, 2, 3, dtype=torch.bfloat16)}, torch.tensor(1.0)),)
    assert Taylor(2)({}, memory, torch.tensor(0.5))["hidden_states"].eq(1).all()
    memory += (Cached({"hidden_states": torch.zeros(1, 2, 3, dtype=torch.bfloat16)}, torch.tensor(1.5)),)
    forecast = Taylor(2)({}, memory, torch.tensor(0.5))["hidden_states"]
    assert forecast.eq(2).all() and forecast.dtype == torch.bfloat16


def test_taylor_wants_times():
    memory = (Cached(tokens(1.0), None), Cached(tokens(1.0), at(1.0)))
    with pytest.raises(ValueError, match="time of each pass"):
        Taylor()({}, memory, at(0.5))
    with pytest.raises(ValueError, match="order 0"):
        Taylor(0)


def test_taylor_under_the_hook():
    toy = Toy()
    with Trunk(toy, TOY, history=2) as trunk:
        for t in (1.0, 0.75):
            with trunk.full(t=t):
                toy(torch.full((1, 2, 3), t))
        with trunk.predicted(Taylor(), t=0.25):
            (output,) = toy(torch.zeros(1, 2, 3))
    assert output.eq(16 * (3 * 0.25 + 1)).all()


def samples(count, width=3, noise=0.0, seed=0):
    """Entering, cached and leaving tokens of which the last are linear in the others, up to noise."""
    draw = torch.Generator().manual_seed(seed)
    weight = torch.randn(width, 2 * width + 1, generator=draw, dtype=torch.float64)
    made = []
    for _ in range(count):
        entering, cached = (torch.randn(2, 7, width, generator=draw, dtype=torch.float64) for _ in range(2))
        features = torch.cat([entering, cached, torch.ones(2, 7, 1, dtype=torch.float64)], dim=-1)
        leaving = cached + features @ weight.T
        leaving = leaving + noise * torch.randn(leaving.shape, generator=draw, dtype=torch.float64)
        made.append(tuple({"hidden_states": value} for value in (entering, cached, leaving)))
    return made, weight


def test_a_linear_relation_is_found():
    made, weight = samples(4)
    fitted = fit_linear(made, ridge=0.0)
    torch.testing.assert_close(fitted.hidden_states, weight)
    entering, cached, leaving = samples(1, seed=0)[0][0]
    out = fitted(entering, (Cached(cached, None),))["hidden_states"]
    torch.testing.assert_close(out, leaving["hidden_states"])


def test_the_ridge_is_that_of_least_squares_with_rows_for_the_penalty():
    made, _ = samples(3, noise=0.5)
    rows = [torch.cat([e["hidden_states"], c["hidden_states"]], -1).flatten(0, 1) for e, c, _ in made]
    features = torch.cat([torch.cat([row, torch.ones(len(row), 1, dtype=torch.float64)], 1) for row in rows])
    change = torch.cat([(y["hidden_states"] - c["hidden_states"]).flatten(0, 1) for _, c, y in made])
    ridge = 0.3
    penalty = torch.diag((ridge * features.square().sum(0)).sqrt())
    expected = torch.linalg.lstsq(
        torch.cat([features, penalty]), torch.cat([change, torch.zeros(len(penalty), 3, dtype=torch.float64)])
    ).solution
    torch.testing.assert_close(fit_linear(made, ridge).hidden_states, expected.T)


def test_a_strong_ridge_is_reuse_and_the_map_has_the_tokens_type():
    made = [tuple({name: value.float() for name, value in part.items()} for part in sample) for sample in samples(3)[0]]
    entering, cached, _ = made[0]
    fitted = fit_linear(made, ridge=1e9)
    assert fitted.hidden_states.dtype == torch.float32 and isinstance(fitted, LinearMap)
    out = fitted(entering, (Cached(cached, None),))["hidden_states"]
    torch.testing.assert_close(out, cached["hidden_states"], atol=1e-6, rtol=0)


def test_video_and_text_have_a_map_each():
    made, _ = samples(3)
    text, _ = samples(3, seed=1)
    both = [
        tuple({**video, "encoder_hidden_states": words["hidden_states"]} for video, words in zip(v, w, strict=True))
        for v, w in zip(made, text, strict=True)
    ]
    fitted = fit_linear(both)
    assert torch.equal(fitted.hidden_states, fit_linear(made).hidden_states)
    assert torch.equal(fitted.encoder_hidden_states, fit_linear(text).hidden_states)
