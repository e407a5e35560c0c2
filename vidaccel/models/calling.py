"""From plain settings (steps, guidance, num_frames, ...) to the keyword arguments of a family's own pipeline.

A setting that is not given is the model's own (run.json's "call"), else the family's. At guidance 1 every pipeline
makes one pass a step, since both passes of two-pass guidance would then end in the prompt's own prediction.
"""

import inspect
import logging
import math
import re
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from diffusers import DiffusionPipeline

from vidaccel.errors import UserError, nearest
from vidaccel.families.base import DiTFamily, SamplingDefaults
from vidaccel.families.walk import denoisers_of, patch_of
from vidaccel.models.grid import require_steps

if TYPE_CHECKING:  # which imports this
    from vidaccel.models.loading import LoadedPipeline

log = logging.getLogger(__name__)
OWN_SETTINGS = {field.name for field in fields(SamplingDefaults)} | {
    "two_pass",
    "negative_prompt",
    "timesteps",
    "sigmas",
}


def call_arguments(
    loaded: "LoadedPipeline",
    *,
    steps: int | None = None,
    guidance: float | None = None,
    guidance_2: float | None = None,
    two_pass: bool | None = None,
    negative_prompt: str | None = None,
    num_frames: int | None = None,
    height: int | None = None,
    width: int | None = None,
) -> dict[str, Any]:
    """Keyword arguments for `loaded.pipe(prompt, ...)`, one prompt a call; `sampled_as` goes with it.

    Args:
        loaded: the pipeline and its own settings.
        steps: denoising steps, at least 1.
        guidance: classifier-free guidance (CFG) scale, at least 1, which is none.
        guidance_2: that of the second of two transformers; `guidance` says it too where only this is said.
        two_pass: True runs the transformer with and without the prompt at each step, False once with the scale
            embedded; None takes two passes unless the model embeds its guidance.
        negative_prompt: what two passes lead away from.
        num_frames: frames, 4k + 1 for the usual autoencoders.
        height: pixels.
        width: pixels.

    Raises:
        UserError: a value out of range (the message names the nearest valid sizes), guidance that one pass cannot
            follow, two passes of a student that embeds its guidance, a negative prompt without two passes, or a setting
            in the model's run.json that its pipeline does not take.
    """
    require_whole(loaded)
    pipe, rule = loaded.pipe, loaded.family.guidance
    count: int = _given(steps, loaded, "steps")
    if count < 1:
        raise UserError(f"steps={count} denoises nothing", "take 1 step or more; 50 is usual without distillation")
    require_steps(loaded.family, count)
    sizes = {"num_frames": num_frames, "height": height, "width": width}
    sizes = {name: _given(value, loaded, name) for name, value in sizes.items()}
    check_sizes(loaded, **sizes)
    guidance_given = guidance
    guidance, two_pass = guidance_in_force(loaded, guidance, two_pass)
    if negative_prompt and not two_pass:
        raise UserError(
            f"negative_prompt={negative_prompt!r} needs two passes a step, and this {loaded.family.title} makes one",
            "leave it out; a student has the one inside that it was distilled with",
        )

    second = second_guidance(loaded, guidance_given, guidance_2, two_pass)

    arguments = {"num_inference_steps": count, loaded.family.frames_argument: sizes.pop("num_frames"), **sizes}
    if loaded.family.sized_by_image:  # which is of that size
        del arguments["height"], arguments["width"]
    if rule.cfg_argument:
        arguments[rule.cfg_argument] = guidance if two_pass else 1.0
    if rule.second_argument and second is not None:
        arguments[rule.second_argument] = second if two_pass else 1.0
    if rule.embedded_argument:
        arguments[rule.embedded_argument] = 1.0 if two_pass else guidance
    if two_pass:
        # HunyuanVideo's pipeline takes an absent one for "no guidance".
        arguments["negative_prompt"] = unwanted(loaded) if negative_prompt is None else negative_prompt
    if loaded.family.frame_rate:
        arguments[loaded.family.frame_rate] = loaded.default("fps")
    return arguments | _extra_arguments(pipe, loaded)


