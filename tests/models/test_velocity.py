"""u(x, r, t) of every family: the same numbers as in its pipeline, and embeddings that start at nothing."""

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler

from tests.tiny import FLOW, ONE_DENOISER, SIZE, called, guided, tiny_pipeline
from vidaccel.errors import UserError
from vidaccel.families.registry import FAMILIES, family_of_pipeline
from vidaccel.families.walk import as_latents, as_taken, latent_channels
from vidaccel.models.calling import latent_size
from vidaccel.models.conditioning import Conditioning, ConditioningConfig, new_conditioning
from vidaccel.models.grid import GridScheduler, current_step, shift_of, step_grid
from vidaccel.models.loading import LoadedPipeline
from vidaccel.models.velocity import GuidedVelocity, Velocity, guided_velocity, per_sample, velocity_of


def test_a_number_of_each_sample_is_broadcast_over_it():
    numbers = torch.tensor([2.0, 3.0])
    assert (per_sample(numbers, torch.ones(2, 1, 2)) * torch.ones(2, 1, 2)).tolist() == [[[2.0, 2.0]], [[3.0, 3.0]]]
    assert per_sample(numbers, torch.ones(2, 4, 3, 8, 8)).shape == (2, 1, 1, 1, 1)
    assert per_sample(numbers, torch.ones(2)).shape == (2,)
    assert per_sample(torch.tensor(5.0).expand(2), torch.ones(2, 3)).tolist() == [[5.0], [5.0]]


@pytest.mark.parametrize(("steps", "shift"), [(50, 3.0), (8, 5.0), (1, 7.0), (20, 1.0), (13, 2.3)])
def test_step_grid_is_the_schedulers_own_bit_for_bit(steps, shift):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 0.0, steps + 1)[:-1])  # as both HunyuanVideo pipelines call it
    assert torch.equal(step_grid(steps, shift), scheduler.sigmas)
    k = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    torch.testing.assert_close(step_grid(steps, shift).double(), shift * k / (1 + (shift - 1) * k), atol=2e-7, rtol=0)


def test_grid_scheduler_needs_no_sigmas():
    stock, grid = FlowMatchEulerDiscreteScheduler(shift=3.0), GridScheduler(shift=3.0)
    for scheduler in (stock, grid):
        scheduler.set_timesteps(4)  # as Wan's pipeline calls it
    assert torch.equal(grid.sigmas, step_grid(4, 3.0))
    assert torch.equal(grid.timesteps, 1000 * grid.sigmas[:-1])
    assert stock.sigmas[-2] < 0.01  # what the stock one makes of it: a fourth step that is hardly one
    grid.set_timesteps(sigmas=[1.0, 0.25])
    assert grid.sigmas.tolist() == [1.0, 0.5, 0.0]


def test_the_shift_is_the_schedulers():
    wan = FAMILIES["wan"]
    assert shift_of(GridScheduler(shift=2.0), wan) == 2.0
    assert shift_of(tiny_pipeline("wan").scheduler, wan) == 3.0  # UniPC calls it flow_shift
    assert shift_of(DDIMScheduler(), wan) == wan.defaults.shift


def test_position_follows_the_scheduler():
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    x = torch.zeros(1, 2)
    for _ in range(2):  # the second time after an end in the middle
        scheduler.set_timesteps(sigmas=[1.0, 0.5])
        assert current_step(scheduler).index == 0
        assert (current_step(scheduler).t, current_step(scheduler).r) == (1.0, 0.75)
        scheduler.step(x, scheduler.timesteps[0], x)
        assert (current_step(scheduler).index, current_step(scheduler).r, current_step(scheduler).count) == (1, 0.0, 2)


class Recorder:
    """The keyword arguments and output of a module's last pass."""

    def __init__(self, module):
        module.register_forward_hook(self.note, with_kwargs=True)

    def note(self, module, args, kwargs, output):
        self.kwargs, self.output = kwargs, output[0]


def one_pass(name, dtype=torch.float32, **options):
    """A pipeline and what its transformer was given and gave at the last of two steps, without guidance."""
    pipe = tiny_pipeline(name, **options).to(dtype)
    family = family_of_pipeline(type(pipe).__name__)
    seen = Recorder(pipe.transformer)
    embedded = {family.guidance.embedded_argument: 6.0} if family.guidance.embedded_argument else {}
    call = called(pipe) | guided(pipe, 1.0) | embedded
    pipe(prompt="a red circle", num_inference_steps=2, output_type="latent", generator=torch.Generator(), **call)
    return pipe, family, seen


