"""Prompts through a diffusers pipeline, unchanged, with what happened on the way counted and timed.

B videos, T frames, H height, W width
"""

import logging
import time
from dataclasses import dataclass

import numpy as np
import torch

from vidaccel.config import GenerateConfig
from vidaccel.errors import UserError
from vidaccel.models.call import call_arguments, guidance_in_force, set_guidance, unknown_words
from vidaccel.models.loading import LoadedPipeline
from vidaccel.progress import Progress

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Generated:
    """Videos made in one batch, and how they came about."""

    frames: np.ndarray
    """uint8 [B, T, H, W, 3]."""
    steps: int
    passes: int
    """Forward passes of the transformer as they happened."""
    guidance: float
    """CFG scale that was in force; 1 is none."""
    seconds: dict[str, float]
    """Wall-clock seconds of the stages `text`, `denoise` and `decode`."""

    def summary(self) -> str:
        frames, height, width = self.frames.shape[1:4]
        return (
            f"{frames} frames {width}x{height}; {self.steps} steps, {self.passes} passes, guidance {self.guidance:g}; "
            f"denoising {self.seconds['denoise']:.1f} s, decoding {self.seconds['decode']:.1f} s"
        )


def generate(loaded: LoadedPipeline, prompts: list[str], config: GenerateConfig, seeds: list[int]) -> Generated:
    """Run the pipeline on a batch of prompts, each from noise drawn on the CPU by a generator with its own seed.

    Raises:
        UserError: settings the model cannot follow, or a result that is not finite.
    """
    guidance = {"guidance": config.guidance, "two_pass": config.two_pass}
    size = {"num_frames": config.num_frames, "height": config.height, "width": config.width}
    arguments = call_arguments(loaded, steps=config.steps, **size, **guidance)
    if "negative_prompt" in arguments:
        arguments["negative_prompt"] = [arguments["negative_prompt"]] * len(prompts)
    set_guidance(loaded, **guidance)
    loaded.pipe.set_progress_bar_config(disable=True)
    steps, (scale, two_pass) = arguments["num_inference_steps"], guidance_in_force(loaded, **guidance)
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    started = time.perf_counter()
    with _Passes(loaded, total=steps * (1 + (two_pass and scale > 1))) as passes:
        frames = loaded.pipe(prompts, generator=generators, output_type="np", **arguments).frames
    ended = time.perf_counter()
    if not np.isfinite(frames).all():
        raise UserError("the video is not finite", "try dtype=float32; if that fails too, the weights are broken")
    seconds = {"text": passes.first - started, "denoise": passes.last - passes.first, "decode": ended - passes.last}
    return Generated((frames * 255).round().astype(np.uint8), steps, passes.count, scale, seconds)


def warn_of_unknown_words(loaded: LoadedPipeline, prompt: str) -> None:
    """Name the words of the prompt that the model's tokenizer does not know."""
    if unknown := unknown_words(loaded.pipe, prompt):
        words = ", ".join(f'"{word}"' for word in unknown)
        log.warning(
            "the model does not know %s: %s taken as unknown", words, "it is" if len(unknown) == 1 else "they are"
        )


class _Passes:
    """Counts the denoisers' forward passes with hooks, notes when the first began and the last ended, shows a bar."""

    def __init__(self, loaded: LoadedPipeline, total: int):
        self._modules = [getattr(loaded.pipe, d.attribute) for d in loaded.family.denoisers]
        self._bar = Progress("denoising", total=total)
        self.count, self.first, self.last = 0, 0.0, 0.0

    def __enter__(self) -> "_Passes":
        self._hooks = [m.register_forward_pre_hook(self._begin) for m in self._modules]
        self._hooks += [m.register_forward_hook(self._end) for m in self._modules]
        self._bar.__enter__()
        return self

    def __exit__(self, *exc) -> None:
        self._bar.__exit__(*exc)
        for hook in self._hooks:
            hook.remove()

    def _begin(self, module, inputs) -> None:
        self.first = self.first or time.perf_counter()

    def _end(self, module, inputs, output) -> None:
        if output[0].is_cuda:
            torch.cuda.synchronize()
        self.count, self.last = self.count + 1, time.perf_counter()
        self._bar.advance()