def set_guidance(
    loaded: "LoadedPipeline",
    *,
    guidance: float | None = None,
    two_pass: bool | None = None,
    guidance_2: float | None = None,
) -> None:
    """Set the scale where it is no call argument: in a pipeline's guider, in the hook of a student that embeds it.

    Arguments and errors are those of `call_arguments`.
    """
    second = second_guidance(loaded, guidance, guidance_2, two_pass)
    guidance, two_pass = guidance_in_force(loaded, guidance, two_pass)
    for each in loaded.further:
        if each.hook and second is not None:
            each.hook.guidance = second
    if loaded.hook:
        loaded.hook.guidance = guidance
    if attribute := loaded.family.guidance.guider:
        guider = getattr(loaded.pipe, attribute)
        setattr(loaded.pipe, attribute, guider.new(guidance_scale=guidance, enabled=two_pass))


@contextmanager
def sampled_as(
    loaded: "LoadedPipeline",
    *,
    guidance: float | None = None,
    two_pass: bool | None = None,
    guidance_2: float | None = None,
    instantaneous: bool = False,
) -> Iterator[None]:
    """The pipeline set to be called, for the time of a `with` block: its guider and hook are then as they were.

    Arguments and errors are those of `set_guidance`; `instantaneous` is that of a student's `StepHook`.
    """
    pipe, attribute = loaded.pipe, loaded.family.guidance.guider
    with ExitStack() as stack:
        for hook in filter(None, (each.hook for each in (loaded, *loaded.further))):
            stack.callback(setattr, hook, "guidance", hook.guidance)
            stack.callback(setattr, hook, "instantaneous", hook.instantaneous)
            hook.instantaneous = instantaneous
        if attribute:
            stack.callback(setattr, pipe, attribute, getattr(pipe, attribute))
        set_guidance(loaded, guidance=guidance, two_pass=two_pass, guidance_2=guidance_2)
        yield


def guidance_in_force(loaded: "LoadedPipeline", guidance: float | None, two_pass: bool | None) -> tuple[float, bool]:
    """The scale that the arguments of `call_arguments` lead to, and whether it is reached by two passes a step."""
    transformer = denoisers_of(loaded.pipe, loaded.family)[0]
    distilled = loaded.conditioning is not None and "g" in loaded.conditioning.config.embeds
    embeds = distilled or bool(loaded.family.g_config and transformer.config[loaded.family.g_config])
    two_pass = loaded.call.get("two_pass", not embeds) if two_pass is None else two_pass
    if two_pass and distilled:
        raise UserError(
            f"two_pass=true has no meaning here: this {loaded.family.title} student makes guided videos in one pass",
            "leave two_pass out; guidance=... still sets the scale",
        )
    if not two_pass and not embeds:
        if guidance is not None and guidance != 1:
            raise UserError(
                f"guidance={guidance} needs two passes a step: this {loaded.family.title} has no guidance embedding",
                "set two_pass=true, or guidance=1",
            )
        return 1.0, False
    guidance = _given(guidance, loaded, "guidance")
    if not 1 <= guidance < math.inf:
        raise UserError(f"guidance={guidance} is not a number from 1 up", "1 is no guidance, 5 to 7 is usual")
    return float(guidance), two_pass


