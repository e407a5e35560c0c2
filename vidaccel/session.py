"""A model made ready as the settings of `generate` say, and the videos that it makes of prompts, one after another."""

import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from PIL.Image import Image

from vidaccel.cache.attachment import Attachment
from vidaccel.cache.whole_pass import WholePass
from vidaccel.config.generate import GenerateConfig
from vidaccel.data.images import Source, fitted, read_image
from vidaccel.errors import UserError
from vidaccel.families.walk import denoisers_of
from vidaccel.models.calling import (
    check_image,
    guidance_in_force,
    latent_size,
    second_guidance,
    warn_of_guidance,
)
from vidaccel.models.files import ModelFiles, read_model
from vidaccel.models.grid import Grid, ListedScheduler, shift_of
from vidaccel.models.loading import LoadedPipeline, load_pipeline, resolve_device
from vidaccel.models.text_cuts import TextCuts
from vidaccel.prompts import check_prompts
from vidaccel.runtime import prepare as runtime
from vidaccel.runtime.context_parallel import check_split, check_tokens, neighbours, split
from vidaccel.runtime.offload import check_offload, offload
from vidaccel.sampling import Generated, check_predictor, generate, predicted_steps, warn_of_unknown_words

log = logging.getLogger(__name__)


@dataclass
class Session:
    """A model, loaded and prepared, with its predictor attached."""

    config: GenerateConfig
    loaded: LoadedPipeline
    runtime: dict[str, Any]
    """How it runs, by the names of the settings."""
    attachment: Attachment | WholePass | None
    seconds: float
    """That loading took."""
    images: Sequence[np.ndarray] = ()
    """What the videos begin with, one each or one for all, uint8 [H, W, 3] of their size."""
    fitted: Sequence[str] = ()
    """What was done to each image."""

    def videos(self, prompts: Sequence[str], which: Sequence[int] | None = None) -> Iterator[Generated]:
        """One video a prompt, or of those prompts alone that are at `which` places; video i is made of seed
        `config.seed + i`, and begins with image i where there are any.

        Raises:
            UserError: a prompt that no tokenizer takes, or another number of images.
        """
        check_prompts(prompts)
        if len(self.images) > 1 and len(self.images) != len(prompts):
            raise UserError(
                f"{len(self.images)} images were given for {len(prompts)} prompts", "give one each, or one for all"
            )
        places = range(len(prompts)) if which is None else which
        for i in places:
            warn_of_unknown_words(self.loaded, prompts[i])
        cuts = TextCuts()
        for i in places:
            image = self.images[i % len(self.images)] if self.images else None
            with cuts.noticed(self.loaded.pipe):
                made = generate(self.loaded, [prompts[i]], self.config, [self.config.seed + i], self.attachment, image)
            yield made


def fitted_images(
    files: ModelFiles, config: GenerateConfig, images: Sequence[Source]
) -> tuple[list[np.ndarray], list[str]]:
    """Images of the size of the video that `config` asks this model for, and what was done to each.

    Raises:
        UserError: one cannot be taken, or the model takes none or needs one.
    """
    check_image(files.contents.family, bool(images))
    height, width = (getattr(config, name) or files.default(name) for name in ("height", "width"))
    names = ["the image" if isinstance(image, Image) else str(image) for image in images]
    made = [fitted(read_image(image), height, width, name) for image, name in zip(images, names, strict=True)]
    return [array for array, _ in made], [said for _, said in made]