def inputs(pipe, family, kwargs):
    """The arguments of `Velocity` that mean the same as those of a transformer's pass."""
    channels, size = latent_channels(pipe.transformer), latent_size(LoadedPipeline(pipe, family, "", {}, {}), **SIZE)
    text = {tensor.stored: kwargs[tensor.argument] for tensor in family.text_tensors}
    hidden = as_latents(family, kwargs["hidden_states"], size)
    for condition in family.conditions:
        channels_of = hidden[:, :, :1] if condition.first_frame else hidden[:, channels:]
        text[condition.stored] = kwargs[condition.argument] if condition.argument else channels_of
    t = kwargs["timestep"] / 1000
    if family.times_per_frame:
        t = t[:, 0]
    return hidden[:, :channels], 1 - t if family.rises else t, text


def velocity_in(pipe, family, conditioning=None):
    """As the pipeline calls it."""
    return velocity_of(LoadedPipeline(pipe, family, "", {}, {}, conditioning))


@torch.no_grad()
@pytest.mark.parametrize("name", [*ONE_DENOISER, "mochi"])
def test_gives_what_the_transformer_gave_in_its_pipeline(name):
    pipe, family, seen = one_pass(name)
    x, t, text = inputs(pipe, family, seen.kwargs)
    u = as_taken(family, velocity_in(pipe, family)(x, t, text))
    if family.rises:  # 1 - (1 - t) is not t to the last bit
        torch.testing.assert_close(-u, seen.output)
    else:
        assert torch.equal(u, seen.output)


@torch.no_grad()
@pytest.mark.parametrize("name", [*FLOW, "anyflow", "hunyuan_video_i2v", "mochi"])
def test_times_are_told_as_exactly_as_the_pipeline_tells_them(name):
    """In bfloat16 some pipelines round them, by up to 2 of 1000."""
    pipe, family, seen = one_pass(name, torch.bfloat16)
    told = seen.kwargs["timestep"]
    x, t, text = inputs(pipe, family, seen.kwargs | {"timestep": told.float()})
    velocity_in(pipe, family)(x, t, text)
    assert x.dtype == torch.bfloat16 and seen.kwargs["timestep"] is not told
    torch.testing.assert_close(seen.kwargs["timestep"].float(), told.float(), rtol=1e-6, atol=1e-4)


@torch.no_grad()
def test_an_embedded_scale_reaches_the_transformer():
    pipe, family, seen = one_pass("hunyuan_video", guidance_embeds=True)
    x, t, text = inputs(pipe, family, seen.kwargs)
    velocity, expected = Velocity(pipe.transformer, family), seen.output
    assert velocity.embeds("g")
    assert torch.equal(velocity(x, t, text, g=torch.tensor([6.0])), expected)
    assert not torch.equal(velocity(x, t, text, g=torch.tensor([2.0])), expected)
    with pytest.raises(ValueError, match="nothing was given for g"):
        velocity(x, t, text)


@torch.no_grad()
@pytest.mark.parametrize("name", ONE_DENOISER)
def test_added_embeddings_start_at_nothing_and_then_matter(name):
    pipe, family, seen = one_pass(name)
    x, t, text = inputs(pipe, family, seen.kwargs)
    expected = velocity_in(pipe, family)(x, t, text)
    student = velocity_in(pipe, family, new_conditioning(pipe.transformer, family, ("r", "g")))
    g = torch.full_like(t, 4.0)
    assert torch.equal(student(x, t, text, r=t / 2, g=g), expected)
    for embedder in student.conditioning.embedders.values():
        torch.nn.init.normal_(embedder.linear_2.weight, std=0.1)
    base = student(x, t, text, r=t / 2, g=g)
    assert not torch.equal(base, expected)
    assert not torch.equal(student(x, t, text, r=t / 4, g=g), base)
    assert not torch.equal(student(x, t, text, r=t / 2, g=g + 1), base)
    assert torch.equal(student(x, t, text, g=g), student(x, t, text, r=t, g=g))


@torch.no_grad()
def test_the_native_r_of_hunyuan_video_15_is_used():
    pipe, family, seen = one_pass("hunyuan_video_15", use_meanflow=True)
    x, t, text = inputs(pipe, family, seen.kwargs)
    velocity = Velocity(pipe.transformer, family)
    assert velocity.embeds("r")
    assert not torch.equal(velocity(x, t, text, r=t / 2), velocity(x, t, text))


