"""The pipeline driven as a user's own would be, what is counted on the way, and the same latents from the bare loop."""

import json
from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import pytest
import torch
from accelerate import cpu_offload_with_hook
from accelerate.hooks import remove_hook_from_module
from diffusers import CogVideoXDPMScheduler, DDIMScheduler, FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler

from tests.students import save_teacher, student
from tests.tiny import CALLS, FLOW, SIZE, as_given, as_made, image_of, passes_of, tiny_pipeline
from vidaccel.artefacts import RUN_FILE
from vidaccel.cache.attach import attach
from vidaccel.config.generate import GenerateConfig
from vidaccel.errors import UserError
from vidaccel.families.registry import FAMILIES
from vidaccel.families.walk import latent_channels
from vidaccel.models.calling import call_arguments, latent_size, set_guidance
from vidaccel.models.grid import Grid, on_grid, own_grid, running_grid, step_grid
from vidaccel.models.loading import LoadedPipeline, as_student, load_pipeline
from vidaccel.models.velocity import Velocity, guided_velocity, velocity_of
from vidaccel.sampling import generate, predicted_steps, sample

STEPS = 2
BATCHES = {"hunyuan_video": 2, "wan": 2, "hunyuan_video_15": 1, "own r": 1}
"""Videos at a time of each kind of student; HunyuanVideo-1.5 has 729 tokens of no image to carry."""


def loaded(family: str = "hunyuan_video") -> LoadedPipeline:
    call = SIZE | CALLS.get(family, {})
    return LoadedPipeline(tiny_pipeline(family), FAMILIES[family], "here", call, {})


@pytest.fixture(scope="module")
def students(tmp_path_factory) -> dict[str, LoadedPipeline]:
    """Students with both embeddings added, with the model's own of r, and with one of each."""
    made = {family: (family, ("r", "g"), {}) for family in ("hunyuan_video", "wan")}
    made["own r"] = ("hunyuan_video_15", (), {"use_meanflow": True})
    made["hunyuan_video_15"] = ("hunyuan_video_15", ("g",), {"use_meanflow": True})
    root = tmp_path_factory.mktemp("students")
    return {
        name: load_pipeline(student(root / name, family, embeds, **options))
        for name, (family, embeds, options) in made.items()
    }


@pytest.mark.parametrize("family", sorted(FAMILIES))
@pytest.mark.parametrize(("guidance", "passes"), [(1.0, 2), (4.0, 4)])
def test_guidance_costs_a_second_pass(family, guidance, passes):
    config = GenerateConfig(steps=2, guidance=guidance)
    made = generate(loaded(family), ["a red circle"], config, [0], image=image_of(family))
    assert (made.passes, made.steps, made.guidance) == (passes, 2, guidance)
    assert made.frames.shape == (1, 5, 32, 32, 3) and made.frames.dtype == np.uint8
    assert all(seconds > 0 for seconds in made.seconds.values())


def test_hooks_are_gone_afterwards():
    model = loaded()
    generate(model, ["a"], GenerateConfig(steps=1), [0])
    assert not model.pipe.transformer._forward_hooks and not model.pipe.transformer._forward_pre_hooks


@pytest.mark.parametrize("kind", ["plain", "student"])
def test_a_batch_makes_what_its_members_make_alone(kind, students):
    model, config = students["wan"] if kind == "student" else loaded(), GenerateConfig(steps=2, guidance=3.0)
    prompts, seeds = ["a red circle", "a green square on black"], [3, 4]
    together = generate(model, prompts, config, seeds).frames
    alone = [generate(model, [p], config, [s]).frames[0] for p, s in zip(prompts, seeds, strict=True)]
    # One level of 255 for sums that a larger batch takes in another order.
    assert np.abs(together.astype(int) - np.stack(alone)).max() <= 1


def test_a_video_that_is_not_finite_is_refused():
    model = loaded()
    model.pipe.transformer.proj_out.weight.data.fill_(float("nan"))
    with pytest.raises(UserError, match="not finite"):
        generate(model, ["a"], GenerateConfig(steps=1), [0])


