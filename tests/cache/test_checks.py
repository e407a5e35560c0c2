"""What predicted steps would get wrong without a word is refused, or is made to work."""

import diffusers
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler, WanPipeline

import vidaccel
from tests.tiny import SIZE, guided, tiny_pipeline
from vidaccel.errors import UserError
from vidaccel.families.registry import FAMILIES
from vidaccel.forecasters.reuse import Reuse
from vidaccel.models.conditioning import new_conditioning
from vidaccel.models.grid import GridScheduler
from vidaccel.models.loading import LoadedPipeline, as_student

STEPS = 4
FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}


@pytest.fixture(scope="module")
def shared():
    return tiny_pipeline("wan")


@pytest.fixture
def pipe(shared):
    """Its parts in a pipeline of its own."""
    fresh = WanPipeline(**shared.components)
    fresh.set_progress_bar_config(disable=True)
    return fresh


def call(pipe, **more):
    arguments = {"num_inference_steps": STEPS, "output_type": "latent", **SIZE, **guided(pipe, 1.0), **more}
    return pipe("a red circle", generator=torch.Generator().manual_seed(0), **arguments).frames


def attached(pipe, predictor="reuse"):
    return vidaccel.attach(pipe, predictor=predictor, steps=STEPS, full_steps=[0, 2])


def test_a_second_transformer_that_no_record_knows_or_without_times_is_refused(pipe, monkeypatch):
    pipe.register_modules(transformer_2=tiny_pipeline("wan", seed=1).transformer)
    with pytest.raises(UserError, match=r"has a transformer_2 and no boundary_ratio"):
        attached(pipe)
    pipe.register_to_config(boundary_ratio=0.875)
    attached(pipe).detach()
    monkeypatch.delitem(FAMILIES, "wan22")
    with pytest.raises(UserError, match=r"second transformer, transformer_2\nhint: predicted steps are for"):
        attached(pipe)
    alone = WanPipeline(**pipe.components | {"transformer": None}, boundary_ratio=0.875)
    with pytest.raises(UserError, match="no transformer"):
        attached(alone)


NOISY = {
    "FlowMatchEulerDiscreteScheduler": {"stochastic_sampling": True},
    "FlowMatchLCMScheduler": {},
    "LCMScheduler": {},
    "DPMSolverMultistepScheduler": FLOW | {"algorithm_type": "sde-dpmsolver++"},
    "EulerAncestralDiscreteScheduler": {},
    "SASolverScheduler": FLOW,
    "DDPMScheduler": {},
}
QUIET = {
    "FlowMatchEulerDiscreteScheduler": {"shift": 3.0},
    "UniPCMultistepScheduler": FLOW,
    "DPMSolverMultistepScheduler": FLOW,
    "DEISMultistepScheduler": FLOW,
}


@pytest.mark.parametrize("name", NOISY)
def test_samplers_that_add_noise_are_refused(pipe, name):
    before = torch.random.get_rng_state()
    pipe.scheduler = getattr(diffusers, name)(**NOISY[name])
    with pytest.raises(UserError, match=f"the {name} adds fresh noise"):
        attached(pipe)
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize("name", QUIET)
def test_samplers_that_add_none_are_taken(pipe, name):
    pipe.scheduler = getattr(diffusers, name)(**QUIET[name])
    attached(pipe).detach()


def test_a_sampler_of_anyones_is_tried(pipe):
    class Renoises(FlowMatchEulerDiscreteScheduler):
        def step(self, model_output, timestep, sample, return_dict=True):
            (sample,) = super().step(model_output, timestep, sample, return_dict=False)
            return (sample + 0.1 * torch.randn_like(sample),)

    class Breaks(FlowMatchEulerDiscreteScheduler):
        def step(self, *args, **kwargs):
            raise ArithmeticError("broken")

    for cls, message in ((Renoises, "adds fresh noise"), (Breaks, "could not be tried .* broken")):
        pipe.scheduler = cls(shift=3.0)
        with pytest.raises(UserError, match=message):
            attached(pipe)
    pipe.scheduler = diffusers.DDIMScheduler()
    with pytest.raises(UserError, match="DDIMScheduler does not say where a sampling stands"):
        attached(pipe)


def test_a_sampler_that_is_put_in_later_is_tried_as_well(pipe):
    with attached(pipe):
        pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, stochastic_sampling=True)
        with pytest.raises(UserError, match="adds fresh noise"):
            call(pipe)


