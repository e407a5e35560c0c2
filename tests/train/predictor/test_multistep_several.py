"""Scalars of a model that is denoised by two transformers: each looks back on its own full steps."""

import json
from types import SimpleNamespace

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

import vidaccel
from tests.students import save_teacher
from tests.tiny import called, guided, tiny_pipeline
from vidaccel.cache.attach import attach
from vidaccel.cache.schedule import candidates, read_schedules
from vidaccel.cache.whole_pass import WholePass
from vidaccel.config.predictor import PredictorConfig
from vidaccel.errors import UserError
from vidaccel.families.registry import family_of
from vidaccel.families.walk import denoisers_of
from vidaccel.forecasters.multistep import FittedList, Multistep
from vidaccel.models.calling import call_arguments
from vidaccel.models.grid import Grid, current_step, on_grid
from vidaccel.models.loading import load_pipeline
from vidaccel.train.predictor.multistep import runs_of
from vidaccel.train.predictor.runs import Runs
from vidaccel.train.predictor.scalars import estimated_costs, fit_lists, measured_growth, relative_error, served_final

GRID, BOUNDARY = Grid.shifted(5, 2.0), 0.7
"""Of whose steps the first three are the first transformer's."""
FIRST, SECOND = torch.tensor([[1.5, 0.0], [0.0, -0.5]]), torch.tensor([[0.3, 1.1], [-0.9, 0.6]])


def switched(x, t):
    """u = A x, with another A below the boundary: what x and u span is all there is, of each alone."""
    return torch.einsum("ij,njthw->nithw", FIRST if t >= BOUNDARY else SECOND, x)


def toy(boundary=BOUNDARY, count=12) -> Runs:
    x = torch.randn(count, 2, 1, 2, 3, generator=torch.Generator().manual_seed(0))
    states, velocities, times = [x], [], GRID.tensor
    for t, r in zip(times[:-1], times[1:], strict=True):
        velocities.append(switched(states[-1], t))
        states.append(states[-1] - (t - r) * velocities[-1])
    give = lambda x, t, text, r, g: switched(x, t[0])  # noqa: E731
    sampler = SimpleNamespace(grid=GRID, guided=give, device=torch.device("cpu"))
    return Runs(sampler, states, velocities, {}, None, batch_size=5, boundary=boundary)