def second_guidance(
    loaded: "LoadedPipeline", guidance: float | None, guidance_2: float | None, two_pass: bool | None
) -> float | None:
    """The scale of the second denoiser that the arguments of `call_arguments` lead to; None where there is one for all.

    What is said of `guidance` alone, by a caller or by the model's run.json, holds for both.
    """
    if not loaded.family.guidance.second_argument:
        if guidance_2 is not None:
            raise UserError(
                f"guidance_2={guidance_2}, and {loaded.family.title} has one transformer", "say guidance= alone"
            )
        return None
    first, two_pass = guidance_in_force(loaded, guidance, two_pass)
    embeds = any(each.hook and each.hook.embeds_guidance for each in loaded.further)
    alone = guidance is not None or ("guidance" in loaded.call and "guidance_2" not in loaded.call)
    second = first if guidance_2 is None and (alone or first == 1) else _given(guidance_2, loaded, "guidance_2")
    if not 1 <= second < math.inf:
        raise UserError(f"guidance_2={second} is not a number from 1 up", "1 is no guidance, 3 to 4 is usual")
    if guidance_2 not in (None, 1) and not embeds and not (two_pass and first > 1):
        raise UserError(
            f"guidance_2={guidance_2} needs two passes a step, which the pipeline makes where guidance is above 1",
            "set guidance= above 1 as well, or leave guidance_2 out",
        )
    return float(second) if two_pass or embeds else 1.0


def require_whole(loaded: "LoadedPipeline") -> None:
    """`UserError` for a model of which one of two denoisers has been distilled and the other has not."""
    embeds = [each.conditioning and each.conditioning.config.embeds for each in (loaded, *loaded.further)]
    if len(set(embeds)) > 1:
        names = [denoiser.attribute for denoiser in loaded.family.denoisers]
        missing = next(name for name, own in zip(names, embeds, strict=True) if own != max(embeds, key=bool))
        raise UserError(
            f"the {missing} of {loaded.source} has not been distilled as the other was",
            f"distil it too: vidaccel distill teacher={loaded.source} denoiser={missing} -o ANOTHER",
        )


def unwanted(loaded: "LoadedPipeline") -> str:
    """The negative prompt that the model is called with unless told: what two-pass guidance leads away from."""
    return loaded.call.get("negative_prompt") or ""


def warn_of_guidance(loaded: "LoadedPipeline", guidance: float | None, guidance_2: float | None = None) -> None:
    """Say so where a student was trained on other scales than these; None is its own."""
    told = [("guidance", loaded, loaded.default("guidance") if guidance is None else guidance)]
    if any(each.conditioning for each in loaded.further):
        second = second_guidance(loaded, guidance, guidance_2, None)
        told += [("guidance_2", each, second) for each in loaded.further]
    for name, each, scale in told:
        trained = each.conditioning.config.guidance_range if each.conditioning else None
        if trained and not trained[0] <= scale <= trained[1]:
            log.warning("%s=%g: the student was trained on scales from %g to %g", name, scale, *trained)


def size_steps(loaded: "LoadedPipeline") -> tuple[int, int]:
    """(f, s): this pipeline makes f k + 1 frames of a height and width that are multiples of s pixels, k = 0, 1, ..."""
    pipe, family = loaded.pipe, loaded.family
    *_, width = patch_of(denoisers_of(pipe, family)[0])
    frames, pixels = compression_of(pipe, family)
    return frames * family.latent_frame_step, math.lcm(family.size_multiple, width * pixels)


def compression_of(pipe: DiffusionPipeline, family: DiTFamily) -> tuple[int, int]:
    """Frames of a latent frame, and pixels along a side of a latent pixel."""
    frames, pixels = (getattr(pipe, name) for name in family.compression_attributes)
    return frames, pixels


def video_size(loaded: "LoadedPipeline", latent: Sequence[int]) -> dict[str, int]:
    """num_frames, height and width of the video that a latent of this shape [..., T, H, W] decodes to."""
    (frames, height, width), (frame_step, pixels) = latent[-3:], compression_of(loaded.pipe, loaded.family)
    return {"num_frames": (frames - 1) * frame_step + 1, "height": height * pixels, "width": width * pixels}


def latent_size(loaded: "LoadedPipeline", *, num_frames: int, height: int, width: int) -> tuple[int, int, int]:
    """(T, H, W) of the latent of such a video."""
    frame_step, pixels = compression_of(loaded.pipe, loaded.family)
    return (num_frames - 1) // frame_step + 1, height // pixels, width // pixels


