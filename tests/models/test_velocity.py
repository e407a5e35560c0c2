"""u(x, r, t) of every family: the same numbers as in its pipeline, and embeddings that start at nothing."""

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from tests.tiny import BUILDERS, HUNYUAN_CALL, SIZE, tiny_pipeline
from vidaccel.errors import UserError
from vidaccel.models.catalog import family_of_pipeline
from vidaccel.models.conditioning import Conditioning, ConditioningConfig, new_conditioning
from vidaccel.models.steps import current_step, step_grid
from vidaccel.models.velocity import Velocity


def test_step_grid_is_the_schedulers_own():
    for steps, shift in ((50, 3.0), (8, 5.0), (1, 7.0), (20, 1.0)):
        scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
        scheduler.set_timesteps(sigmas=torch.linspace(1, 0, steps + 1)[:-1].tolist())
        torch.testing.assert_close(step_grid(steps, shift), scheduler.sigmas, atol=1e-6, rtol=0)


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


def one_pass(name, **options):
    """A pipeline and what its transformer was given and gave at the last of two steps, without guidance."""
    pipe = tiny_pipeline(name, **options)
    family = family_of_pipeline(type(pipe).__name__)
    seen = Recorder(pipe.transformer)
    off = {"hunyuan_video": {"guidance_scale": 6.0}, "hunyuan_video_15": {}, "wan": {"guidance_scale": 1.0}}[name]
    extra = HUNYUAN_CALL if name == "hunyuan_video" else {}
    if family.guidance.guider:
        pipe.guider = pipe.guider.new(guidance_scale=1.0, enabled=False)
    pipe(
        "a red circle", num_inference_steps=2, output_type="latent", generator=torch.Generator(), **SIZE, **off, **extra
    )
    return pipe, family, seen


def inputs(pipe, family, kwargs):
    """The arguments of `Velocity` that mean the same as those of a transformer's pass."""
    channels = pipe.transformer.config.out_channels
    text = {tensor.stored: kwargs[tensor.argument] for tensor in family.text_tensors}
    return kwargs["hidden_states"][:, :channels], kwargs["timestep"] / 1000, text


@torch.no_grad()
@pytest.mark.parametrize("name", BUILDERS)
def test_gives_what_the_transformer_gave_in_its_pipeline(name):
    pipe, family, seen = one_pass(name)
    x, t, text = inputs(pipe, family, seen.kwargs)
    assert torch.equal(Velocity(pipe.transformer, family)(x, t, text), seen.output)


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
@pytest.mark.parametrize("name", BUILDERS)
def test_added_embeddings_start_at_nothing_and_then_matter(name):
    pipe, family, seen = one_pass(name)
    x, t, text = inputs(pipe, family, seen.kwargs)
    expected = seen.output
    student = Velocity(pipe.transformer, family, new_conditioning(pipe.transformer, family, ("r", "g")))
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