def test_one_full_step_of_each_gives_the_exact_answer_of_a_linear_equation_with_a_switch():
    runs = toy()
    for made, final in fit_lists(runs, [(0, 3), (0, 1, 3), (0, 2, 3, 4)], fitted=8, ridge=1e-10):
        assert made.error == pytest.approx(0, abs=2e-4), made.full_steps
        torch.testing.assert_close(final, runs.states[-1][8:], rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(served_final(runs.part(slice(8, None)), made), final, rtol=1e-4, atol=1e-4)
        assert made.boundary == BOUNDARY
        if 4 in made.coefficients:  # of the one full step since the switch: a, b, c
            assert len(made.coefficients[4]) == 3
    ((without, _),) = fit_lists(toy(boundary=None), [(0,)], fitted=8, ridge=1e-10)
    assert without.error > 0.1  # what the first leaves says nothing of the second


def test_estimates_are_exact_on_either_side_and_infinite_across():
    runs = toy()
    growth = measured_growth(runs, 3)
    assert growth[1] == growth[4] == 1.0 != growth[3]  # a state that no predicted step leads to has none
    costs = torch.tensor(estimated_costs(runs, growth))
    assert costs[:, :3, 4:].isinf().all()
    assert all(costs[h, i, j] < 1e-6 for i in range(3) for h in range(max(i, 1)) for j in range(i + 1, 4))
    assert all(costs[h, i, j] < 1e-6 for i in (3, 4) for h in range(i) for j in range(i + 1, 6))
    found = candidates(costs.tolist(), 3)
    assert 1 not in found and all({0, 3} <= set(full) for ways in found.values() for _, full in ways)


def test_a_list_without_the_switch_is_none():
    with pytest.raises(ValueError, match="step 3, the first of a transformer, is not full"):
        FittedList((0, 1), {}, 5, 2.0, boundary=BOUNDARY)
    made = FittedList((0, 3), dict.fromkeys((1, 2, 4), (1.0, 0.0, 0.0)), 5, 2.0, boundary=BOUNDARY)
    assert made.firsts == (0, 3) and FittedList(**json.loads(json.dumps(made.record()))) == made
    assert "boundary" not in FittedList((0,), {1: (1.0, 0.0, 0.0)}, 2, 2.0).record()


@pytest.mark.parametrize("name", ["wan22", "wan22_i2v"])
def test_the_last_velocity_again_is_as_written_out_by_hand(name):
    pipe = tiny_pipeline(name)
    family = family_of(pipe)
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    arguments = {"num_inference_steps": 4, "output_type": "latent", **called(pipe), **guided(pipe, 4.0)}

    def call():
        return pipe(prompt="a red circle", generator=torch.Generator().manual_seed(0), **arguments).frames

    kept = {}

    def again(transformer, inputs, output):
        stored, calls = kept.setdefault(transformer, ({}, []))
        side = len(calls) % 2
        calls.append(1)
        if current_step(pipe.scheduler).index in (0, 2):
            stored[side] = output
        return stored[side]

    hooks = [each.register_forward_hook(again) for each in denoisers_of(pipe, family)]
    expected = call()
    for each in hooks:
        each.remove()
    reuse = FittedList((0, 2), dict.fromkeys((1, 3), (1.0, 0.0, 0.0)), 4, 3.0, boundary=0.8)
    sizes = []
    with WholePass(pipe, family, reuse) as attached:
        look = lambda *_: sizes.append([len(kept) for kept in attached.remembered])  # noqa: E731
        hooks = [each.register_forward_hook(look) for each in denoisers_of(pipe, family)]
        for _ in range(2):  # nothing is left of the generation before
            torch.testing.assert_close(call(), expected)
        for each in hooks:
            each.remove()
        assert (attached.full_passes, attached.predicted_passes) == (8, 8)
        pipe.register_to_config(boundary_ratio=0.95)
        with pytest.raises(UserError, match="switches its transformer at step 1"):
            call()
    assert sizes[4] == [] and sizes[5] == [1]  # at the switch what the first left is freed


SETTINGS = {"forecaster": "multistep", "runs": 4, "checked_prompts": 2, "tried": 2, "search_prompts": 2, "steps": 4}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A model of two transformers, and scalars of it at a scale of guidance for each."""
    folder = tmp_path_factory.mktemp("several")
    model = save_teacher(folder / "model", "wan22")
    (folder / "prompts.txt").write_text("a red circle\na blue square\n")
    given = {"student": str(model), "prompts": str(folder / "prompts.txt")}
    given |= SETTINGS | {"guidance": 4.0, "guidance_2": 2.0}
    vidaccel.train_predictor(PredictorConfig(), folder / "scalars", **given)
    return folder, given


def test_the_error_is_that_of_the_pipeline_as_it_serves(world):
    folder, _ = world
    config = Multistep.from_pretrained(folder / "scalars").config
    ((made,), (schedule,)) = config.lists, read_schedules(folder / "scalars" / "schedule.json")
    assert made.full_steps == schedule.full_steps == (0, 2) and made.boundary == schedule.boundary == 0.8
    assert (config.guidance_range, config.guidance_2, config.two_pass) == ((4.0, 4.0), 2.0, True)
    loaded = load_pipeline(folder / "model")
    sigmas = list(Grid.shifted(4, 3.0).times)

    def latents(guidance_2=2.0):
        loaded.pipe.set_progress_bar_config(disable=True)
        arguments = call_arguments(loaded, steps=4, guidance=4.0, guidance_2=guidance_2)
        made = [
            loaded.pipe(
                "a blue square", output_type="latent", generator=torch.Generator().manual_seed(seed), **arguments
            )
            for seed in (4, 5)
        ]
        return torch.cat([each.frames for each in made])

    with on_grid(loaded.pipe, grid=Grid.listed(None, sigmas)):
        own = latents()
    with attach(loaded, predictor=folder / "scalars", sigmas=sigmas) as attached:
        served = latents()
        assert (attached.full_passes, attached.predicted_passes) == (8, 8)
        with pytest.raises(UserError, match=r"guidance_2=3.*runs with 2\nhint: sample with guidance_2=2"):
            latents(3.0)
    assert made.error == pytest.approx(relative_error(served, own), rel=1e-2) and made.error > 0
    loaded.pipe.register_to_config(boundary_ratio=0.9)
    for which in ({"budget": 2}, {"full_steps": [0, 2]}):
        with pytest.raises(UserError, match="below t = 0.8, and the pipeline has 0.9"):
            attach(loaded, predictor=folder / "scalars", sigmas=sigmas, **which)


def test_a_range_of_guidance_is_of_both_unless_the_second_has_its_own(world):
    folder, given = world
    loaded = load_pipeline(folder / "model")
    base = PredictorConfig(**{**given, "guidance": None, "guidance_2": None, "guidance_range": [2.0, 6.0]})
    for second, expected in ((None, None), (3.0, 3.0)):
        base.guidance_2 = second
        sampler, _, span = runs_of(base, loaded)
        assert (sampler.second, span) == (expected, (2.0, 6.0))


def test_lists_and_budgets_that_leave_out_the_second_are_refused(world, tmp_path):
    folder, given = world
    for settings, said in (
        ({"full_steps": [0, 1]}, r"leaves out 2, the first .*\nhint: list it: full_steps=\[0, 1, 2\]"),
        ({"budgets": [1]}, r"first step of each of 2 transformers"),
        ({"steps": 2}, "each of 2 steps is the first of a transformer"),
    ):
        with pytest.raises(UserError, match=said):
            vidaccel.train_predictor(PredictorConfig(), tmp_path / "x", **given | settings)