@contextmanager
def session(
    config: GenerateConfig, device: str, warm_up: str | None = None, images: Sequence[Source] = ()
) -> Iterator[Session]:
    """The model that `config` names, for the time of a `with` block.

    With a prompt to `warm_up` on, a step of it is made beforehand, or a whole video where blocks are compiled, so that
    the seconds of the videos that follow are those of a machine at work. `images` are what videos begin with, one for
    each or one for all.

    Raises:
        UserError: model, predictor, machine and settings do not go together.
    """
    started = time.perf_counter()
    target = resolve_device(device)
    check_predictor(config)
    runtime.check(config, target)
    check_offload(config.offload, target, config.compile)
    files = read_model(config.model, config.student)
    if config.parallel.devices > 1:
        _check_devices(config, files, target)
    pictures, said = fitted_images(files, config, images)
    whole = config.offload == "none"
    placed = whole and config.quantize == "none"  # as they are stored they may not fit where they do quantised
    loaded = load_pipeline(
        files, device=device, dtype=config.dtype, lora=config.lora or (), placed=placed, decoder=config.decoder
    )
    if config.instantaneous and not any(each.hook and each.hook.tells_end for each in (loaded, *loaded.further)):
        raise UserError(
            f"instantaneous=true is for a student of mean velocities, and {loaded.source} is told no r", "leave it out"
        )
    ran = runtime.prepare(loaded, config, target)
    if whole and not placed:
        loaded.pipe.to(target)
    if config.parallel.devices > 1:
        ran["parallel"] = _split(loaded, config, target)
    if not whole:
        offload(loaded.pipe, loaded.family, config.offload, target)
        ran["offload"] = config.offload
    seconds = time.perf_counter() - started
    log.info("sampled with %s", said_sampling(loaded, config))
    warn_of_guidance(loaded, config.guidance, config.guidance_2)
    first = pictures[0] if pictures else None
    if warm_up is not None:
        listed = config.timesteps or config.sigmas or isinstance(loaded.pipe.scheduler, ListedScheduler)
        generate(
            loaded,
            [warm_up],
            config if listed else replace(config, steps=loaded.family.least_steps),
            [config.seed],
            image=first,
        )
    with predicted_steps(loaded, config) as attachment:
        if attachment and len(attachment.policy.full_steps) == attachment.policy.steps:
            steps = attachment.policy.steps
            log.info("all %d steps are full, and nothing is predicted: budget= takes fewer", steps)
        if warm_up is not None and config.compile:
            generate(loaded, [warm_up], config, [config.seed], attachment, first)
        yield Session(config, loaded, ran, attachment, seconds, pictures, said)


def _check_devices(config: GenerateConfig, files: ModelFiles, device: torch.device) -> None:
    """`UserError` for a split of one video that cannot be, before weights are read."""
    if config.attention == runtime.AUTO:
        raise UserError(
            "attention=auto came with a video on several devices, whose attention is another than is measured",
            "name one, such as attention=native",
        )
    check_split(files.contents.family, config.parallel, device, config.attention)
    if config.compile:
        raise UserError(
            "compile=true came with a video on several devices, which nobody has tried", "set compile=false"
        )


def _split(loaded: LoadedPipeline, config: GenerateConfig, device: torch.device) -> dict[str, int]:
    """Split the passes of the pipeline's transformers over processes; the degrees."""
    size = {name: getattr(config, name) or loaded.default(name) for name in ("num_frames", "height", "width")}
    for transformer in denoisers_of(loaded.pipe, loaded.family):
        check_tokens(transformer, config.parallel, latent_size(loaded, **size))
        split(transformer, loaded.family, config.parallel, config.attention, device)
    loaded.devices = neighbours(config.parallel, device)
    return asdict(config.parallel)


def said_sampling(loaded: LoadedPipeline, config: GenerateConfig) -> str:
    """Steps, guidance and grid that a video is made with, each with whose they are."""
    listed = Grid.listed(config.timesteps, config.sigmas)
    given = {"steps": config.steps, "guidance": config.guidance}
    said = []
    for name, value in given.items():
        shown, whose = (loaded.default(name), loaded.says(name)) if value is None else (value, "the settings")
        if name == "guidance":
            shown, _ = guidance_in_force(loaded, config.guidance, config.two_pass)
        said.append(f"{name}={shown:g} (of {whose})")
    second = second_guidance(loaded, config.guidance, config.guidance_2, config.two_pass)
    if second is not None:
        said.append(f"guidance_2={second:g}")
    if listed is not None:
        said.append(f"{listed} (of the settings; by flow-match Euler)")
    elif config.shift is not None:
        said.append(f"shift={config.shift:g} (of the settings)")
    else:
        scheduler = loaded.pipe.scheduler
        shift = shift_of(scheduler, loaded.family)
        own = "times of its own" if shift is None else f"shift={shift:g}"
        said.append(f"{own} (of the model's {type(scheduler).__name__})")
    return ", ".join(said)
