"""Videos: prompts through a diffusers pipeline, unchanged, with what happened on the way counted and timed; and the
pipeline's loop laid bare, for collection, schedule search and evaluation. Both end in the same latents (test).

B videos, C channels, T frames, H height, W width; of pixels in `generate`, of latents in `sample`
"""

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vidaccel.cache.attach import attach, named_predictor
from vidaccel.cache.attachment import Attachment
from vidaccel.cache.schedule import read_schedules
from vidaccel.cache.whole_pass import WholePass
from vidaccel.config.generate import GenerateConfig
from vidaccel.errors import UserError
from vidaccel.families.walk import as_latents, denoisers_of, passes_of_call
from vidaccel.models.calling import (
    call_arguments,
    check_image,
    guidance_in_force,
    latent_size,
    sampled_as,
    second_guidance,
    unknown_words,
)
from vidaccel.models.grid import Grid, on_grid
from vidaccel.models.loading import LoadedPipeline
from vidaccel.models.velocity import Text
from vidaccel.models.watched import watched_steps
from vidaccel.progress import Progress
from vidaccel.runtime.decode import decoding

log = logging.getLogger(__name__)

REFERENCE_PASSES = 100
"""Of the reference sampler: 50 steps, with and without the prompt."""

SMALL_PASS = 0.05
"""Seconds of a full pass below which what surrounds the passes weighs as much as they do."""

SCHEDULED_BY = ("full_steps", "every", "budget", "schedule")
"""Settings, and arguments of `attach`, that say which steps are full."""


@dataclass(frozen=True)
class Generated:
    """Videos made in one batch, and how they came about."""

    frames: np.ndarray
    """uint8 [B, T, H, W, 3]."""
    steps: int
    passes: int
    """Forward passes of the transformer as they happened, predicted ones included; a doubled batch is two."""
    predicted: int
    """Those of them in which a predictor stood in for its blocks."""
    pass_seconds: float
    """Median of a full pass."""
    guidance: float
    """CFG scale that was in force; 1 is none."""
    seconds: dict[str, float]
    """Wall-clock seconds of the stages `text`, `denoise` and `decode`."""
    latents: Tensor
    """Final ones, float32 [B, C, T, H, W], on the CPU."""
    guidance_2: float | None = None
    """CFG scale of the second of two transformers."""
    decoder: str | None = None
    """The distilled decoder that made the frames."""

    def summary(self) -> str:
        frames, height, width = self.frames.shape[1:4]
        seconds = f"denoising {self.seconds['denoise']:.1f} s"
        if self.predicted:
            reference = REFERENCE_PASSES * self.pass_seconds
            about = f"50 steps of two full passes take about {reference:.1f} s"
            seconds += f" ({about if self.seconds['denoise'] < reference else too_small(self.pass_seconds)})"
        by = f" by {self.decoder}" if self.decoder else ""
        return f"{frames} frames {width}x{height}; {self.how()}; {seconds}, decoding {self.seconds['decode']:.1f} s{by}"

    def how(self) -> str:
        """Steps, passes and guidance."""
        passes = f"{self.passes} passes"
        if self.predicted:
            passes = f"{self.passes - self.predicted} full + {self.predicted} predicted passes"
        second = "" if self.guidance_2 in (None, self.guidance) else f" and {self.guidance_2:g}"
        return f"{self.steps} steps, {passes}, guidance {self.guidance:g}{second}"


def too_small(pass_seconds: float) -> str:
    """Why predicted passes gain nothing."""
    if pass_seconds < SMALL_PASS:
        return f"too small to gain: the passes take {1000 * pass_seconds:.2g} ms"
    return f"no gain here: full passes take {pass_seconds:.2g} s, and the others as long"


def check_predictor(config: GenerateConfig) -> None:
    """`UserError` for what shows before a model is loaded: a predictor or a file of schedules that is not there, or
    full steps without anything to take the place of the others."""
    if config.predictor is not None:
        named_predictor(config.predictor)
        if config.schedule is not None:
            read_schedules(config.schedule)
        return
    for key in SCHEDULED_BY:
        if getattr(config, key) is not None:
            raise UserError(
                f"{key}={getattr(config, key)} without a predictor", "name one: predictor=reuse, or a folder"
            )


