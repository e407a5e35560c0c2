"""Fitted scalars by themselves: forecasts by hand, the fit against float64 least squares, the file."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from vidaccel.errors import UserError
from vidaccel.forecasters.checkpoint import kind_of
from vidaccel.forecasters.multistep import (
    SCALARS_FILE,
    FittedList,
    Multistep,
    MultistepConfig,
    fit_coefficients,
    multistep_velocity,
)

SHAPE = (2, 3, 2, 4, 4)


@pytest.fixture
def drawn():
    generator = torch.Generator().manual_seed(0)
    return lambda *shape: torch.randn(shape or SHAPE, generator=generator)


def scalars(**changes) -> FittedList:
    """Full steps 0, 1 and 3 of 5."""
    coefficients = {2: (0.5, 0.25, 0.1, -0.1, 0.0), 4: (1.0, 0.5, 0.25, 0.0, 0.1, 0.2, 0.3)}
    return replace(FittedList((0, 1, 3), coefficients, 5, shift=2.0, error=0.1), **changes)


def multistep(**changes) -> Multistep:
    return Multistep(MultistepConfig(**{"family": "wan", "student": "f" * 64, "guidance_range": (1.0, 4.0),
                                        "two_pass": False, "lists": (scalars(),), **changes}))  # fmt: skip


def test_a_forecast_is_the_sum_that_it_says(drawn):
    us, xs, x = [drawn(), drawn()], [drawn(), drawn()], drawn()
    found = multistep_velocity(torch.tensor([0.5, -0.25, 2.0, 0.1, 3.0]), us, xs, x)
    torch.testing.assert_close(found, 0.5 * us[0] - 0.25 * us[1] + 2 * x + 0.1 * xs[0] + 3 * xs[1])
    last_again = torch.tensor([1.0, 0.0, 0.0, 0.0, 0.0])
    assert torch.equal(multistep_velocity(last_again, us, xs, x), us[0])
    halves = [u.bfloat16() for u in us]
    assert torch.equal(multistep_velocity(last_again, halves, xs, x), halves[0])


def test_a_forecast_carries_gradients_to_everything(drawn):
    inputs = [drawn().requires_grad_() for _ in range(5)]
    coefficients = torch.randn(5, requires_grad=True)
    multistep_velocity(coefficients, inputs[:2], inputs[2:4], inputs[4]).square().sum().backward()
    assert all(tensor.grad is not None and tensor.grad.abs().sum() > 0 for tensor in [*inputs, coefficients])


def test_a_forecast_of_guided_velocities_is_the_guided_forecast(drawn):
    """So that the same numbers serve both passes of guidance."""
    coefficients, g, x, xs = torch.randn(5), 3.0, drawn(), [drawn(), drawn()]
    conditional, unconditional = [drawn(), drawn()], [drawn(), drawn()]
    guided = [v + g * (u - v) for u, v in zip(conditional, unconditional, strict=True)]
    u, v = (multistep_velocity(coefficients, us, xs, x) for us in (conditional, unconditional))
    torch.testing.assert_close(v + g * (u - v), multistep_velocity(coefficients, guided, xs, x))


def test_numbers_that_do_not_go_with_what_is_looked_back_on_are_refused(drawn):
    with pytest.raises(ValueError, match="5 coefficients for 1 velocities"):
        multistep_velocity(torch.ones(5), [drawn()], [drawn()], drawn())


def test_the_fit_is_the_ridge_regression_of_float64(drawn):
    us, xs = [drawn(9, 2, 1, 3, 3) for _ in range(2)], [drawn(9, 2, 1, 3, 3) for _ in range(2)]
    x, target = drawn(9, 2, 1, 3, 3), drawn(9, 2, 1, 3, 3)
    found = fit_coefficients(us, xs, x, target, ridge=0.01)
    A = torch.stack([t.flatten() for t in (*us, x, *xs)], dim=1).double().numpy()
    penalty = np.diag(np.sqrt(0.01 * (A**2).sum(0)))
    rows, wanted = np.vstack([A, penalty]), np.concatenate([target.flatten().double().numpy(), np.zeros(5)])
    np.testing.assert_allclose(found.numpy(), np.linalg.lstsq(rows, wanted, rcond=None)[0], rtol=1e-9)


def test_the_fit_does_not_ask_for_the_order_of_runs_or_the_unit_of_latents(drawn):
    us, xs, x, target = [drawn(7, 2, 1, 3, 3)], [drawn(7, 2, 1, 3, 3)], drawn(7, 2, 1, 3, 3), drawn(7, 2, 1, 3, 3)
    found = fit_coefficients(us, xs, x, target)
    turned = fit_coefficients([us[0].flip(0)], [xs[0].flip(0)], x.flip(0), target.flip(0))
    scaled = fit_coefficients([8 * us[0]], [8 * xs[0]], 8 * x, 8 * target)
    torch.testing.assert_close(turned, found)
    torch.testing.assert_close(scaled, found)


def test_what_is_in_their_span_is_found(drawn):
    us, xs, x = [drawn(8, 2, 1, 3, 3) for _ in range(2)], [drawn(8, 2, 1, 3, 3) for _ in range(2)], drawn(8, 2, 1, 3, 3)
    wanted = torch.tensor([0.3, -0.7, 0.2, 1.5, -1.0])
    found = fit_coefficients(us, xs, x, multistep_velocity(wanted, us, xs, x), ridge=0)
    torch.testing.assert_close(found.float(), wanted, atol=1e-6, rtol=1e-6)


def test_fits_that_cannot_be_are_refused(drawn):
    u, x = drawn(7, 2, 1, 3, 3), drawn(7, 2, 1, 3, 3)
    with pytest.raises(UserError, match="2 runs for 3 unknowns"):
        fit_coefficients([u[:2]], [x[:2]], x[:2], u[:2])
    with pytest.raises(UserError, match="singular at ridge=0"):
        fit_coefficients([u], [x], x, u, ridge=0)
    assert fit_coefficients([u], [x], x, u, ridge=1e-4).isfinite().all()
    with pytest.raises(UserError, match="not finite"):
        fit_coefficients([u / 0], [x], x, u)
    with pytest.raises(UserError, match="zero in all runs"):
        fit_coefficients([u], [0 * x], x, u)


def test_a_networks_answer_is_one_more_term_the_first(drawn):
    us, xs, x, network = [drawn()], [drawn()], drawn(), drawn()
    found = multistep_velocity(torch.tensor([0.5, -0.25, 2.0, 3.0]), us, xs, x, network)
    torch.testing.assert_close(found, 0.5 * network - 0.25 * us[0] + 2 * x + 3 * xs[0])
    with pytest.raises(ValueError, match="1 velocities and 2 latents and a network"):
        multistep_velocity(torch.ones(3), us, xs, x, network)
    wanted = torch.tensor([0.3, -0.7, 0.2, 1.5])
    us, xs, x, network = [drawn(8, 2, 1, 3, 3)], [drawn(8, 2, 1, 3, 3)], drawn(8, 2, 1, 3, 3), drawn(8, 2, 1, 3, 3)
    found = fit_coefficients(us, xs, x, multistep_velocity(wanted, us, xs, x, network), 0, network)
    torch.testing.assert_close(found.float(), wanted, atol=1e-6, rtol=1e-6)


def test_numbers_that_change_with_guidance_lie_on_a_line_within_its_range(drawn):
    rows = scalars().coefficients
    made = scalars(
        guidance_range=(1.0, 5.0), at_highest={step: tuple(2 * n for n in row) for step, row in rows.items()}
    )
    constant = torch.tensor(rows[2])
    for scale, factor in ((1.0, 1.0), (2.0, 1.25), (5.0, 2.0), (9.0, 2.0), (0.5, 1.0), (None, 1.5)):
        torch.testing.assert_close(made.numbers(2, scale), factor * constant)
        assert torch.equal(scalars().numbers(2, scale), constant)
    scales = torch.tensor([1.0, 5.0])
    torch.testing.assert_close(made.numbers(2, scales), torch.stack([constant, 2 * constant], 1))
    us, xs, x = [drawn(), drawn()], [drawn(), drawn()], drawn()
    together = made.velocity(2, us, xs, x, guidance=scales)
    for i, scale in enumerate((1.0, 5.0)):
        alone = made.velocity(2, [u[i : i + 1] for u in us], [x[i : i + 1] for x in xs], x[i : i + 1], guidance=scale)
        torch.testing.assert_close(together[i : i + 1], alone)


def test_numbers_that_change_with_guidance_are_found(drawn):
    us, xs, x = [drawn(8, 2, 1, 3, 3)], [drawn(8, 2, 1, 3, 3)], drawn(8, 2, 1, 3, 3)
    wanted, share = torch.tensor([[0.3, -0.7, 0.2], [1.5, -1.0, 0.4]]), torch.linspace(0, 1, 8)
    rows = wanted[0][:, None] + share * (wanted[1] - wanted[0])[:, None]
    target = multistep_velocity(rows, us, xs, x)
    torch.testing.assert_close(
        fit_coefficients(us, xs, x, target, 0, None, share).float(), wanted, atol=1e-6, rtol=1e-6
    )


def test_those_on_top_of_a_network_lie_in_its_folder(tmp_path):
    assert Multistep.on_top_of(tmp_path) is None
    rows = {step: (0.5, *row) for step, row in scalars().coefficients.items()}
    made = multistep(lists=(scalars(coefficients=rows, network=True),))
    made.save_pretrained(tmp_path, SCALARS_FILE)
    found = Multistep.on_top_of(tmp_path)
    assert found is not None and found.config == made.config and kind_of(tmp_path) == "predictor"
    multistep().save_pretrained(tmp_path, SCALARS_FILE)
    with pytest.raises(UserError, match="no others"):
        Multistep.on_top_of(tmp_path)


def test_a_folder_holds_all_of_it(tmp_path):
    made = multistep()
    made.save_pretrained(tmp_path)
    assert Multistep.from_pretrained(tmp_path).config == made.config
    assert kind_of(tmp_path) == "multistep" and kind_of(tmp_path / "nowhere") == "predictor"
    content = json.loads((tmp_path / "config.json").read_text())
    assert content["format"] == "multistep/1" and content["lists"][0]["times"][0] == 1.0


SPOILT = {
    "another format": ({"format": "multistep/9"}, "its format is multistep/9"),
    "no model": ({"student": ...}, "student"),
    "a family of nobody": ({"family": "nobody"}, "known are"),
    "a range upside down": ({"guidance_range": [4.0, 1.0]}, "guidance from 4 to 1"),
    "a step without numbers": ({"coefficients": {"2": [0, 0, 0, 0, 0]}}, "are not the 5 steps"),
    "too few numbers": ({"coefficients": {"2": [0, 0, 0], "4": [0] * 7}}, "step 2 has 3 coefficients"),
    "numbers that are none": ({"coefficients": {"2": [0, 0, 0, 0, 0], "4": [float("nan")] * 7}}, "not finite"),
    "a network elsewhere": ({"network": True, "coefficients": {"2": [0] * 6, "4": [0] * 8}}, "scalars.json"),
    "a network without numbers": ({"network": True}, "step 2 has 5 coefficients"),
    "half of what changes with guidance": ({"at_highest": {"2": [0] * 5, "4": [0] * 7}}, "go together"),
    "no grid": ({"times": None, "shift": None}, "without a grid"),
    "a list that is none": ({"lists": [3]}, "mapping"),
}


@pytest.mark.parametrize("spoilt", SPOILT)
def test_damaged_files_are_named_with_what_is_wrong(tmp_path, spoilt):
    changes, expected = SPOILT[spoilt]
    multistep().save_pretrained(tmp_path)
    content = json.loads((tmp_path / "config.json").read_text())
    for key, value in changes.items():
        where = content if key in content else content["lists"][0]
        if value is ...:
            del where[key]
        else:
            where[key] = value
    (tmp_path / "config.json").write_text(json.dumps(content))
    with pytest.raises(UserError) as caught:
        Multistep.from_pretrained(tmp_path)
    assert expected in f"{caught.value.message} {caught.value.hint}"


def test_what_they_were_not_fitted_to_is_refused():
    made = multistep()
    made.check_fits("wan", {"f" * 64})
    made.check_fits("wan", {"0" * 64}, force=True)
    for student, which in (({"0" * 64}, "another"), (None, "not known")):
        with pytest.raises(UserError, match=which):
            made.check_fits("wan", student)
    with pytest.raises(UserError, match="this is hunyuan_video"):
        made.check_fits("hunyuan_video", {"f" * 64}, force=True)
    found = made.find([0, 1, 3], 5)
    assert found is not None and found is made.find([0, 1, 3], 5, found.times)
    assert made.find([0, 2], 5) is None
    error = made.lacking([0, 2], 5)
    assert "0 2 of 5" in error.message and "0 1 3 of 5" in error.hint
    even = [1, 0.8, 0.6, 0.4, 0.2, 0]
    assert made.find([0, 1, 3], 5, even) is None and "on the grid of" in made.lacking([0, 1, 3], 5, even).message
    for scale in (1.0, 4.0, 4.05):
        made.check_guidance(scale)
    with pytest.raises(UserError, match="guidance=6") as caught:
        made.check_guidance(6.0)
    assert "guidance=4" in caught.value.hint