def test_a_student_takes_one_pass_a_step_and_any_guidance(students):
    model = students["hunyuan_video"]
    made = {g: generate(model, ["a red circle"], GenerateConfig(guidance=g), [0]) for g in (None, 4.0, 7.0)}
    assert [(m.steps, m.passes, m.guidance) for m in made.values()] == [(4, 4, 4.0), (4, 4, 4.0), (4, 4, 7.0)]
    assert np.array_equal(made[None].frames, made[4.0].frames)
    assert not np.array_equal(made[4.0].frames, made[7.0].frames)
    instantaneous = generate(model, ["a red circle"], GenerateConfig(instantaneous=True), [0])
    assert not np.array_equal(instantaneous.frames, made[None].frames)
    again = generate(model, ["a red circle"], GenerateConfig(), [0])
    assert np.array_equal(again.frames, made[None].frames)


@pytest.mark.parametrize("fails", [False, True])
def test_hook_guider_and_scheduler_are_then_as_they_were(fails, tmp_path):
    """Of a student that embeds its guidance, and of a family whose pipeline has a guider; also when it fails."""
    model = load_pipeline(student(tmp_path, "hunyuan_video"))
    model.hook.guidance, model.hook.instantaneous = 1.5, True
    guided = loaded("hunyuan_video_15")
    guided.pipe.guider = guided.pipe.guider.new(guidance_scale=2.5)
    for one, config in (
        (model, GenerateConfig(steps=2, guidance=3.0, shift=4.0)),
        (guided, GenerateConfig(steps=1, guidance=3.0, shift=4.0)),
    ):
        before = one.pipe.scheduler, getattr(one.pipe, "guider", None)
        if fails:
            one.pipe.transformer.proj_out.weight.data.fill_(float("nan"))
        with pytest.raises(UserError, match="not finite") if fails else nullcontext():
            generate(one, ["a red circle"], config, [0])
        assert one.pipe.scheduler is before[0] and getattr(one.pipe, "guider", None) is before[1]
    assert (model.hook.guidance, model.hook.instantaneous) == (1.5, True)
    assert guided.pipe.guider.guidance_scale == 2.5


@pytest.mark.parametrize("family", FLOW)
def test_a_shift_is_another_grid_for_the_time_of_a_call(family):
    """As on the pipeline whose scheduler has it, whichever scheduler that is; afterwards its own is back."""
    model, other = loaded(family), loaded(family)
    for one in (model, other):
        if one.pipe.scheduler.config.get("use_dynamic_shifting"):
            one.pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=2.0)
    own = model.pipe.scheduler
    key = "shift" if "shift" in own.config else "flow_shift"
    other.pipe.scheduler = type(own).from_config(own.config, **{key: 7.5})
    taylor = {"predictor": "taylor", "full_steps": [0, 1, 3]}
    frames = []
    for one, shift in ((model, {"shift": 7.5}), (other, {}), (model, {})):
        config = GenerateConfig(steps=5, guidance=1.0, **shift, **taylor)
        frames.append(generate(one, ["a red circle"], replace(config, predictor=None, full_steps=None), [0]).frames)
        with predicted_steps(one, config) as attachment:
            frames.append(generate(one, ["a red circle"], config, [0], attachment).frames)
        assert model.pipe.scheduler is own
    full, predicted, full_there, predicted_there, unshifted, _ = frames
    assert np.array_equal(full, full_there) and np.array_equal(predicted, predicted_there)
    assert not np.array_equal(full, unshifted)
    model.pipe.transformer.proj_out.weight.data.fill_(float("nan"))
    with pytest.raises(UserError, match="not finite"):
        generate(model, ["a"], GenerateConfig(steps=1, shift=7.5), [0])
    assert model.pipe.scheduler is own


@pytest.mark.parametrize(
    ("scheduler", "why"),
    [
        (UniPCMultistepScheduler(use_dynamic_shifting=True), "takes it from the size of the video"),
        (DDIMScheduler(), "DDIMScheduler knows none"),
    ],
)
def test_a_shift_of_a_scheduler_that_has_none_of_its_own_is_refused(scheduler, why):
    model = loaded()
    model.pipe.scheduler = scheduler
    with pytest.raises(UserError, match=why):
        generate(model, ["a"], GenerateConfig(steps=1, shift=3.0), [0])


