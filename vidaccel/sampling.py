"""One prompt through a diffusers pipeline, unchanged, with what happened on the way counted and timed.

T frames, H height, W width
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
    """A video and how it came about."""

    frames: np.ndarray
    """uint8 [T, H, W, 3]."""
    steps: int
    passes: int
    """Forward passes of the transformer as they happened."""
    guidance: float
    """CFG scale that was in force; 1 is none."""
    seconds: dict[str, float]
    """Wall-clock seconds of the stages `text`, `denoise` and `decode`."""

    def summary(self) -> str:
        frames, height, width = self.frames.shape[:3]
        return (
            f"{frames} frames {width}x{height}; {self.steps} steps, {self.passes} passes, guidance {self.guidance:g}; "
            f"denoising {self.seconds['denoise']:.1f} s, decoding {self.seconds['decode']:.1f} s"
        )


def generate_video(loaded: LoadedPipeline, prompt: str, config: GenerateConfig, *, seed: int) -> Generated:
    """Run the pipeline on one prompt, from noise drawn on the CPU by a generator seeded with `seed`.

    Raises:
        UserError: settings the model cannot follow, or a result that is not finite.
    """
    guidance = {"guidance": config.guidance, "two_pass": config.two_pass}
    size = {"num_frames": config.num_frames, "height": config.height, "width": config.width}
    arguments = call_arguments(loaded, steps=config.steps, **size, **guidance)
    set_guidance(loaded, **guidance)
    loaded.pipe.set_progress_bar_config(disable=True)
    steps, (scale, two_pass) = arguments["num_inference_steps"], guidance_in_force(loaded, **guidance)
    generator = torch.Generator().manual_seed(seed)
    started = time.perf_counter()
    with _Passes(loaded, total=steps * (1 + (two_pass and scale > 1))) as passes:
        frames = loaded.pipe(prompt, generator=generator, output_type="np", **arguments).frames[0]
    ended = time.perf_counter()
    if not np.isfinite(frames).all():
        raise UserError(
            f"the video for {prompt!r} is not finite", "try dtype=float32; if that fails too, the weights are broken"
        )
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
