"""Pipelines of all families under fitted scalars: what a predicted step is, what it enters, and what is left behind."""

from dataclasses import replace

import pytest
import torch
from accelerate import cpu_offload_with_hook
from accelerate.hooks import remove_hook_from_module
from diffusers import FlowMatchEulerDiscreteScheduler, MochiTransformer3DModel, UniPCMultistepScheduler

from tests.cache.test_attach import call
from tests.students import student
from tests.tiny import FLOW, SIZE, calls_of_a_step, tiny_pipeline
from vidaccel.bench.measures.counting import held_bytes
from vidaccel.cache.attach import attach
from vidaccel.cache.attachment import Attachment
from vidaccel.cache.policy import FullSteps
from vidaccel.cache.schedule import Schedule, write_schedules
from vidaccel.cache.whole_pass import WholePass, scalars_on
from vidaccel.errors import UserError
from vidaccel.families.registry import family_of_pipeline
from vidaccel.forecasters.multistep import FittedList, Multistep, MultistepConfig
from vidaccel.forecasters.reuse import Reuse
from vidaccel.models.grid import Grid, GridScheduler
from vidaccel.models.loading import load_pipeline
from vidaccel.models.weight_hashes import student_hash

STEPS, FULL, SHIFT = 5, (0, 1, 3), 3.0
SECOND, LAST = (0.7, 0.2, 0.05, -0.05, 0.02), (0.9, 0.1, -0.1, 0.03, 0.0, 0.01, -0.02)
SCALARS = FittedList(FULL, {2: SECOND, 4: LAST}, STEPS, shift=SHIFT)


@pytest.fixture(scope="module", params=[*FLOW, "mochi"])  # whose velocities lead the other way
def pipe(request):
    pipe = tiny_pipeline(request.param)
    pipe.scheduler = GridScheduler(shift=SHIFT, invert_sigmas=pipe.scheduler.config.get("invert_sigmas", False))
    return pipe


def config(pipe, **changes) -> MultistepConfig:
    family = family_of_pipeline(type(pipe).__name__).name
    made = {"family": family, "student": "f" * 64, "guidance_range": (1.0, 8.0), "two_pass": True}
    return MultistepConfig(**(made | {"lists": (SCALARS,)} | changes))


def attached(pipe, full_steps=FULL, force=True, **changes) -> WholePass:
    return attach(
        pipe, predictor=Multistep(config(pipe, **changes)), steps=STEPS, full_steps=list(full_steps), force=force
    )


class ByHand:
    """The forecasts written out for one transformer: a hook of its forward that puts them in place of what it gives,
    to which a share `w` of that is added."""

    def __init__(self, transformer, passes, w=0.0):
        self.transformer, self.passes, self.calls, self.w = transformer, passes, 0, w
        self.xs, self.us = [{} for _ in range(passes)], [{} for _ in range(passes)]

    def __enter__(self):
        self.handle = self.transformer.register_forward_hook(self.replace, with_kwargs=True)

    def __exit__(self, *error):
        self.handle.remove()

    def replace(self, transformer, args, kwargs, output):
        step, place = divmod(self.calls, self.passes)
        self.calls += 1
        xs, us = self.xs[place], self.us[place]
        sign = -1 if isinstance(transformer, MochiTransformer3DModel) else 1
        xs[step], us[step] = kwargs["hidden_states"][:, : output[0].shape[1]], sign * output[0]
        if step == 2:
            a1, a2, b, c1, c2 = SECOND
            return (sign * (self.w * us[2] + a1 * us[1] + a2 * us[0] + b * xs[2] + c1 * xs[1] + c2 * xs[0]),)
        if step == 4:
            a1, a2, a3, b, c1, c2, c3 = LAST
            sum_of_us = self.w * us[4] + a1 * us[3] + a2 * us[1] + a3 * us[0]
            return (sign * (sum_of_us + b * xs[4] + c1 * xs[3] + c2 * xs[1] + c3 * xs[0]),)
        return None