def test_a_shift_takes_the_place_of_one_that_follows_the_videos_size():
    model = loaded("ltx_video")
    own, grid = model.pipe.scheduler, Grid.shifted(4, 3.0)
    assert own.config.use_dynamic_shifting
    made = [generate(model, ["a"], GenerateConfig(steps=4, shift=3.0), [0])]
    made.append(generate(model, ["a"], GenerateConfig(steps=4, sigmas=list(grid.times[:-1])), [0]))
    made.append(generate(model, ["a"], GenerateConfig(steps=4), [0]))
    shifted, listed, plain = (each.frames for each in made)
    assert np.array_equal(shifted, listed) and not np.array_equal(shifted, plain)
    assert model.pipe.scheduler is own


@pytest.mark.parametrize("family", [*FLOW, "anyflow", "mochi"])
def test_listed_times_are_sampled_by_euler_whatever_the_pipeline_has(family):
    model = loaded(family)
    own = model.pipe.scheduler
    x_1 = noise(model)
    velocity, grid = velocity_of(model), Grid.listed([1000, 757, 522], None)
    expected = None
    with on_grid(model.pipe, grid=grid):
        got, (text, *_) = pipeline_latents(model, x_1, steps=3, guidance=1.0)
        expected = sample(velocity, x_1, text, grid.tensor)
    rounded = model.family.rises or model.family.times_per_frame  # 1 - t, and ends of steps in another type
    close = torch.allclose if rounded else torch.equal
    assert close(got, expected) and model.pipe.scheduler is own
    with attach(model, predictor="reuse", sigmas=[1, 0.757, 0.522], full_steps=[0, 1, 2]) as attachment:
        again, _ = pipeline_latents(model, x_1, steps=3, guidance=1.0)
    assert torch.equal(again, got) and model.pipe.scheduler is own and attachment.full_passes == 3
    with pytest.raises(UserError, match="steps=4, and 3 times are listed"):
        attach(model, predictor="reuse", sigmas=[1, 0.757, 0.522], steps=4, full_steps=[0])


def test_times_in_a_models_own_call_are_its_grid(tmp_path):
    folder = save_teacher(tmp_path / "teacher", "wan")
    run = json.loads((folder / RUN_FILE).read_text())
    run["call"] = {"timesteps": [1000, 757, 522], "guidance": 1.0} | SIZE
    (folder / RUN_FILE).write_text(json.dumps(run))
    model = load_pipeline(folder)
    assert model.default("steps") == 3
    made = generate(model, ["a red circle"], GenerateConfig(), [0])
    assert (made.steps, made.passes) == (3, 3)
    assert torch.equal(model.pipe.scheduler.sigmas, Grid.listed([1000, 757, 522], None).tensor)
    listed = generate(load_pipeline(folder), ["a red circle"], GenerateConfig(sigmas=[1, 0.757, 0.522]), [0])
    assert torch.equal(listed.latents, made.latents)
    assert generate(model, ["a red circle"], GenerateConfig(steps=2, shift=3.0), [0]).passes == 2
    with pytest.raises(UserError, match="4 steps, and the times 1, 0.757, 0.522, 0 are a grid of 3"):
        generate(model, ["a red circle"], GenerateConfig(steps=4), [0])


class Passes:
    """Keyword arguments of the transformer's passes."""

    def __init__(self, model: LoadedPipeline):
        self.seen: list[dict] = []
        transformer = model.pipe.transformer
        self.handle = transformer.register_forward_pre_hook(self._note, with_kwargs=True)

    def _note(self, module, args, kwargs):
        self.seen.append(kwargs)


def pipeline_latents(
    model: LoadedPipeline, x_1: torch.Tensor, steps: int = STEPS, **settings: object
) -> tuple[torch.Tensor, list[dict]]:
    """What the pipeline makes of this noise, and the text tensors of its passes by their stored names."""
    passes = Passes(model)
    set_guidance(model, **settings)
    arguments = call_arguments(model, steps=steps, **SIZE, **settings)
    prompts = ["a red circle", "a green square"][: len(x_1)]
    if "negative_prompt" in arguments:
        arguments["negative_prompt"] = [arguments["negative_prompt"]] * len(prompts)
    latents = as_given(model.family, x_1).clone()
    frames = model.pipe(prompts, latents=latents, output_type="latent", **arguments).frames
    passes.handle.remove()
    seen = passes_of(model.pipe, passes.seen)
    text = [{tensor.stored: kwargs[tensor.argument] for tensor in model.family.text_tensors} for kwargs in seen]
    return as_made(model.family, frames, x_1.shape[2:]), text


