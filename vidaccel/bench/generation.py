"""One generation of a row: the pipeline's own loop, with a clock at both ends of it and the latents it ended in.

B videos, C channels, T frames, H height, W width
"""

import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from vidaccel.config.benchmark import MethodConfig
from vidaccel.models.calling import call_arguments, set_guidance
from vidaccel.models.grid import shifted
from vidaccel.models.loading import LoadedPipeline

Size = tuple[int, int, int]
"""Frames, height and width of a video in pixels."""


@dataclass(frozen=True)
class TimedGeneration:
    """Videos of one batch."""

    frames: np.ndarray | None
    """uint8 [B, T, H, W, 3]; None where nothing was decoded."""
    latents: Tensor
    """Final ones, float32 [B, C, T, H, W], on the CPU."""
    denoise_seconds: float
    """From the first pass of the transformer to the end of the last step."""
    seconds: float
    """From prompts to frames, or to latents where nothing was decoded."""


def timed_generation(
    loaded: LoadedPipeline,
    method: MethodConfig,
    size: Size,
    prompts: Sequence[str],
    seeds: Sequence[int],
    guidance: float | None = None,
    decode: bool = True,
) -> TimedGeneration:
    """Run the pipeline as it is, caches and all, on prompts that each start from the noise of their own seed.

    Raises:
        FloatingPointError: the videos are not finite.
        UserError: settings that the model cannot follow.
    """
    scale = {"guidance": guidance if method.guidance is None else method.guidance, "two_pass": method.two_pass}
    arguments = call_arguments(
        loaded, steps=method.steps, **dict(zip(("num_frames", "height", "width"), size, strict=True)), **scale
    )
    if "negative_prompt" in arguments:
        arguments["negative_prompt"] = [arguments["negative_prompt"]] * len(prompts)
    set_guidance(loaded, **scale)
    if loaded.hook:
        loaded.hook.instantaneous = method.weights == "teacher"
    loaded.pipe.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    started = time.perf_counter()
    kind = "np" if decode else "latent"
    with shifted(loaded.pipe, method.shift), Clock(loaded) as clock:
        frames = loaded.pipe(list(prompts), generator=generators, output_type=kind, **arguments).frames
    seconds, latents = time.perf_counter() - started, clock.latents.float().cpu()
    if not latents.isfinite().all() or decode and not np.isfinite(frames).all():
        raise FloatingPointError("the video is not finite")
    made = (frames * 255).round().astype(np.uint8) if decode else None
    return TimedGeneration(made, latents, clock.last - clock.first, seconds)


class Clock:
    """When denoising began and ended, and what came out, in a `with` block around one generation."""

    first = 0.0

    def __init__(self, loaded: LoadedPipeline):
        self._pipe, self._stack = loaded.pipe, ExitStack()
        self._denoisers = [getattr(loaded.pipe, denoiser.attribute) for denoiser in loaded.family.denoisers]

    def __enter__(self) -> "Clock":
        for denoiser in self._denoisers:
            self._stack.callback(denoiser.register_forward_pre_hook(self._begin).remove)
        # The scheduler takes the last step of denoising, and no pipeline tells of it in the same way.
        scheduler, step = self._pipe.scheduler, self._pipe.scheduler.step

        def timed(*args: Any, **kwargs: Any) -> Any:
            result = step(*args, **kwargs)
            self.latents = result[0]
            if scheduler.step_index == len(scheduler.timesteps):
                self.last = self._now(result[0])
            return result

        scheduler.step = timed
        self._stack.callback(delattr, scheduler, "step")
        return self

    def __exit__(self, *error) -> None:
        self._stack.close()

    def _begin(self, module: nn.Module, inputs: tuple) -> None:
        self.first = self.first or self._now(next(module.parameters()))

    @staticmethod
    def _now(like: Tensor) -> float:
        if like.is_cuda:
            torch.cuda.synchronize(like.device)
        return time.perf_counter()