def neighbours(value: int, step: int, first: int) -> list[int]:
    """The members of first, first + step, first + 2 step, ... on both sides of `value`; `value` alone if it is one."""
    below = first + (value - first) // step * step
    return sorted({max(below, first), max(below if below == value else below + step, first)})


def check_sizes(loaded: "LoadedPipeline", *, num_frames: int, height: int, width: int) -> None:
    """`UserError` naming the nearest valid values unless the pipeline can make a video of this size."""
    refuse_misfits(loaded.family.title, size_steps(loaded), num_frames=num_frames, height=height, width=width)
    if loaded.family.sized_by_image:
        own = sized_by_image(loaded.pipe, height, width)
        if own != (height, width):
            while own != (size := sized_by_image(loaded.pipe, *own)):  # rounded, an image may lead past its own size
                own = size
            raise UserError(
                f"height={height} width={width} does not fit: this {loaded.family.title} chooses its size by its image",
                f"nearest that it chooses: height={own[0]} width={own[1]}",
            )


def sized_by_image(pipe: Any, height: int, width: int) -> tuple[int, int]:
    """Height and width of the video that the pipeline makes of an image of these."""
    return pipe.video_processor.calculate_default_height_width(height=height, width=width, target_size=pipe.target_size)


GIVE_IMAGE = "give one: --image FILE (generate), images=FOLDER, one for each prompt (benchmark)"
IMAGES_OF_CLIPS = "take clips in place of prompts=, whose first frames are the images: data=FOLDER, or features=FOLDER"


def check_image(family: DiTFamily, given: bool, hint: str = GIVE_IMAGE) -> None:
    """`UserError` for an image that the family's pipelines do not take, and for none where they begin with one; `hint`
    says how one is given."""
    if given and not family.begins_with_image:
        raise UserError(
            f"an image was given, and {family.title} makes videos of text alone", "leave it out, or take another model"
        )
    if family.begins_with_image and not given:
        raise UserError(f"{family.title} begins its videos with an image, and none was given", hint)


def refuse_misfits(title: str, size_steps: tuple[int, int], *, num_frames: int, height: int, width: int) -> None:
    """`check_sizes` for a model called `title`, by what the function `size_steps` gives for it."""
    frame_step, size_step = size_steps
    rules = {
        "num_frames": (num_frames, frame_step, 1, f"{frame_step}k + 1 frames"),
        "height": (height, size_step, size_step, f"multiples of {size_step} pixels"),
        "width": (width, size_step, size_step, f"multiples of {size_step} pixels"),
    }
    for name, (value, step, first, rule) in rules.items():
        valid = neighbours(value, step, first)
        if value not in valid:
            raise UserError(
                f"{name}={value} does not fit: this {title} makes {rule}",
                f"nearest valid: {' or '.join(map(str, valid))}",
            )


def unknown_words(pipe: DiffusionPipeline, prompt: str) -> list[str]:
    """Words of the prompt that the main tokenizer cannot tell apart, in order; [] if it has a token for anything."""
    tokenizer = pipe.tokenizer
    if tokenizer.unk_token_id is None:
        return []
    words = dict.fromkeys(re.findall(r"\w+", prompt))
    return [word for word in words if tokenizer.unk_token_id in tokenizer(word, add_special_tokens=False).input_ids]


def _given(value: Any, loaded: "LoadedPipeline", name: str) -> Any:
    return loaded.default(name) if value is None else value


def _extra_arguments(pipe: DiffusionPipeline, loaded: "LoadedPipeline") -> dict[str, Any]:
    """The model's own settings that are not ours but the pipeline's, such as prompt_template."""
    extra = {name: value for name, value in loaded.call.items() if name not in OWN_SETTINGS}
    extra = dict(loaded.family.call) | extra
    known = inspect.signature(type(pipe).__call__).parameters.keys() - {"self"}
    for name in extra:
        if name not in known:
            raise UserError(
                f'{type(pipe).__name__} takes no {name}, which "call" in the run.json of {loaded.source} sets',
                nearest(name, known | OWN_SETTINGS),
            )
    return extra
