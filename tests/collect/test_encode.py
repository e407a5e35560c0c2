"""What is stored is what the pipeline itself would have fed its transformer, and what it would decode back."""

from dataclasses import replace

import pytest
import torch

from tests.tiny import BUILDERS, CALLS, SIZE, as_given, called, passes_of, tiny_pipeline
from vidaccel.collect.encode import batch, encode_prompts, encode_samples, encode_texts, encode_videos, first_frames
from vidaccel.errors import UserError
from vidaccel.families.registry import FAMILIES
from vidaccel.models.calling import call_arguments, set_guidance
from vidaccel.models.loading import LoadedPipeline

COLLECTED = [name for name in BUILDERS if FAMILIES[name].untrained is None]
FROM_NOISE = [name for name in COLLECTED if not any(each.first_frame for each in FAMILIES[name].conditions)]
"""Those whose latents the pipeline takes as they are."""
CAPTIONS = ["a red circle moving right on black", 'a blue square with "red" on white', ""]


@pytest.fixture(scope="module")
def models() -> dict[str, LoadedPipeline]:
    """A tiny pipeline of every family whose latents have units of their own."""
    pipes = {name: tiny_pipeline(name) for name in COLLECTED}
    for pipe in pipes.values():
        if pipe.vae.config.get("latents_mean"):
            pipe.vae.register_to_config(latents_mean=[0.5, -1.0, 2.0, 0.0], latents_std=[0.5, 2.0, 4.0, 1.0])
        elif "latents_mean" in dict(pipe.vae.named_buffers()):
            pipe.vae.latents_mean.copy_(torch.tensor([0.5, -1.0, 2.0, 0.0]))
            pipe.vae.latents_std.copy_(torch.tensor([0.5, 2.0, 4.0, 1.0]))
        elif pipe.vae.config.scaling_factor == 1:
            pipe.vae.register_to_config(scaling_factor=1.7)
    return {
        name: LoadedPipeline(pipe, FAMILIES[name], "here", SIZE | CALLS.get(name, {}), {})
        for name, pipe in pipes.items()
    }


