"""A fast way to a video held against the model's own full way, from the same noise: how much faster, at what cost.

The full way is the model as it is: its own steps, every one of them full, on stock kernels. A student's is that of the
model which it was distilled from, guided as the student is and away from the same prompt.
"""

from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np

from vidaccel.config.generate import GenerateConfig
from vidaccel.config.runtime import RuntimeConfig
from vidaccel.data.video import side_by_side
from vidaccel.errors import UserError
from vidaccel.models.calling import guidance_in_force, unwanted
from vidaccel.models.files import read_model
from vidaccel.models.lineage import lora_of_root, teachers
from vidaccel.models.loading import LoadedPipeline
from vidaccel.sampling import SCHEDULED_BY, Generated, too_small

HINT = "name the model that it stands in for: compare_to=MODEL"


def full_way(config: GenerateConfig) -> GenerateConfig:
    """The settings of the model's own full way, but for what `as_fast` adds.

    Raises:
        UserError: nothing in `config` makes it faster, the model that its student stands in for is not to be found, or
            is of another family.
    """
    stock = {field.name: field.default for field in fields(RuntimeConfig)}
    plain = replace(
        config, **stock, **dict.fromkeys(SCHEDULED_BY), predictor=None, decoder=None, force=False, compare_to=None
    )
    came_from = [config.compare_to] if config.compare_to else teachers(config.model, HINT)
    lora = None if config.compare_to else lora_of_root(config.model, came_from)
    if config.student and not came_from:  # released weights are of the model whose place they take
        came_from = [config.model]
    if came_from:
        _check_family(config.model, came_from[-1])
        return replace(
            plain,
            model=came_from[-1],
            lora=lora,
            student=None,
            **dict.fromkeys(("steps", "shift", "timesteps", "sigmas", "two_pass", "negative_prompt")),
            instantaneous=False,
        )
    if plain == config:
        raise UserError(
            "there is nothing to compare: this is the model's own full way",
            "give a faster one (predictor=taylor every=3, a student, kernels=fused), or compare_to=MODEL",
        )
    return plain


def as_fast(full: GenerateConfig, config: GenerateConfig, loaded: LoadedPipeline, made: Generated) -> GenerateConfig:
    """`full` guided as the video was that the fast way made, of its size, away from the same prompt."""
    frames, height, width = made.frames.shape[1:4]
    scales = {"guidance": made.guidance, "guidance_2": made.guidance_2}
    alike: dict[str, Any] = {**scales, "num_frames": frames, "height": height, "width": width}
    if (full.model, full.student) != (config.model, config.student) and made.guidance != 1:
        _, two_pass = guidance_in_force(loaded, config.guidance, config.two_pass)
        alike["negative_prompt"] = (config.negative_prompt if two_pass else None) or unwanted(loaded) or None
    return replace(full, **alike)


@dataclass(frozen=True)
class Compared:
    """One video made in both ways."""

    fast: Generated
    full: Generated

    @property
    def speedup(self) -> dict[str, float]:
        """Of denoising, and from prompt to frames."""
        both = self.full.seconds, self.fast.seconds
        slow, quick = (sum(seconds.values()) for seconds in both)
        return {"denoising": both[0]["denoise"] / both[1]["denoise"], "end_to_end": slow / quick}

    @property
    def latent_error(self) -> float:
        """|fast - full| / |full| of the final latents."""
        return float((self.fast.latents - self.full.latents).norm() / self.full.latents.norm())

    def frames(self) -> np.ndarray:
        """uint8 [T, H, W, 3]: the fast way's video left, the full way's right."""
        gain = f"{self.speedup['denoising']:.2f}x"
        labels = [f"{gain}, {self.fast.seconds['denoise']:.1f} s", f"full, {self.full.seconds['denoise']:.1f} s"]
        return side_by_side([self.fast.frames[0], self.full.frames[0]], labels)

    def summary(self) -> str:
        """How much faster, and what it costs."""
        gains, slow, quick = self.speedup, self.full.seconds, self.fast.seconds
        why = f" ({too_small(self.fast.pass_seconds)})" if gains["denoising"] <= 1 else ""
        return (
            f"{gains['denoising']:.2f}x in denoising ({quick['denoise']:.2f} s for {slow['denoise']:.2f} s){why}, "
            f"{gains['end_to_end']:.2f}x end to end ({sum(quick.values()):.2f} s for {sum(slow.values()):.2f} s); "
            f"latent error {self.latent_error:.3f} (0 is identical)"
        )


def _check_family(model: str, other: str) -> None:
    names = [read_model(each).contents.family for each in (model, other)]
    if names[0].name != names[1].name:
        raise UserError(f"{other} is a {names[1].title}, and {model} a {names[0].title}", HINT)