@contextmanager
def predicted_steps(loaded: LoadedPipeline, config: GenerateConfig) -> Iterator[Attachment | WholePass | None]:
    """The pipeline with the predictor that `config` names, for the time of a `with` block; as it is, if it names none.

    Raises:
        UserError: as `attach` and `check_predictor` do.
    """
    check_predictor(config)
    if config.predictor is None:
        yield None
        return
    steps = loaded.default("steps") if config.steps is None else config.steps
    which = {key: getattr(config, key) for key in SCHEDULED_BY}
    with (
        on_grid(loaded.pipe, config.shift, Grid.listed(config.timesteps, config.sigmas)),
        attach(loaded, predictor=config.predictor, steps=steps, **which, force=config.force) as attachment,
    ):
        yield attachment


def generate(
    loaded: LoadedPipeline,
    prompts: list[str],
    config: GenerateConfig,
    seeds: list[int],
    attachment: Attachment | WholePass | None = None,
    image: np.ndarray | None = None,
) -> Generated:
    """Run the pipeline on a batch of prompts, each from the noise of its own seed, and time its stages.

    `attachment` is what `predicted_steps` gave, for the count; `image` as of `run_pipeline`.

    Raises:
        UserError: settings the model cannot follow, or a result that is not finite.
    """
    steps = loaded.default("steps") if config.steps is None else config.steps
    scale, two_pass = guidance_in_force(loaded, config.guidance, config.two_pass)
    second = second_guidance(loaded, config.guidance, config.guidance_2, config.two_pass)
    passes = _Passes(loaded, steps * (1 + (two_pass and scale > 1)), attachment)
    frames, started, ended = run_pipeline(loaded, prompts, seeds, config, passes, image=image)
    if not np.isfinite(frames).all():
        raise UserError("the video is not finite", "try dtype=float32; if that fails too, the weights are broken")
    seconds = {"text": passes.first - started, "denoise": passes.last - passes.first, "decode": ended - passes.last}
    count, predicted, typical = len(passes.full) + passes.predicted, passes.predicted, float(np.median(passes.full))
    latents = final_latents(loaded, passes.latents, frames.shape[1:4])
    by = loaded.decoder and loaded.decoder.source
    return Generated(eight_bits(frames), steps, count, predicted, typical, scale, seconds, latents, second, by)


def run_pipeline(
    loaded: LoadedPipeline,
    prompts: Sequence[str],
    seeds: Sequence[int],
    config: GenerateConfig,
    watching: AbstractContextManager,
    output_type: str = "np",
    image: np.ndarray | None = None,
) -> tuple[np.ndarray | Tensor, float, float]:
    """The pipeline's own generation of a batch of prompts, each from the noise of its own seed.

    Args:
        loaded: the pipeline, with what is attached to it.
        prompts: B texts.
        seeds: of each prompt's noise, which a generator on the CPU draws.
        config: sampling settings and the video's size.
        watching: entered for the time of the call.
        output_type: "np" for frames [B, T, H, W, 3] from 0 to 1, "latent" for what the pipeline would decode.
        image: uint8 [H, W, 3] of the videos' size that all of them begin with, for a model that wants one.

    Returns:
        (videos, when the call began, when it had ended), times as `time.perf_counter` gives them.

    Raises:
        UserError: settings that the model cannot follow, or an image where it takes none, or none where it does.
    """
    check_image(loaded.family, image is not None)
    if len(prompts) > 1 and not loaded.family.batched:
        raise UserError(
            f"{len(prompts)} prompts at once, and the pipeline of {loaded.family.title} takes one",
            "give them one by one",
        )
    guidance = {"guidance": config.guidance, "two_pass": config.two_pass}
    size = {"num_frames": config.num_frames, "height": config.height, "width": config.width}
    more = {"negative_prompt": config.negative_prompt, "guidance_2": config.guidance_2}
    arguments = call_arguments(loaded, steps=config.steps, **more, **size, **guidance)
    given: dict[str, Any] = {"prompt": list(prompts), "generator": [torch.Generator().manual_seed(s) for s in seeds]}
    if "negative_prompt" in arguments:
        given["negative_prompt"] = [arguments.pop("negative_prompt")] * len(prompts)
    if not loaded.family.batched:
        given = {name: value for name, (value,) in given.items()}
    if image is not None:
        arguments["image"] = Image.fromarray(image)
    loaded.pipe.set_progress_bar_config(disable=True)
    decoded = nullcontext()
    if output_type != "latent":
        asked = {name: loaded.default(name) if value is None else value for name, value in size.items()}
        decoded = decoding(loaded, len(prompts), **asked)
    with decoded:
        started = time.perf_counter()
        with (
            sampled_as(loaded, **guidance, guidance_2=config.guidance_2, instantaneous=config.instantaneous),
            on_grid(loaded.pipe, config.shift, Grid.listed(config.timesteps, config.sigmas)),
            watching,
        ):
            made = loaded.pipe(output_type=output_type, **given, **arguments)
        return made.frames, started, time.perf_counter()