def videos(count: int = 2) -> torch.Tensor:
    return torch.rand(count, 3, 5, 32, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1


def fed(loaded: LoadedPipeline, prompts: list[str], guidance: float) -> list[dict]:
    """Keyword arguments of the transformer's passes in the first step of the pipeline."""
    seen = []
    hook = loaded.pipe.transformer.register_forward_pre_hook(lambda _, args, kw: seen.append(kw), with_kwargs=True)
    arguments = call_arguments(loaded, steps=loaded.family.least_steps, guidance=guidance)
    if "negative_prompt" in arguments:
        arguments["negative_prompt"] = [""] * len(prompts)
    set_guidance(loaded, guidance=guidance)
    arguments |= called(loaded.pipe)
    loaded.pipe(prompt=prompts, output_type="latent", generator=torch.Generator(), **arguments)
    hook.remove()
    return passes_of(loaded.pipe, seen[: len(seen) // loaded.family.least_steps])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", [name for name in COLLECTED if FAMILIES[name].batched])
def test_texts_are_what_the_pipeline_feeds_its_transformer(family, dtype):
    call = SIZE | CALLS.get(family, {})
    pipe = tiny_pipeline(family)
    pipe.transformer.to(dtype)
    if FAMILIES[family].guidance.doubled:
        pipe.text_encoder.to(dtype)  # which says in what type these pipelines call their transformer
    loaded = LoadedPipeline(pipe, FAMILIES[family], "here", call, {})
    texts, seen = encode_texts(loaded, CAPTIONS), fed(loaded, CAPTIONS, guidance=3.0)
    nothing = encode_texts(loaded, [""] * 3)
    assert len(seen) == 2
    for text in loaded.family.text_tensors:
        for ours, theirs in ((texts, seen[0]), (nothing, seen[1])):
            given = theirs[text.argument]
            given = given.to(dtype) if given.dtype == torch.bool else given  # a mask, which the transformer converts
            assert ours[text.stored].dtype == given.dtype == dtype
            assert torch.equal(ours[text.stored], given)
    assert texts.keys() == {text.stored for text in loaded.family.text_tensors}


def test_the_models_own_call_settings_decide(models):
    loaded = models["wan"]
    assert encode_texts(loaded, ["a"])["prompt_embeds"].shape[1] == 512  # the pipeline's call; encode_prompt's is 226
    own = replace(loaded, call=loaded.call | {"max_sequence_length": 16, "negative_prompt": "black"})
    assert encode_texts(own, ["a"])["prompt_embeds"].shape[1] == 16
    assert torch.equal(encode_texts(own, ["a"])["prompt_embeds"], fed(own, ["a"], 1.0)[0]["encoder_hidden_states"])


@torch.no_grad()
@pytest.mark.parametrize("family", FROM_NOISE)
def test_the_pipeline_decodes_what_was_encoded(family, models):
    """Through its own code: with a velocity of zero it decodes the latents that it is given."""
    loaded = models[family]
    pipe = loaded.pipe
    latents = encode_videos(pipe.vae, videos(1))
    set_guidance(loaded, two_pass=False)
    zero = pipe.transformer.proj_out.register_forward_hook(lambda module, args, output: torch.zeros_like(output))
    given = as_given(loaded.family, latents)
    if loaded.family.predicts != "flow":  # whose steps do not leave latents alone
        pipe.scheduler.step = lambda *args, **options: (given,)
    arguments = call_arguments(loaded, steps=loaded.family.least_steps, two_pass=False) | called(pipe)
    if "decode_noise_scale" in arguments:
        arguments["decode_noise_scale"] = 0.0
    frames = pipe(prompt="a", latents=given, output_type="pt", **arguments).frames
    zero.remove()
    vars(pipe.scheduler).pop("step", None)
    posterior = pipe.vae.encode(videos(1)).latent_dist.mean
    further = {}
    if pipe.vae.config.get("timestep_conditioning"):
        further["temb"] = torch.tensor([call_arguments(loaded)["decode_timestep"]])
    decoded = pipe.video_processor.postprocess_video(pipe.vae.decode(posterior, **further).sample, output_type="pt")
    torch.testing.assert_close(frames, decoded, atol=1e-4, rtol=0)
    assert not torch.allclose(latents, posterior, rtol=0.05)


@torch.no_grad()
def test_units_by_hand(models):
    wan, hunyuan = models["wan"].pipe.vae, models["hunyuan_video"].pipe.vae
    posterior = wan.encode(videos(1)).latent_dist.mean
    expected = [(posterior[:, 0] - 0.5) / 0.5, (posterior[:, 1] + 1) / 2, (posterior[:, 2] - 2) / 4, posterior[:, 3]]
    torch.testing.assert_close(encode_videos(wan, videos(1)), torch.stack(expected, dim=1))
    torch.testing.assert_close(encode_videos(hunyuan, videos(1)), 0.476986 * hunyuan.encode(videos(1)).latent_dist.mean)


@pytest.mark.parametrize("family", COLLECTED)
def test_samples_hold_latent_and_text_of_each_clip(family, models):
    loaded, records = models[family], [{"caption": caption, "fps": 8} for caption in CAPTIONS[:2]]
    samples = encode_samples(loaded, list(videos()), records, "float32")
    stacked = batch([tensors for tensors, _ in samples], torch.device("cpu"), torch.float32)
    assert [record for _, record in samples] == records
    torch.testing.assert_close(stacked.pop("latent"), encode_videos(loaded.pipe.vae, videos()))
    images = first_frames(videos()) if loaded.family.begins_with_image else None
    texts = encode_prompts(loaded, CAPTIONS[:2], images, SIZE["num_frames"])
    assert stacked.keys() == texts.keys() and ("image" in samples[0][0]) == bool(images)
    assert texts.keys() > {condition.stored for condition in loaded.family.conditions}
    for name, tensor in texts.items():
        assert torch.equal(stacked[name], tensor)
        assert (samples[0][0][name].dtype == torch.bool) == ("mask" in name)
    half = encode_samples(loaded, list(videos()), records, "float16")[1][0]["latent"]
    assert half.dtype == torch.float16
    torch.testing.assert_close(half.float(), samples[1][0]["latent"], atol=1e-3, rtol=1e-3)


def test_what_does_not_fit_its_dtype_is_refused(models):
    loaded, records = models["hunyuan_video"], [{"caption": "a"}, {"caption": "b", "file": "b.mp4"}]
    broken = videos()
    broken[1, 0, 0, 0, 0] = float("nan")
    with pytest.raises(UserError, match=r"b\.mp4 \('b'\): its latent is not finite in float16"):
        encode_samples(loaded, list(broken), records, "float16")
    large = 1e6 * videos()
    loaded.pipe.vae.register_to_config(scaling_factor=1e9)
    try:
        with pytest.raises(UserError, match=r"the sample \('a'\): its latent is not finite in float16"):
            encode_samples(loaded, list(large), records, "float16")
        assert encode_samples(loaded, list(large), records, "float32")
    finally:
        loaded.pipe.vae.register_to_config(scaling_factor=0.476986)


@pytest.mark.parametrize("stored", [torch.float16, torch.float32])
def test_stored_samples_are_stacked_as_they_are_under_autocast(stored):
    samples = [{"latent": torch.full((2, 3), 0.1 * i, dtype=stored)} for i in range(2)]
    with torch.autocast("cpu", torch.bfloat16):
        stacked = batch(samples, torch.device("cpu"), torch.float32)["latent"]
    assert stacked.dtype == torch.float32
    assert torch.equal(stacked, torch.stack([sample["latent"].float() for sample in samples]))