def noise(model: LoadedPipeline, count: int = 1) -> torch.Tensor:
    shape = (count, latent_channels(model.pipe.transformer), *latent_size(model, **SIZE))
    return torch.randn(shape, generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("family", FLOW)
def test_the_loop_ends_in_the_pipelines_latents(family):
    model = loaded(family)
    model.pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    x_1 = noise(model)
    expected, (text, *_) = pipeline_latents(model, x_1, guidance=1.0)
    velocity = velocity_of(model)
    assert torch.equal(sample(velocity, x_1, text, model.pipe.scheduler.sigmas), expected)


def test_the_loop_ends_in_the_latents_of_a_pipeline_whose_times_rise():
    """On times that the pipeline gives its scheduler, on those of a shift, and on listed ones."""
    model = loaded("mochi")
    x_1, velocity = noise(model), velocity_of(model)
    for settings, steps in (({}, 4), ({"shift": 3.0}, 4), ({"grid": Grid.listed([1000, 757, 522], None)}, 3)):
        with on_grid(model.pipe, **settings):
            grid = own_grid(model.pipe.scheduler, model.family, steps)
            expected, (text, *_) = pipeline_latents(model, x_1, steps=steps, guidance=1.0)
            assert grid.times == pytest.approx(running_grid(model.pipe.scheduler, model.family).times, abs=1e-6)
        assert grid.shift == settings.get("shift") and grid.steps == steps
        torch.testing.assert_close(sample(velocity, x_1, text, grid.tensor), expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(UserError, match="steps=1, and the pipeline of Mochi takes 2 or more"):
        call_arguments(model, steps=1)
    with pytest.raises(UserError, match="steps=1, and the pipeline of Mochi takes 2 or more"):
        own_grid(model.pipe.scheduler, model.family, 1)


@pytest.mark.parametrize("family", FLOW)
def test_two_pass_guidance_in_the_loop_is_the_pipelines(family):
    model = loaded(family)
    model.pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    x_1 = noise(model)
    expected, (text, empty, *_) = pipeline_latents(model, x_1, guidance=4.0)
    velocity = velocity_of(model)

    def guided(x, t, text, r, g):
        return guided_velocity(velocity, x, t, text, empty, g)

    made = sample(guided, x_1, text, model.pipe.scheduler.sigmas, g=torch.tensor([4.0]))
    # A doubled batch sums in another order.
    torch.testing.assert_close(made, expected, rtol=1e-4, atol=1e-4 if model.family.guidance.doubled else 0)


@pytest.mark.parametrize("name", BATCHES)
def test_the_loop_ends_in_the_latents_of_a_students_pipeline(name, students):
    model = students[name]
    x_1, grid, seen = noise(model, BATCHES[name]), step_grid(STEPS, 2.0), []
    settings = {} if name == "own r" else {"guidance": 5.0}
    expected, (text, *_) = pipeline_latents(model, x_1, **settings)
    velocity = Velocity(model.pipe.transformer, model.family, model.conditioning)
    g = torch.full((len(x_1),), 5.0) if velocity.embeds("g") else None
    made = sample(velocity, x_1, text, grid, g=g, after_step=lambda *step: seen.append(step))
    assert torch.equal(made, expected)
    assert [index for index, _, _ in seen] == list(range(STEPS)) and torch.equal(seen[0][1], x_1)
    for (_, x, u), (_, x_r, _), length in zip(seen, seen[1:], -grid.diff(), strict=False):
        assert torch.equal(x - length * u, x_r)
    moved = sample(lambda x, t, text, r, g: velocity(x, t, text, g=g), x_1, text, grid, g=g)
    assert not torch.equal(moved, made)  # r matters


def test_the_loop_by_hand():
    # dx/dt = x from 1 to 0 in two steps of a half: 8 -> 8 - 4 -> 4 - 2.
    x_1 = torch.full((1, 1, 1, 1, 1), 8.0)
    assert sample(lambda x, t, text, r, g: x, x_1, {}, torch.tensor([1.0, 0.5, 0.0])).item() == 2.0
    # u = r - t: the sum of squared steps.
    made = sample(lambda x, t, text, r, g: (r - t).view(1, 1, 1, 1, 1), x_1, {}, torch.tensor([1.0, 0.25, 0.0]))
    assert made.item() == 8 + 0.75**2 + 0.25**2


@pytest.mark.parametrize("name", ["wan", "own r"])
def test_a_generation_after_an_aborted_one_is_as_if_nothing_had_been(name, students):
    model = students[name]
    x_1 = noise(model)
    expected, _ = pipeline_latents(model, x_1)
    calls = []

    def fail(module, inputs):
        calls.append(1)
        if len(calls) == STEPS:
            raise InterruptedError

    block = getattr(model.pipe.transformer, model.family.block_lists[0].name)[0]
    handle = block.register_forward_pre_hook(fail)
    with pytest.raises(InterruptedError):
        pipeline_latents(model, x_1)
    handle.remove()
    assert model.conditioning is None or not model.conditioning.is_given
    assert torch.equal(pipeline_latents(model, x_1)[0], expected)


@pytest.mark.parametrize("name", ["wan", "own r"])
def test_a_student_that_is_offloaded_between_generations_is_told_r_and_g_in_each(name, students):
    """What `enable_model_cpu_offload` does, with the CPU in the accelerator's place: it takes the transformer's forward
    back and hooks it again at the end of each generation."""
    model = students[name]
    transformer, x_1 = model.pipe.transformer, noise(model)
    expected, _ = pipeline_latents(model, x_1)
    for _ in range(3):
        remove_hook_from_module(transformer, recurse=True)
        cpu_offload_with_hook(transformer, "cpu")
        assert torch.equal(pipeline_latents(model, x_1)[0], expected)
    with pytest.raises(UserError, match="offloaded to the CPU already") as caught:
        as_student(model, model.conditioning, model.pipe.scheduler)
    assert "remove_all_hooks" in caught.value.hint
    remove_hook_from_module(transformer, recurse=True)
    assert torch.equal(pipeline_latents(model, x_1)[0], expected)


def test_a_pipeline_that_takes_two_passes_of_a_distilled_student_is_stopped(students):
    pipe = students["wan"].pipe
    with pytest.raises(UserError, match="two passes a step") as caught:
        pipe("a red circle", num_inference_steps=STEPS, output_type="latent", guidance_scale=5.0, **SIZE)
    assert "guidance_scale=1.0" in caught.value.hint


def test_grids_are_for_flow_velocities():
    model = loaded("cogvideox")
    with pytest.raises(UserError, match="CogVideoX predicts v of a diffusion process, and a list of times is for flow"):
        generate(model, ["a"], GenerateConfig(steps=2, sigmas=[1.0, 0.5, 0.0]), [0])
    with pytest.raises(UserError, match="CogVideoXDDIMScheduler knows none"):
        generate(model, ["a"], GenerateConfig(steps=2, shift=3.0), [0])


def test_other_samplers_of_a_diffusion_model_are_refused_where_they_add_noise():
    pipe = tiny_pipeline("cogvideox")
    pipe.scheduler = CogVideoXDPMScheduler.from_config(pipe.scheduler.config)
    with pytest.raises(UserError, match="CogVideoXDPMScheduler adds fresh noise"):
        attach(pipe, predictor="reuse", steps=2, full_steps=[0])


def test_a_pipeline_that_tells_r_itself_tells_the_time_in_its_place_when_asked(tmp_path):
    model = load_pipeline(save_teacher(tmp_path, "anyflow"))
    mean, instantaneous = (
        generate(model, ["a red circle"], GenerateConfig(instantaneous=asked), [0]) for asked in (False, True)
    )
    assert (mean.steps, mean.passes) == (3, 3) and not torch.equal(mean.latents, instantaneous.latents)
    called = replace(model, call=model.call | {"use_mean_velocity": False})
    stock = generate(called, ["a red circle"], GenerateConfig(), [0])
    torch.testing.assert_close(stock.latents, instantaneous.latents)
