"""One generation of a row: the pipeline's own loop, with a clock at both ends of it and the latents it ended in.

B videos, C channels, T frames, H height, W width
"""

import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from torch import Tensor, nn

from vidaccel.config.benchmark import BenchmarkConfig, MethodConfig
from vidaccel.config.generate import GenerateConfig
from vidaccel.data.video import write_video
from vidaccel.errors import UserError
from vidaccel.families.walk import denoisers_of
from vidaccel.models.loading import LoadedPipeline
from vidaccel.models.watched import watched_steps
from vidaccel.sampling import eight_bits, final_latents, run_pipeline

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
    text_seconds: float = 0.0
    """From prompts to the first pass of the transformer: text encoders and noise."""

    @property
    def decode_seconds(self) -> float:
        return self.seconds - self.text_seconds - self.denoise_seconds


def timed_generation(
    loaded: LoadedPipeline,
    method: MethodConfig,
    size: Size,
    prompts: Sequence[str],
    seeds: Sequence[int],
    shared: BenchmarkConfig | None = None,
    decode: bool = True,
    image: np.ndarray | None = None,
) -> TimedGeneration:
    """Run the pipeline as it is, caches and all, on prompts that each start from the noise of their own seed.

    Args:
        shared: what says guidance where the row does not.
        decode: whether latents are decoded.
        image: uint8 [H, W, 3] of the videos' size that all begin with, where the model begins with one.

    Raises:
        FloatingPointError: the videos are not finite.
        UserError: settings that the model cannot follow.
    """
    config = sampling_of(method, size, shared or BenchmarkConfig())
    clock = Clock(loaded)
    how = "np" if decode else "latent"
    videos, started, ended = run_pipeline(loaded, prompts, seeds, config, clock, how, image)
    latents = final_latents(loaded, clock.latents, size)
    if not latents.isfinite().all() or decode and not np.isfinite(videos).all():
        raise FloatingPointError("the video is not finite")
    made = eight_bits(videos) if decode else None
    return TimedGeneration(made, latents, clock.last - clock.first, ended - started, clock.first - started)


def sampling_of(method: MethodConfig, size: Size, shared: BenchmarkConfig) -> GenerateConfig:
    """How a row's videos of that size are sampled."""
    frames, height, width = size
    second = shared.guidance_2 if method.guidance is None else None
    return GenerateConfig(
        steps=method.steps,
        shift=method.shift,
        timesteps=method.timesteps,
        sigmas=method.sigmas,
        guidance=shared.guidance if method.guidance is None else method.guidance,
        guidance_2=second if method.guidance_2 is None else method.guidance_2,
        two_pass=method.two_pass,
        negative_prompt=shared.negative_prompt if method.two_pass else None,
        instantaneous=method.weights == "teacher" and not method.as_called,
        num_frames=frames,
        height=height,
        width=width,
    )


def writing_seconds(frames: np.ndarray, fps: float) -> float | None:
    """What it takes to write a video uint8 [T, H, W, 3] as an mp4; None without ffmpeg or of an odd size."""
    with TemporaryDirectory() as folder:
        started = time.perf_counter()
        try:
            write_video(frames, Path(folder) / "video.mp4", fps)
        except (ImportError, UserError):
            return None
        return time.perf_counter() - started


@torch.no_grad()
def reconstructed(loaded: LoadedPipeline, frames: np.ndarray) -> np.ndarray:
    """A video uint8 [T, H, W, 3] once through the model's autoencoder, which no sampler of it can do better than."""
    vae = loaded.pipe.vae
    weight = next(vae.parameters())
    video = torch.from_numpy(frames).movedim(-1, 0)[None].to(weight.device, weight.dtype) / 127.5 - 1
    decoded = vae(video).sample[0].movedim(0, -1).float().cpu().numpy()
    return eight_bits(((decoded + 1) / 2).clip(0, 1))


class Clock:
    """When denoising began and ended, and what came out, in a `with` block around one generation."""

    first = 0.0
    _taken = 0

    def __init__(self, loaded: LoadedPipeline):
        self._pipe, self._stack = loaded.pipe, ExitStack()
        self._denoisers = denoisers_of(loaded.pipe, loaded.family)

    def __enter__(self) -> "Clock":
        for denoiser in self._denoisers:
            self._stack.callback(denoiser.register_forward_pre_hook(self._begin).remove)
        self._scheduler = self._pipe.scheduler
        self._stack.enter_context(watched_steps(self._scheduler, self._stepped))
        return self

    def __exit__(self, *error) -> None:
        self._stack.close()

    def _stepped(self, latents: Tensor) -> None:
        """The scheduler takes the last step of denoising, and no pipeline tells of it in the same way."""
        self.latents = latents
        self._taken += 1
        if self._taken == len(self._scheduler.timesteps):
            self.last = self._now(latents)

    def _begin(self, module: nn.Module, inputs: tuple) -> None:
        self.first = self.first or self._now(next(module.parameters()))

    @staticmethod
    def _now(like: Tensor) -> float:
        if like.is_cuda:
            torch.cuda.synchronize(like.device)
        return time.perf_counter()