@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_predicted_steps_are_the_sums_that_are_written_out(pipe, guidance):
    passes = 1 + (guidance > 1)
    with ByHand(pipe.transformer, calls_of_a_step(pipe, passes)):
        expected = call(pipe, steps=STEPS, guidance=guidance)
    with attached(pipe) as scalars:
        found = call(pipe, steps=STEPS, guidance=guidance)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert (scalars.full_passes, scalars.predicted_passes) == (3 * passes, 2 * passes)
    assert not torch.equal(found, call(pipe, steps=STEPS, guidance=guidance))


def test_of_lists_on_several_grids_the_one_of_the_pipelines_own_serves(pipe):
    other = replace(SCALARS, shift=7.0, times=None)
    with attached(pipe, lists=(other, SCALARS)) as scalars:
        call(pipe, steps=STEPS)
    assert scalars.predicted_passes
    with pytest.raises(UserError, match="is for the grid of shift 7, and the pipeline is on that of shift 3"):
        attached(pipe, lists=(other,))


def on_top(pipe, rows) -> WholePass:
    """Scalars with these numbers on top of reuse of the trunk's tokens, in a network's place."""
    family = family_of_pipeline(type(pipe).__name__)
    attachment = Attachment(pipe, family, Reuse(), FullSteps(FULL, STEPS))
    return WholePass(pipe, family, replace(SCALARS, coefficients=rows, network=True), network=attachment)


def test_on_top_of_a_network_its_answer_is_one_more_term(pipe):
    """None of it is scalars alone, all of it and nothing else the network alone, and some of it the sum by hand."""
    weighted = lambda w, rest=1.0: {step: (w, *(rest * n for n in row)) for step, row in SCALARS.coefficients.items()}  # noqa: E731
    family, guidance = family_of_pipeline(type(pipe).__name__), {"steps": STEPS, "guidance": 4.0}
    alone = Attachment(pipe, family, Reuse(), FullSteps(FULL, STEPS))
    with alone:
        network = call(pipe, **guidance)
        with ByHand(pipe.transformer, calls_of_a_step(pipe), w=0.3):
            some = call(pipe, **guidance)
    with attached(pipe):
        scalars = call(pipe, **guidance)
    plain, entered = call(pipe, **guidance), []
    handle = pipe.transformer.register_forward_hook(lambda *_: entered.append(1))
    for expected, rows in ((network, weighted(1.0, 0.0)), (scalars, weighted(0.0)), (some, weighted(0.3))):
        with on_top(pipe, rows) as made:
            torch.testing.assert_close(call(pipe, **guidance), expected, rtol=1e-4, atol=1e-5)
            assert not any(made.remembered)
        assert (made.full_passes, made.predicted_passes) == (6, 4)
        assert not torch.allclose(expected, plain, rtol=1e-4, atol=1e-5)
    handle.remove()
    assert len(entered) == 3 * calls_of_a_step(pipe) * STEPS
    assert torch.equal(call(pipe, **guidance), plain) and scalars_on(pipe.transformer) is None


def test_predicted_steps_enter_nothing_of_the_transformer_and_leave_it_as_it_was(pipe):
    entered, passed = [], []
    handles = [module.register_forward_pre_hook(lambda *_: entered.append(1)) for module in pipe.transformer.children()]
    handles.append(pipe.transformer.register_forward_pre_hook(lambda *_: passed.append(1)))
    plain, before = call(pipe, steps=STEPS), len(entered)
    names = set(vars(pipe.transformer))
    with attached(pipe) as scalars:
        first = call(pipe, steps=STEPS)
        assert len(entered) - before == before * len(FULL) // STEPS
        assert len(passed) == 2 * calls_of_a_step(pipe) * STEPS  # who counts passes sees those that are answered
        assert not any(scalars.remembered) and held_bytes(pipe.transformer) == 0
        assert torch.equal(call(pipe, steps=STEPS), first)
    for handle in handles:
        handle.remove()
    assert set(vars(pipe.transformer)) == names and scalars_on(pipe.transformer) is None
    assert torch.equal(call(pipe, steps=STEPS), plain)
    scalars.detach()