def test_another_transformer_in_the_place_of_an_attached_one_is_refused(pipe):
    own, cls = pipe.transformer, type(pipe)
    other = tiny_pipeline("wan", seed=1).transformer
    with attached(pipe) as attachment:
        with pytest.raises(UserError, match="has a predictor attached, and another would run without it"):
            pipe.transformer = other
        assert pipe.transformer is own
        pipe.transformer = torch.compile(own, backend="eager")
        pipe.transformer = own
        pipe.scheduler = UniPCMultistepScheduler(**FLOW)
        call(pipe)
    assert attachment.predicted_passes == 2
    assert type(pipe) is cls
    pipe.transformer = other


def test_a_pipeline_called_as_its_model_is_made_stays_that(pipe):
    loaded = LoadedPipeline(pipe, FAMILIES["wan"], "here", {"steps": 2, "guidance": 1.0, **SIZE}, {})
    loaded.guidance = 1.0
    cls = type(loaded.pipe)
    with attached(pipe, predictor="reuse"):
        assert type(pipe) is not cls and type(pipe).__name__ == "WanPipeline"
        loaded.guidance = 1.0
        with pytest.raises(UserError, match="another would run without it"):
            pipe.transformer = tiny_pipeline("wan", seed=1).transformer
    assert pipe("a red circle", output_type="latent").frames.shape[2] == 2
    assert pipe.scheduler.timesteps.shape == (2,)


def test_a_second_pipeline_on_an_attached_transformer_is_refused(pipe, shared):
    second = WanPipeline(**shared.components | {"scheduler": UniPCMultistepScheduler(**FLOW)})
    second.set_progress_bar_config(disable=True)
    pipe.scheduler = UniPCMultistepScheduler(**FLOW)

    def stop(pipe, index, timestep, tensors):
        if index == 1:
            raise ArithmeticError
        return tensors

    with attached(pipe):
        expected = call(pipe)
        with pytest.raises(UserError, match="steps of its pipeline's scheduler are over"):
            call(second)
        with pytest.raises(ArithmeticError):
            call(pipe, callback_on_step_end=stop)
        with pytest.raises(UserError, match="a second pass of context cond in step 2"):
            call(second)
        assert torch.equal(call(pipe), expected)
        second.scheduler = pipe.scheduler  # then it is known where that one stands
        assert torch.equal(call(second), expected)


def test_a_sampling_that_begins_midway(pipe):
    """As video to video does: its first pass is full, whatever the list says, and is known by its place."""
    scheduler = pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(STEPS)
    scheduler.set_begin_index(1)
    latents, text = torch.randn(1, 4, 2, 4, 4, generator=torch.Generator().manual_seed(0)), torch.zeros(1, 3, 32)
    seen = []
    with attached(pipe) as attachment, torch.no_grad():
        for timestep in scheduler.timesteps[1:]:
            velocity = pipe.transformer(latents, timestep.expand(1), text, return_dict=False)[0]
            seen.append((attachment.full_passes, attachment.predicted_passes))
            (latents,) = scheduler.step(velocity, timestep, latents, return_dict=False)
    assert seen == [(1, 0), (2, 0), (2, 1)]


class NoHistory:
    def __call__(self, arguments, memory, t):
        return memory[0].tokens


def test_objects_that_are_no_forecasters_are_refused(pipe):
    for wrong, said in ((Reuse, "class Reuse"), (pipe.vae, "AutoencoderKLWan"), (NoHistory(), "NoHistory"), (len, "")):
        with pytest.raises(UserError, match=f"{said}.* is no forecaster"):
            attached(pipe, wrong)
    elsewhere = torch.nn.Linear(2, 2, device="meta")
    elsewhere.history = 1
    with pytest.raises(UserError, match="the Linear is on meta, and the pipeline on cpu"):
        attached(pipe, elsewhere)


def test_timesteps_of_every_token(pipe):
    """Wan 2.2 TI2V-5B: a student of it embeds r and g for each token, and its predicted steps are those of one time."""
    pipe.scheduler = GridScheduler(shift=3.0)
    conditioning = new_conditioning(pipe.transformer, FAMILIES["wan"], ("r", "g"))
    for parameter in conditioning.parameters():
        torch.nn.init.normal_(parameter, std=0.2, generator=torch.Generator().manual_seed(parameter.numel()))
    student = as_student(
        LoadedPipeline(pipe, FAMILIES["wan"], "here", {"guidance": 3.0}, {}), conditioning, pipe.scheduler
    )
    try:
        with attached(student):
            expected = call(pipe)
        pipe.register_to_config(expand_timesteps=True)
        with attached(student) as attachment:
            torch.testing.assert_close(call(pipe), expected, rtol=1e-4, atol=1e-5)
        assert (attachment.full_passes, attachment.predicted_passes) == (2, 2)
    finally:
        student.hook.remove()
        conditioning.detach(pipe.transformer, FAMILIES["wan"])
