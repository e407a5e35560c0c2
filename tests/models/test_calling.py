"""Settings to call arguments: precedence, nearest valid sizes, and how many passes a step really takes."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.tiny import CALLS, HUNYUAN_CALL, SIZE, TEXT_TO_VIDEO, tiny_pipeline, word_tokenizer
from vidaccel.config.generate import GenerateConfig
from vidaccel.errors import UserError
from vidaccel.families.registry import FAMILIES
from vidaccel.families.walk import passes_of_call
from vidaccel.models.calling import call_arguments, check_sizes, neighbours, set_guidance, size_steps, unknown_words
from vidaccel.models.conditioning import new_conditioning
from vidaccel.models.grid import GridScheduler
from vidaccel.models.loading import LoadedPipeline, as_student
from vidaccel.sampling import generate


def load(family: str, call: dict | None = None, **options: bool) -> LoadedPipeline:
    call = CALLS.get(family, {}) | (call or {})
    return LoadedPipeline(tiny_pipeline(family, **options), FAMILIES[family], "tiny", call, {})


@pytest.fixture(scope="module")
def pipelines() -> dict[str, LoadedPipeline]:
    return {family: load(family) for family in TEXT_TO_VIDEO}


def passes(loaded: LoadedPipeline, steps: int = 2, **settings: object) -> int:
    """Passes of the transformer in one generation."""
    calls = []
    hook = loaded.pipe.transformer.register_forward_pre_hook(
        lambda *_: calls.append(passes_of_call(loaded.pipe, loaded.family))
    )
    set_guidance(loaded, **settings)
    loaded.pipe("a red circle", output_type="latent", **call_arguments(loaded, steps=steps, **SIZE, **settings))
    hook.remove()
    return sum(calls)


@pytest.mark.parametrize("family", TEXT_TO_VIDEO)
def test_two_passes_a_step_with_guidance_and_one_without(family, pipelines):
    loaded = pipelines[family]
    assert passes(loaded) == 4
    assert passes(loaded, guidance=3.0, two_pass=True) == 4
    assert passes(loaded, guidance=1.0) == 2
    assert passes(loaded, two_pass=False) == 2


def test_an_embedded_scale_takes_one_pass_and_reaches_the_transformer():
    loaded = load("hunyuan_video", guidance_embeds=True)
    seen = []
    loaded.pipe.transformer.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs["guidance"].item()), with_kwargs=True
    )
    assert passes(loaded, guidance=4.0) == 2 and set(seen) == {4000.0}
    seen.clear()
    assert passes(loaded, guidance=4.0, two_pass=True) == 4 and set(seen) == {1000.0}


def test_a_student_that_embeds_its_guidance_takes_one_pass():
    teacher = load("wan")
    conditioning = new_conditioning(teacher.pipe.transformer, teacher.family, ("g",))
    loaded = as_student(teacher, conditioning, GridScheduler(shift=3.0))
    assert loaded.hook.guidance == 5.0
    assert passes(loaded, guidance=4.0) == 2 and loaded.hook.guidance == 4.0
    assert passes(loaded) == 2 and loaded.hook.guidance == 5.0
    with pytest.raises(UserError, match="two_pass=true has no meaning") as caught:
        call_arguments(loaded, guidance=4.0, two_pass=True, **SIZE)
    assert "guidance=" in caught.value.hint
    with pytest.raises(UserError, match="two_pass=true has no meaning"):
        call_arguments(replace(loaded, call={"two_pass": True}), **SIZE)
    plain = as_student(loaded, None, GridScheduler(shift=3.0))
    assert plain.conditioning is None and plain.hook is None and passes(plain, guidance=4.0) == 4


def test_guidance_that_one_pass_cannot_follow_is_refused(pipelines):
    for loaded in pipelines.values():
        with pytest.raises(UserError, match="guidance=4.0"):
            call_arguments(loaded, guidance=4.0, two_pass=False, **SIZE)


def test_the_guiders_scale_is_set_and_its_other_settings_are_kept():
    loaded = load("hunyuan_video_15")
    loaded.pipe.guider = loaded.pipe.guider.new(guidance_rescale=0.5)
    set_guidance(loaded, guidance=3.0)
    assert (loaded.pipe.guider.guidance_scale, loaded.pipe.guider.guidance_rescale) == (3.0, 0.5)


@pytest.mark.parametrize("family", TEXT_TO_VIDEO)
def test_a_given_value_wins_over_the_models_own_and_that_over_the_familys(family, pipelines):
    loaded = pipelines[family]
    defaults = loaded.family.defaults
    arguments = call_arguments(loaded)
    assert arguments["num_inference_steps"] == defaults.steps
    assert [arguments[name] for name in SIZE] == [defaults.num_frames, defaults.height, defaults.width]

    own = replace(loaded, call=loaded.call | {"steps": 7, "num_frames": 9, "two_pass": False, "fps": 8, "shift": 2.0})
    arguments = call_arguments(own)
    assert (arguments["num_inference_steps"], arguments["num_frames"]) == (7, 9)
    assert "negative_prompt" not in arguments and "fps" not in arguments and "shift" not in arguments
    arguments = call_arguments(own, steps=3, num_frames=13, two_pass=True)
    assert (arguments["num_inference_steps"], arguments["num_frames"]) == (3, 13)
    assert arguments["negative_prompt"] == ""


def test_extra_settings_of_a_model_reach_its_pipeline_or_are_refused(pipelines):
    loaded = replace(pipelines["wan"], call={"negative_prompt": "blurred", "max_sequence_length": 16})
    arguments = call_arguments(loaded)
    assert (arguments["negative_prompt"], arguments["max_sequence_length"]) == ("blurred", 16)
    with pytest.raises(UserError) as caught:
        call_arguments(replace(loaded, call={"max_sequence_lenght": 16}))
    assert "max_sequence_lenght" in caught.value.message and '"max_sequence_length"' in caught.value.hint
    with pytest.raises(UserError, match="prompt_template"):
        call_arguments(replace(loaded, call=HUNYUAN_CALL))


@pytest.mark.parametrize(
    ("setting", "hint"),
    [
        ({"num_frames": 16}, "13 or 17"),
        ({"num_frames": 0}, "nearest valid: 1"),
        ({"height": 95}, " or 96"),
        ({"width": 7}, "nearest valid: {size}"),
        ({"width": -32}, "nearest valid: {size}"),
        ({"steps": 0}, "1 step"),
        ({"guidance": 0.5}, "1 is no guidance"),
        ({"guidance": float("nan")}, "1 is no guidance"),
    ],
)
@pytest.mark.parametrize("family", TEXT_TO_VIDEO)
def test_values_out_of_range_say_what_would_be_valid(family, setting, hint, pipelines):
    with pytest.raises(UserError) as caught:
        call_arguments(pipelines[family], **(SIZE | setting))
    hint = hint.format(size=pipelines[family].family.size_multiple)
    assert next(iter(setting)) in caught.value.message and hint in caught.value.hint


@given(value=st.integers(-100, 2000), step=st.integers(1, 64), first=st.integers(1, 64))
def test_neighbours_are_valid_and_none_is_nearer(value, step, first):
    valid = range(first, 4000, step)
    found = neighbours(value, step, first)
    assert all(number in valid for number in found)
    nearest_distance = min(abs(number - value) for number in valid)
    assert min(abs(number - value) for number in found) == nearest_distance
    assert {number for number in valid if abs(number - value) == nearest_distance} <= set(found)
    assert (found == [value]) == (value in valid)


@pytest.mark.parametrize("family", TEXT_TO_VIDEO)
def test_the_size_rules_are_those_of_the_pipeline(family, pipelines):
    loaded = pipelines[family]
    size = loaded.family.size_multiple
    assert size_steps(loaded) == (4, size) and size in (16, 32)
    check_sizes(loaded, num_frames=1, height=size, width=3 * size)
    arguments = call_arguments(loaded, steps=1, two_pass=False, num_frames=9, height=size, width=3 * size)
    frames = loaded.pipe("a red circle", output_type="np", **arguments).frames[0]
    assert frames.shape == (9, size, 3 * size, 3)


@pytest.mark.parametrize("family", TEXT_TO_VIDEO)
def test_unknown_words_are_named_once_and_in_order(family, pipelines):
    pipe = pipelines[family].pipe
    assert unknown_words(pipe, "A purple circle, moving zigzag, on purple.") == ["purple", "zigzag"]
    assert unknown_words(pipe, "a red circle moving right") == []


def test_a_tokenizer_without_an_unknown_token_knows_every_word(pipelines, monkeypatch):
    tokenizer = word_tokenizer()
    tokenizer.unk_token = None
    monkeypatch.setattr(pipelines["wan"].pipe, "tokenizer", tokenizer)
    assert unknown_words(pipelines["wan"].pipe, "anything") == []


def test_each_of_two_transformers_has_a_scale_of_its_own():
    pipe = tiny_pipeline("wan22")

    def scales(own=None, **asked):
        arguments = call_arguments(LoadedPipeline(pipe, FAMILIES["wan22"], "here", SIZE | (own or {}), {}), **asked)
        return arguments["guidance_scale"], arguments["guidance_scale_2"]

    assert scales() == (4.0, 3.0)  # as published
    assert scales(guidance=6.0) == (6.0, 6.0) and scales({"guidance": 2.0}) == (2.0, 2.0)
    assert scales(guidance=6.0, guidance_2=1.0) == (6.0, 1.0) and scales(guidance_2=5.0) == (4.0, 5.0)
    assert scales({"guidance": 2.0, "guidance_2": 3.5}) == (2.0, 3.5)
    assert scales(guidance=1.0) == scales({"guidance_2": 3.5}, guidance=1.0) == scales(two_pass=False) == (1.0, 1.0)
    for asked, said in (
        ({"guidance": 1.0, "guidance_2": 3.0}, "needs two passes"),
        ({"two_pass": False, "guidance_2": 3.0}, "needs two passes"),
        ({"guidance_2": 0.5}, "not a number from 1 up"),
    ):
        with pytest.raises(UserError, match=said):
            scales(**asked)
    with pytest.raises(UserError, match="has one transformer"):
        call_arguments(LoadedPipeline(tiny_pipeline("wan"), FAMILIES["wan"], "here", SIZE, {}), guidance_2=3.0)


def test_the_scales_of_both_reach_the_pipeline():
    loaded = LoadedPipeline(tiny_pipeline("wan22"), FAMILIES["wan22"], "here", SIZE, {})
    by_us = generate(loaded, ["a red circle"], GenerateConfig(steps=4, guidance_2=6.0), [0])
    arguments = {"num_inference_steps": 4, "guidance_scale": 4.0, "guidance_scale_2": 6.0, "output_type": "latent"}
    stock = loaded.pipe("a red circle", generator=torch.Generator().manual_seed(0), **SIZE, **arguments).frames
    assert torch.equal(by_us.latents, stock) and (by_us.guidance, by_us.guidance_2) == (4.0, 6.0)
    assert by_us.how() == "4 steps, 8 passes, guidance 4 and 6"