def test_what_is_held_is_latents_and_velocities(pipe):
    seen = []
    handle = pipe.transformer.register_forward_hook(lambda *_: seen.append(held_bytes(pipe.transformer)))
    with attached(pipe):
        latents = call(pipe, steps=STEPS, guidance=1.0)
    handle.remove()
    assert max(seen) == 3 * 2 * latents.nbytes


def test_an_attached_or_cached_pipeline_is_refused(pipe):
    with attached(pipe):
        for predictor in ("reuse", Multistep(config(pipe))):
            with pytest.raises(UserError, match="attached already"):
                attach(pipe, predictor=predictor, steps=STEPS, full_steps=list(FULL), force=True)
    with attach(pipe, predictor="reuse", steps=STEPS, every=2), pytest.raises(UserError, match="attached already"):
        attached(pipe)


def test_a_generation_that_is_aborted_leaves_nothing(pipe, monkeypatch):
    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    with attached(pipe):
        expected = call(pipe, steps=STEPS)
        with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
            patched.setattr(pipe.scheduler, "step", stop)
            call(pipe, steps=STEPS)
        assert torch.equal(call(pipe, steps=STEPS), expected)


@pytest.fixture(scope="module")
def wan():
    pipe = tiny_pipeline("wan")
    pipe.scheduler = GridScheduler(shift=SHIFT)
    return pipe


def test_offloaded_weights_stay_where_they_are(wan):
    plain = call(wan, steps=STEPS)
    for offloaded_first in (True, False):
        if offloaded_first:
            cpu_offload_with_hook(wan.transformer, "cpu")
        with attached(wan):
            expected = call(wan, steps=STEPS)
            if not offloaded_first:
                cpu_offload_with_hook(wan.transformer, "cpu")
            assert torch.equal(call(wan, steps=STEPS), expected)
            remove_hook_from_module(wan.transformer, recurse=True)
            assert torch.equal(call(wan, steps=STEPS), expected)
        assert torch.equal(call(wan, steps=STEPS), plain)


def test_compiled_transformers_are_called_as_they_were_compiled(wan):
    calls = []
    wan.transformer._compiled_call_impl = lambda *args, **kwargs: (
        calls.append(1) or wan.transformer._call_impl(*args, **kwargs)
    )
    compiled = wan.transformer._compiled_call_impl
    try:
        with attached(wan):
            call(wan, steps=STEPS, guidance=1.0)
        assert len(calls) == len(FULL) and wan.transformer._compiled_call_impl is compiled
    finally:
        del wan.transformer._compiled_call_impl


def test_other_samplers_are_refused(wan):
    own = wan.scheduler
    others = {
        "UniPC": UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=SHIFT),
        "fresh noise": FlowMatchEulerDiscreteScheduler(shift=SHIFT, stochastic_sampling=True),
    }
    try:
        for which, scheduler in others.items():
            with attached(wan):
                wan.scheduler = scheduler
                with pytest.raises(UserError, match=which):
                    call(wan, steps=STEPS)
                wan.scheduler = own
        with pytest.raises(UserError, match="fresh noise"):
            wan.scheduler = others["fresh noise"]
            attached(wan)
    finally:
        wan.scheduler = own


