"""Step grids as lists of times, worked out by hand, and those that diffusers' schedulers make."""

from types import SimpleNamespace

import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler
from hypothesis import given
from hypothesis import strategies as st

from vidaccel.errors import UserError
from vidaccel.families.registry import FAMILIES
from vidaccel.models.grid import (
    Grid,
    GridScheduler,
    fixed_shift,
    on_grid,
    own_grid,
    running_grid,
    shift_of,
    step_grid,
)

WAN, LTX_VIDEO = FAMILIES["wan"], FAMILIES["ltx_video"]


def unipc(**options: object) -> UniPCMultistepScheduler:
    return UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0, **options)


def set_to(scheduler, steps: int = 20, **how: object):
    scheduler.set_timesteps(**how) if how else scheduler.set_timesteps(steps)
    return scheduler


def test_even_time_is_the_place_along_the_list():
    grid = Grid((1.0, 0.9, 0.5, 0.0))
    times = torch.tensor([1.0, 0.95, 0.9, 0.7, 0.5, 0.25, 0.0])
    expected = torch.tensor([6, 5, 4, 3, 2, 1, 0]) / 6
    torch.testing.assert_close(grid.even(times), expected)
    torch.testing.assert_close(grid.even(torch.tensor(0.7)), torch.tensor(0.5))
    assert grid.widest == pytest.approx(0.5) and grid.steps == 3


@given(steps=st.integers(1, 50), shift=st.floats(0.5, 9))
def test_on_the_grid_of_a_shift_even_time_is_k_whichever_way_it_is_found(steps, shift):
    grid = Grid.shifted(steps, shift)
    assert torch.equal(grid.tensor, step_grid(steps, shift))
    k = torch.linspace(1, 0, steps + 1)
    torch.testing.assert_close(grid.even(grid.tensor), k, atol=1e-5, rtol=0)
    torch.testing.assert_close(Grid(grid.times).even(grid.tensor), k, atol=1e-6, rtol=0)


def test_a_grid_is_the_same_in_other_numbers_of_steps_and_another_of_another_shift():
    grid = Grid.shifted(20, 2.0)
    assert all(grid.fits(step_grid(steps, 2.0).tolist()) for steps in (1, 4, 8, 20, 50))
    assert not any(grid.fits(step_grid(steps, shift).tolist()) for steps in (8, 20) for shift in (1.0, 2.5, 3.0))
    listed = Grid((1.0, 0.9, 0.5, 0.0))
    assert listed.fits(listed.times) and listed.fits((1.0, 0.9, 0.49, 0.0))
    assert not listed.fits((1.0, 0.9, 0.45, 0.0)) and not listed.fits(step_grid(3, 3.0).tolist())


def test_what_files_record():
    times = tuple(step_grid(4, 2.0).tolist())
    assert Grid.recorded(4, 2.0, None) == Grid.recorded(4, 2.0, list(times)) == Grid(times, 2.0)
    assert Grid.recorded(None, None, None) is Grid.recorded(4, None, None) is None
    assert Grid.recorded(2, None, [1, 0.5, 0]) == Grid((1.0, 0.5, 0.0))
    for wrong, why in (
        ((4, 3.0, times), "not those of shift 3"),
        ((3, 2.0, times), "5 times for 3 steps"),
        ((None, 3.0, None), "how many steps"),
        ((2, None, [1, 0.5, 0.5]), "are no step grid"),
        ((2, None, [9.0, 0.5, 0.0]), "are no step grid"),
        ((2, None, [0.0, 0.5, 1.0]), "are no step grid"),
        ((0, None, [1.0]), "are no step grid"),
    ):
        with pytest.raises(UserError, match=why):
            Grid.recorded(*wrong)


@pytest.mark.parametrize(
    ("scheduler", "shift"),
    [
        (set_to(GridScheduler(shift=3.0)), 3.0),
        (set_to(FlowMatchEulerDiscreteScheduler(shift=3.0), sigmas=[1.0, 0.75, 0.5, 0.25]), 3.0),
        (set_to(unipc()), 3.0),  # whose last time is a thousandth of the sampling early
        (set_to(unipc(), 50), 3.0),
        (set_to(FlowMatchEulerDiscreteScheduler(shift=3.0)), None),  # shifts its smallest sigma twice
        (set_to(FlowMatchEulerDiscreteScheduler(shift=3.0), sigmas=[1.0, 0.8, 0.3]), None),
        (set_to(FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True), sigmas=[1.0, 0.5], mu=0.9), None),
        (set_to(FlowMatchEulerDiscreteScheduler(shift=3.0, use_karras_sigmas=True)), None),
        (set_to(unipc(use_karras_sigmas=True)), None),
    ],
)
def test_the_grid_that_runs_is_what_the_scheduler_has_set(scheduler, shift):
    grid = running_grid(scheduler, WAN)
    assert grid.shift == shift and grid.steps == len(scheduler.timesteps)
    if shift is None:
        torch.testing.assert_close(grid.tensor, scheduler.sigmas.cpu(), atol=0, rtol=0)
    else:
        torch.testing.assert_close(grid.tensor, scheduler.sigmas.cpu(), atol=3e-3, rtol=0)