@torch.no_grad()
def test_a_transformer_carries_one_conditioning():
    pipe, family, seen = one_pass("wan")
    x, t, text = inputs(pipe, family, seen.kwargs)
    g, plain = torch.full_like(t, 4.0), seen.output
    old = new_conditioning(pipe.transformer, family, ("g",))
    torch.nn.init.normal_(old.embedders["g"].linear_2.weight, std=0.1)
    once = Velocity(pipe.transformer, family, old)(x, t, text, g=g)
    assert not torch.equal(once, plain)
    assert torch.equal(Velocity(pipe.transformer, family, old)(x, t, text, g=g), once)
    new = new_conditioning(pipe.transformer, family, ("r", "g"), start=old, steps=8)
    assert new.config.steps == 8
    assert torch.equal(Velocity(pipe.transformer, family, new)(x, t, text, r=t / 2, g=g), once)


def test_guidance_by_two_passes_is_extrapolation_from_the_empty_text():
    x, t, g = torch.randn(3, 2, 1, 2, 2), torch.tensor([0.2, 0.5, 0.9]), torch.tensor([1.0, 2.0, 7.0])
    text, empty = {"prompt_embeds": torch.randn(3, 4)}, {"prompt_embeds": torch.randn(1, 4)}

    def velocity(x, t, text):
        return x * (t * text["prompt_embeds"].sum(1)).view(-1, 1, 1, 1, 1)

    sums = text["prompt_embeds"].sum(1), empty["prompt_embeds"].sum()
    expected = x * (t * (sums[1] + g * (sums[0] - sums[1]))).view(-1, 1, 1, 1, 1)
    torch.testing.assert_close(guided_velocity(velocity, x, t, text, empty, g), expected)
    assert torch.equal(guided_velocity(velocity, x, t, text, text, g), velocity(x, t, text))


@torch.no_grad()
@pytest.mark.parametrize("name", ["hunyuan_video_15", "wan_i2v"])
def test_both_passes_in_one_of_a_doubled_batch(name):
    """Of texts with masks, and of conditions, which are the same in both."""
    pipe, family, seen = one_pass(name)
    x, t, text = inputs(pipe, family, seen.kwargs)
    conditions = {each.stored for each in family.conditions}
    empty = {key: tensor.roll(1, -1)[:1] for key, tensor in text.items() if key not in conditions}
    velocity = Velocity(pipe.transformer, family)
    both = GuidedVelocity(velocity, empty, 4.0)
    expected = guided_velocity(velocity, x, t, text, empty, torch.full_like(t, 4.0))
    torch.testing.assert_close(both(x, t, text), expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(expected, velocity(x, t, text), rtol=1e-2)
    with pytest.raises(ValueError, match="the scale is set"):
        both(x, t, text, g=t)


def test_a_pass_outside_given_raises():
    pipe, family, seen = one_pass("wan")
    new_conditioning(pipe.transformer, family, ("r",)).attach(pipe.transformer, family)
    with pytest.raises(RuntimeError, match="under `given`"):
        pipe.transformer(**seen.kwargs)


def test_saved_conditioning_is_the_same_and_fits_its_own_transformer_only(tmp_path):
    wan, hunyuan = tiny_pipeline("wan"), tiny_pipeline("hunyuan_video")
    family = family_of_pipeline("WanPipeline")
    made = new_conditioning(wan.transformer, family, ("r", "g"), shift=3.0, steps=10, restrict=0.4)
    torch.nn.init.normal_(made.embedders["r"].linear_2.weight)
    made.save_pretrained(tmp_path)
    read = Conditioning.from_pretrained(tmp_path)
    assert read.config == made.config
    numbers = {"r": torch.tensor([0.3]), "g": torch.tensor([4.0])}
    assert torch.equal(read(**numbers), made(**numbers))
    with pytest.raises(UserError, match="is for wan of width 24.* hunyuan_video of width 24"):
        read.attach(hunyuan.transformer, family_of_pipeline("HunyuanVideoPipeline"))
    (tmp_path / "model.safetensors").write_bytes((tmp_path / "model.safetensors").read_bytes()[:-9])
    with pytest.raises(UserError, match="does not load"):
        Conditioning.from_pretrained(tmp_path)


def test_a_rule_that_is_not_known_is_refused():
    with pytest.raises(UserError, match="mean"):
        ConditioningConfig("wan", 24, ("r",), rule="mean")