def test_steps_are_eulers_where_the_pipelines_own_are_not(wan, caplog):
    own, unipc = wan.scheduler, {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
    with attached(wan):
        expected = call(wan, steps=STEPS)
    try:
        wan.scheduler = published = UniPCMultistepScheduler(**unipc, flow_shift=SHIFT)
        with caplog.at_level("INFO"), attached(wan):
            torch.testing.assert_close(call(wan, steps=STEPS), expected)
        assert wan.scheduler is published and "in place of the UniPCMultistepScheduler" in caplog.text
        wan.scheduler = elsewhere = UniPCMultistepScheduler(**unipc, flow_shift=9.0)
        with pytest.raises(UserError, match="grid of shift 3"):
            attached(wan)
        assert wan.scheduler is elsewhere
    finally:
        wan.scheduler = own


def test_other_grids_lists_models_and_guidance_are_refused(wan):
    with pytest.raises(UserError, match="the full steps 0 2 of 5"):
        attached(wan, (0, 2))
    with pytest.raises(UserError, match="fitted to the model ffffffffffff"):
        attached(wan, force=False)
    elsewhere = replace(SCALARS, times=None, shift=5.0)
    with pytest.raises(UserError, match="grid of shift 5") as caught:
        attached(wan, lists=(elsewhere,))
    assert "its grid (shift=5)" in caught.value.hint and "forecaster=multistep shift=3" in caught.value.hint
    with attached(wan):
        with pytest.raises(UserError, match="for 5 steps, and the pipeline runs 4"):
            call(wan, steps=4)
        own = wan.scheduler
        wan.scheduler = FlowMatchEulerDiscreteScheduler(shift=9.0)
        with pytest.raises(UserError, match="grid of shift 3"):
            call(wan, steps=STEPS)
        wan.scheduler = own


@pytest.mark.parametrize("scale", [2.0, 5.0])
def test_the_scale_of_two_passes_is_read_off_the_first_step(pipe, scale):
    told = []
    scalars = WholePass(pipe, family_of_pipeline(type(pipe).__name__), SCALARS, check_guidance=told.append)
    with scalars:
        call(pipe, steps=STEPS, guidance=scale)
        assert told == [pytest.approx(scale, rel=1e-3)]
        call(pipe, steps=STEPS, guidance=1.0)
        assert told[1:] == [1.0]


@pytest.mark.parametrize("scale", [4.0, 1.0])
def test_numbers_that_change_with_guidance_are_those_of_the_scale_that_is_served(wan, scale):
    double = {step: tuple(2 * n for n in row) for step, row in SCALARS.coefficients.items()}
    changing = replace(SCALARS, guidance_range=(1.0, 7.0), at_highest=double)
    factor = 1 + (scale - 1) / 6
    rows = {step: tuple(factor * n for n in row) for step, row in SCALARS.coefficients.items()}
    with attached(wan, lists=(replace(SCALARS, coefficients=rows),)):
        expected = call(wan, steps=STEPS, guidance=scale)
    with attached(wan, lists=(changing,)):
        torch.testing.assert_close(call(wan, steps=STEPS, guidance=scale), expected, rtol=1e-3, atol=1e-4)


def test_two_passes_are_refused_where_the_scalars_are_for_one(wan):
    with attached(wan, two_pass=False), pytest.raises(UserError, match="makes two"):
        call(wan, steps=STEPS)


def test_a_students_folder_and_its_guidance(tmp_path):
    loaded = load_pipeline(student(tmp_path, "hunyuan_video"))
    grid = Grid.shifted(4, 2.0)
    list_of_two = FittedList((0, 1), {2: SECOND, 3: SECOND}, 4, shift=2.0)
    made = config(loaded.pipe, student=student_hash(loaded), guidance_range=(3.0, 5.0), two_pass=False)
    Multistep(replace(made, lists=(list_of_two,))).save_pretrained(tmp_path / "scalars")
    schedule = Schedule(4, (0, 1), "search", 2.0, 0.1, grid.times)
    write_schedules(tmp_path / "scalars" / "schedule.json", [schedule])

    def generate(**given):
        with attach(loaded, predictor=tmp_path / "scalars", budget=2, **given) as scalars:
            frames = loaded.pipe(
                "a red circle",
                num_inference_steps=4,
                output_type="latent",
                generator=torch.Generator().manual_seed(0),
                **SIZE | {"prompt_template": {"template": "{}", "crop_start": 0}, "max_sequence_length": 16},
                guidance_scale=1.0,
            ).frames
        assert (scalars.full_passes, scalars.predicted_passes) == (2, 2)
        return frames

    loaded.hook.guidance = 4.0
    assert generate().isfinite().all()
    loaded.hook.guidance = 6.0
    with pytest.raises(UserError, match="guidance=6"):
        generate()
    assert generate(force=True).isfinite().all()
    loaded.hook.guidance, loaded.hook.instantaneous = 4.0, True
    with pytest.raises(UserError, match="mean velocities"):
        generate()
