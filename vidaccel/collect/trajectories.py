"""Runs of a model's own sampling, stored step by step: what a predictor of its trunk learns from.

Sample i is one run of our loop on the i-th caption: the latents that each step started from, their velocity, and the
times, from which the latent at the end follows. The trunk's tokens are stored only when asked for.

B runs, S steps, C channels, T frames, H and W latent pixels, N video and L text tokens, D width
"""

from collections.abc import Sequence
from contextlib import nullcontext

import numpy as np
import torch
from torch import Tensor

from vidaccel.cache.checks import check_pipeline
from vidaccel.cache.trunk import Trunk
from vidaccel.collect.encode import encode_prompts, encode_texts, rows, stored_images, text_settings
from vidaccel.collect.job import Job
from vidaccel.collect.source import ClipSource, images_of, size_of
from vidaccel.config.collect import CollectConfig
from vidaccel.data.shards import Sample
from vidaccel.errors import UserError
from vidaccel.families.walk import boundaries_of, denoisers_of, latent_channels
from vidaccel.models.calling import guidance_in_force, latent_size, require_whole, second_guidance, unwanted
from vidaccel.models.grid import Grid, denoiser_at, own_grid, require_trainable
from vidaccel.models.loading import LoadedPipeline
from vidaccel.models.velocity import guided_velocity, velocity_of
from vidaccel.models.weight_hashes import student_hash
from vidaccel.sampling import sample

CACHES = {"hidden_states": "cache", "encoder_hidden_states": "cache_text"}
"""Stored names of the tokens that leave the trunk."""


class TrajectorySampler:
    """A model, the grid and guidance it is sampled with, and the size of what it makes."""

    def __init__(self, loaded: LoadedPipeline, config: CollectConfig):
        require_trainable(loaded.family, "our sampling loop")
        require_whole(loaded)
        transformer = denoisers_of(loaded.pipe, loaded.family)[0]
        self.loaded, self.config, self.transformer = loaded, config, transformer
        self.device = next(transformer.parameters()).device
        self.velocity = velocity_of(loaded)
        embeds = self.velocity.embeds("g")
        self.guidance, two_pass = guidance_in_force(loaded, config.guidance, False if embeds else None)
        self.negative_prompt = unwanted(loaded) if config.negative_prompt is None else config.negative_prompt
        self.empty = encode_texts(loaded, [self.negative_prompt]) if two_pass and self.guidance > 1 else None
        second = second_guidance(loaded, config.guidance, config.guidance_2, two_pass)
        self.second = second if self.empty or embeds else None
        """Scale of guidance of the second of two transformers."""
        self.boundaries = boundaries_of(loaded.pipe, loaded.family)
        self.g = self.guidance if embeds or self.empty else None
        if config.cache and self.boundaries:
            count = 1 + len(self.boundaries)
            raise UserError(
                f"cache=true is for one transformer, and {loaded.family.title} denoises with {count}", "leave it out"
            )
        if config.cache and self.empty:
            raise UserError(
                "cache=true is for a model that makes one pass a step, and this one makes two",
                "collect from a CFG-distilled student, or set guidance=1 or cache=false",
            )
        self.size = size_of(loaded, config)
        self.steps = loaded.default("steps") if config.steps is None else config.steps
        check_pipeline(loaded.pipe, loaded.family)
        listed = Grid.listed(config.timesteps, config.sigmas)
        own = Grid.shifted(self.steps, config.shift) if config.shift else None
        self.grid = listed or own or own_grid(loaded.pipe.scheduler, loaded.family, self.steps)
        self.shift = self.grid.shift

    def __call__(
        self, captions: Sequence[str], seeds: list[int], images: Sequence[np.ndarray] | None = None
    ) -> dict[str, Tensor]:
        """x and velocity [B, S, C, T, H, W], text tensors and conditions [B, ...]; if wanted, `cache` [B, S, N, D] and,
        where the blocks give out text as well, `cache_text` [B, S, L, D]. `images` as of `encode_prompts`."""
        text = encode_prompts(self.loaded, captions, images, self.size["num_frames"])
        g = None if self.g is None else torch.full([len(seeds)], self.g, device=self.transformer.device)
        trunk = Trunk(self.transformer, self.loaded.family)
        kept: dict[str, list[Tensor]] = {}

        def keep(index: int, x: Tensor, u: Tensor) -> None:
            tokens = trunk.memory()[0].tokens if self.config.cache else {}
            for name, tensor in ({"x": x, "velocity": u} | {CACHES[n]: t for n, t in tokens.items()}).items():
                kept.setdefault(name, []).append(tensor.cpu())

        with trunk if self.config.cache else nullcontext(), trunk.full():
            sample(self.guided, self.noise(seeds), text, self.grid.tensor, g, keep)
        return {name: torch.stack(tensors, dim=1) for name, tensors in kept.items()} | text

    def noise(self, seeds: list[int]) -> Tensor:
        """[B, C, T, H, W], as the pipeline draws it for generators of these seeds."""
        shape = (1, latent_channels(self.transformer), *latent_size(self.loaded, **self.size))
        drawn = [torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
        return torch.cat(drawn).to(self.transformer.device, self.transformer.dtype)

    def guided(self, x: Tensor, t: Tensor, text: dict[str, Tensor], r: Tensor, g: Tensor | None) -> Tensor:
        """The velocity that a step takes, as `sample` calls for it."""
        if self.second is not None and g is not None and denoiser_at(t[0], self.boundaries):
            g = torch.full_like(g, self.second)
        if self.empty:
            # Scales in float32 make the sum float32, which a model in bfloat16 does not take at the next step.
            return guided_velocity(self.velocity, x, t, text, self.empty, g).to(x.dtype)
        return self.velocity(x, t, text, r=r, g=g)


def trajectory_job(loaded: LoadedPipeline, source: ClipSource, config: CollectConfig) -> Job:
    """Runs on the captions of these clips."""
    sampler = TrajectorySampler(loaded, config)
    sampled = {
        "guidance": sampler.guidance,
        "steps": sampler.steps,
        "shift": sampler.shift,
        "student": student_hash(loaded),
    }
    if sampler.boundaries:
        sampled |= {"guidance_2": sampler.second, "boundary": sampler.boundaries[0]}

    def compute(indices: list[int]) -> list[Sample]:
        captions, seeds = [source.record(i)["caption"] for i in indices], [config.seed + i for i in indices]
        records = [{"caption": c, "seed": seed} | sampled for c, seed in zip(captions, seeds, strict=True)]
        images = images_of(source, indices, loaded.family)
        tensors = sampler(captions, seeds, images) | stored_images(images)
        samples = rows(loaded, tensors, records, config.store)
        return [({"times": sampler.grid.tensor} | tensors, record) for tensors, record in samples]

    settings = {
        "store": config.store,
        "dtype": str(sampler.transformer.dtype),
        "cache": config.cache,
        "seed": config.seed,
    }
    if config.timesteps or config.sigmas:  # other grids follow from the student, `steps` and `shift`
        settings["times"] = sampler.grid.times
    if sampler.empty and sampler.negative_prompt:
        settings["negative_prompt"] = sampler.negative_prompt
    settings |= sampled | sampler.size | {"text": text_settings(loaded)} | source.fingerprint
    return Job(loaded, config, len(source), compute, dict(loaded.hashes), settings)
