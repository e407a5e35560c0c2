"""Schedules of a model that is denoised by two transformers: no stretch of predicted steps leads past the switch."""

import json

import pytest
import torch

import vidaccel
from tests.tiny import SIZE, called, tiny_pipeline
from vidaccel.cache.schedule import Schedule, candidates, read_schedules, write_schedules
from vidaccel.cache.trunk import Trunk
from vidaccel.cache.trunks import Trunks
from vidaccel.collect.encode import encode_texts
from vidaccel.collect.trajectories import TrajectorySampler
from vidaccel.config.collect import CollectConfig
from vidaccel.errors import UserError
from vidaccel.families.registry import FAMILIES
from vidaccel.families.walk import boundaries_of, denoisers_of
from vidaccel.forecasters.learned import new_predictor
from vidaccel.forecasters.reuse import Reuse
from vidaccel.forecasters.taylor import Taylor
from vidaccel.models.grid import Grid, GridScheduler
from vidaccel.models.loading import LoadedPipeline
from vidaccel.models.velocity import GuidedVelocity, velocity_of
from vidaccel.train.predictor.search import list_errors, stretch_costs

GRID = Grid.shifted(6, 3.0)
"""Of which the first three steps are the first transformer's."""
FIRSTS = (0, 3)


@pytest.fixture(scope="module")
def loaded():
    pipe = tiny_pipeline("wan22")
    pipe.scheduler = GridScheduler(shift=3.0)
    for each in denoisers_of(pipe, FAMILIES["wan22"]):
        each.requires_grad_(False)
    return LoadedPipeline(pipe, FAMILIES["wan22"], "here", SIZE | {"fps": 8}, {})


def trunks_of(loaded, history):
    trunks = [Trunk(each, loaded.family, history) for each in denoisers_of(loaded.pipe, loaded.family)]
    return Trunks(trunks, boundaries_of(loaded.pipe, loaded.family))


def run(loaded, noise, **more):
    arguments = {"num_inference_steps": 6, "guidance_scale": 1.0, "output_type": "latent", **called(loaded.pipe)}
    return loaded.pipe("a red circle", latents=noise.clone(), **arguments | more).frames


def test_the_steps_with_which_transformers_begin():
    assert GRID.firsts([0.8]) == FIRSTS and GRID.firsts([]) == (0,)
    assert GRID.firsts([0.1]) == (0,) and GRID.firsts([2.0]) == (0,)
    assert Grid.listed([1000, 875, 500], None).firsts([0.875]) == (0, 2)  # at the boundary it is still the first's


def test_a_run_of_our_own_is_the_pipelines_with_a_scale_for_each(loaded):
    asked = CollectConfig(kind="trajectory", model="here", steps=6, shift=3.0, guidance=4.0, guidance_2=2.0)
    sampler = TrajectorySampler(loaded, asked)
    with torch.no_grad():
        made = sampler(["a red circle"], [0])
    x, u = made["x"][0], made["velocity"][0]
    end = x[-1] - GRID.times[-2] * u[-1]
    expected = run(loaded, x[:1], guidance_scale=4.0, guidance_scale_2=2.0)
    torch.testing.assert_close(end, expected[0], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(end, run(loaded, x[:1], guidance_scale=4.0)[0], rtol=1e-2)
    with pytest.raises(UserError, match="cache=true is for one transformer"):
        TrajectorySampler(loaded, CollectConfig(kind="trajectory", model="here", cache=True, guidance=1.0))


def networks(loaded):
    """A predictor with a network for each transformer, which answer differently."""
    first, second = denoisers_of(loaded.pipe, loaded.family)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made_for = {"steps": 6, "shift": 3.0, "times": GRID.times}
        further = new_predictor(second, loaded.family, {}, {}, 1, **made_for)
        made = new_predictor(first, loaded.family, {}, {}, 1, [further], boundary=0.8, **made_for)
        for network in made.parts:
            torch.nn.init.normal_(network.fusions["hidden_states"].outer.weight, std=0.05)
    return made.eval()


@torch.no_grad()
@pytest.mark.parametrize("guided", [False, True], ids=["one pass", "two"])
@pytest.mark.parametrize("forecaster", [Reuse(), Taylor(grid=GRID), networks], ids=["reuse", "taylor", "learned"])
def test_lists_are_as_attached_and_stretches_stay_on_their_side(loaded, forecaster, guided):
    forecaster = forecaster(loaded) if forecaster is networks else forecaster
    velocity, noise = velocity_of(loaded), torch.randn(1, 4, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    text, told = encode_texts(loaded, ["a red circle"]), {}
    if guided:
        velocity = GuidedVelocity(velocity, encode_texts(loaded, ["a dog"]), 4.0, 2.0)
        told = {"guidance_scale": 4.0, "guidance_scale_2": 2.0, "negative_prompt": "a dog"}
    lists = [(0, 3), (0, 1, 3), (0, 2, 3, 4)]
    with trunks_of(loaded, forecaster.history) as trunks:
        costs = stretch_costs(velocity, trunks, forecaster, noise, text, GRID.tensor, None, FIRSTS)
        errors = dict(list_errors(velocity, trunks, forecaster, noise, text, GRID, None, lists, FIRSTS))
    across = costs[..., :3, 4:]
    assert across.isinf().all() and not costs[..., 3:, :].isinf().any() and not costs[..., :4].isinf().any()
    last = costs[0, 3, 6] if forecaster.history > 1 else costs[3, 6]  # what the first transformer left is not looked at
    found = candidates(costs.tolist(), 3)
    assert set(found) == {2, 3, 4, 5, 6}
    assert all(3 in full for ways in found.values() for _, full in ways)
    plain = run(loaded, noise, **told)
    named = {Reuse: "reuse", Taylor: "taylor"}.get(type(forecaster), forecaster)
    for full, error in errors.items():
        with vidaccel.attach(loaded.pipe, predictor=named, steps=6, full_steps=list(full)):
            got = run(loaded, noise, **told)
        torch.testing.assert_close(
            float((got - plain).square().sum() / plain.square().sum()), float(error), rtol=1e-2, atol=1e-9
        )
    with vidaccel.attach(loaded.pipe, predictor=named, steps=6, full_steps=[0, 1, 2, 3]):
        alone = float((run(loaded, noise, **told) - plain).square().sum() / plain.square().sum())
    assert float(last) == pytest.approx(alone, rel=1e-2)


def test_a_schedule_says_where_the_second_begins(loaded, tmp_path):
    write_schedules(tmp_path / "two.json", [Schedule(6, (0, 3), "search", 3.0, 0.1, None, 0.7)])
    write_schedules(tmp_path / "one.json", [Schedule(6, (0, 3), "search", 3.0, 0.1)])
    assert read_schedules(tmp_path / "two.json")[0].boundary == 0.7
    assert "boundary" not in json.loads((tmp_path / "one.json").read_text())["2-of-6"]
    with pytest.raises(UserError, match="second transformer below t = 0.7, and the pipeline has 0.8"):
        vidaccel.attach(loaded.pipe, predictor="reuse", schedule=tmp_path / "two.json")
    vidaccel.attach(loaded.pipe, predictor="reuse", schedule=tmp_path / "one.json").detach()
    with pytest.raises(UserError, match="no second transformer"):
        vidaccel.attach(tiny_pipeline("wan"), predictor="reuse", schedule=tmp_path / "two.json")