@pytest.mark.parametrize(
    ("scheduler", "why"),
    [
        (set_to(DDIMScheduler()), "DDIMScheduler has no times of flow matching"),
        (set_to(UniPCMultistepScheduler()), "are no step grid, and they are those of the UniPCMultistepScheduler"),
        (
            set_to(FlowMatchEulerDiscreteScheduler(shift=3.0), timesteps=[1000.0, 600.0, 200.0]),
            "timesteps that are not those of its sigmas",
        ),
    ],
)
def test_times_that_are_not_understood_are_refused(scheduler, why):
    with pytest.raises(UserError, match=why):
        running_grid(scheduler, WAN)


def test_no_shift_makes_the_grids_of_some_options():
    for option in ("use_karras_sigmas", "use_exponential_sigmas"):
        scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, **{option: True})
        assert shift_of(scheduler, WAN) is None
        with pytest.raises(UserError, match=rf"FlowMatchEulerDiscreteScheduler \({option}\)\nhint: set shift="):
            fixed_shift(scheduler, WAN)
    dynamic = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    assert shift_of(dynamic, LTX_VIDEO) is None and fixed_shift(dynamic, LTX_VIDEO) == LTX_VIDEO.defaults.shift == 7.8
    assert fixed_shift(GridScheduler(shift=2.0), WAN) == shift_of(GridScheduler(shift=2.0), WAN) == 2.0


def test_a_list_of_timesteps_or_sigmas_is_a_grid():
    dmd = Grid.listed([1000, 757, 522], None)
    assert dmd == Grid.listed(None, [1.0, 0.757, 0.522, 0.0]) == Grid((1.0, 0.757, 0.522, 0.0))
    assert Grid.listed(None, None) is None
    for timesteps, sigmas, why in (
        ([1000], [1.0], "came with sigmas"),
        (None, [1000, 500], "are not in"),
        ([500, 700], None, "are no step grid"),
        ([], None, "are no step grid"),
    ):
        with pytest.raises(UserError, match=why):
            Grid.listed(timesteps, sigmas)


def test_listed_times_run_as_they_are_whatever_a_pipeline_asks_for():
    grid = Grid.listed([1000, 757, 522], None)
    own = unipc()
    pipe = type("WanPipeline", (SimpleNamespace,), {})(scheduler=own)
    with on_grid(pipe, grid=grid):
        listed = pipe.scheduler
        for how in ({"num_inference_steps": 3}, {"sigmas": [1.0, 0.5, 0.2], "mu": 0.9}, {"timesteps": [9, 8, 7]}):
            listed.set_timesteps(**how)
            assert torch.equal(listed.timesteps, 1000 * grid.tensor[:-1]) and torch.equal(listed.sigmas, grid.tensor)
        assert shift_of(listed, WAN) is None
        assert torch.equal(running_grid(listed, WAN).tensor, grid.tensor)
        assert torch.equal(own_grid(listed, WAN, 3).tensor, grid.tensor)
        with pytest.raises(UserError, match="4 steps, and the times 1, 0.757, 0.522, 0 are a grid of 3"):
            listed.set_timesteps(4)
        with on_grid(pipe, shift=2.0):
            assert shift_of(pipe.scheduler, WAN) == 2.0 and own_grid(pipe.scheduler, WAN, 4) == Grid.shifted(4, 2.0)
        assert pipe.scheduler is listed
    assert pipe.scheduler is own


def test_a_grid_that_no_shift_makes_is_read_off_the_scheduler():
    scheduler = unipc(use_karras_sigmas=True)
    assert own_grid(scheduler, WAN, 8).times == tuple(set_to(unipc(use_karras_sigmas=True), 8).sigmas.tolist())
    assert scheduler.num_inference_steps is None and own_grid(unipc(), WAN, 8) == Grid.shifted(8, 3.0)
    with pytest.raises(UserError, match=r"follows from the size of the video\nhint: set shift=.*sigmas="):
        own_grid(FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True), WAN, 8)