def final_latents(loaded: LoadedPipeline, left: Tensor, size: Sequence[int]) -> Tensor:
    """What the last step of a video of `size` (T, H, W) left, as latents [B, C, T, H, W], float32 on the CPU."""
    num_frames, height, width = size
    latent = latent_size(loaded, num_frames=num_frames, height=height, width=width)
    return as_latents(loaded.family, left, latent).float().cpu()


def eight_bits(frames: np.ndarray) -> np.ndarray:
    """Frames from 0 to 1 as uint8."""
    return (frames * 255).round().astype(np.uint8)


@torch.no_grad()
def sample(
    velocity: Callable[..., Tensor],
    x_1: Tensor,
    text: Text,
    grid: Tensor,
    g: Tensor | None = None,
    after_step: Callable[[int, Tensor, Tensor], None] | None = None,
) -> Tensor:
    """Latents x_0 from noise x_1, both [B, C, T, H, W], by one step of Euler's method between neighbours of the grid.

    Args:
        velocity: a `Velocity`, or what is called like one: with x, t, text, r, the time it goes down to, and g; a model
            without r ignores it.
        x_1: noise, in the model's dtype.
        text: embeddings of the prompts.
        grid: [steps + 1] times from 1 down to 0, float32, as `step_grid` gives them.
        g: [B] guidance scales, for a model that embeds them.
        after_step: told, after each step, its index, the latents it started from and their velocity.
    """
    x, grid = x_1, grid.to(x_1.device)
    for index, (t, r) in enumerate(zip(grid[:-1], grid[1:], strict=True)):
        u = velocity(x, t.expand(len(x)), text, r=r.expand(len(x)), g=g)
        x_r = (x.float() - (t - r) * u).to(u.dtype)  # the dtypes of the pipelines' scheduler
        if after_step:
            after_step(index, x, u)
        x = x_r
    return x


def warn_of_unknown_words(loaded: LoadedPipeline, prompt: str) -> None:
    """Name the words of the prompt that the model's tokenizer does not know."""
    if unknown := unknown_words(loaded.pipe, prompt):
        words = ", ".join(f'"{word}"' for word in unknown)
        log.warning(
            "the model does not know %s: %s taken as unknown", words, "it is" if len(unknown) == 1 else "they are"
        )


class _Passes:
    """Counts and times the denoisers' forward passes with hooks, keeps the last step's latents, and shows a bar."""

    latents: Tensor
    """After the step before, in the pipeline's own layout."""

    def __init__(self, loaded: LoadedPipeline, total: int, attachment: Attachment | WholePass | None):
        self._pipe, self._family, self._denoisers = loaded.pipe, loaded.family, denoisers_of(loaded.pipe, loaded.family)
        self._bar = Progress("denoising", total=total)
        self._attachment = attachment
        self.full: list[float] = []
        """Seconds of each full pass."""
        self.predicted, self.first, self.last = 0, 0.0, 0.0
        """Predicted passes; when the first pass began and the last one ended."""
        self._seen = attachment.predicted_passes if attachment else 0

    def __enter__(self) -> "_Passes":
        self._hooks = [m.register_forward_pre_hook(self._begin) for m in self._denoisers]
        self._hooks += [m.register_forward_hook(self._end) for m in self._denoisers]
        self._watching = watched_steps(self._pipe.scheduler, self._keep)
        self._watching.__enter__()
        self._bar.__enter__()
        return self

    def __exit__(self, *exc) -> None:
        self._bar.__exit__(*exc)
        self._watching.__exit__(None, None, None)
        for hook in self._hooks:
            hook.remove()

    def _keep(self, latents: Tensor) -> None:
        self.latents = latents

    def _begin(self, module, inputs) -> None:
        self._begun = time.perf_counter()
        self.first = self.first or self._begun

    def _end(self, module, inputs, output) -> None:
        if output[0].is_cuda:
            torch.cuda.synchronize()
        self.last = time.perf_counter()
        # The attachment's own hook on the end of a pass was there before this one.
        before, self._seen = self._seen, self._attachment.predicted_passes if self._attachment else 0
        passes = passes_of_call(self._pipe, self._family)
        if self._seen > before:
            self.predicted += passes
        else:
            self.full += [(self.last - self._begun) / passes] * passes
        self._bar.advance(passes)
