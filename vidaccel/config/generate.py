"""Settings of `vidaccel generate`."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from vidaccel.config.checks import DTYPES, expand_paths, require, require_scales, require_seed, settle_times
from vidaccel.config.parallel import ParallelConfig
from vidaccel.config.runtime import RuntimeConfig


@dataclass
class GenerateConfig(RuntimeConfig):
    """`vidaccel generate`. A key left null takes the model's own default."""

    model: str = "sprites/teacher"
    """A shipped model (sprites/teacher), a local folder (a diffusers pipeline or a student), or a hub id."""
    student: str | None = None
    """A file of weights that others have released, in the place of its transformer's."""
    lora: list[str] | None = None
    """LoRA files that are added to its transformer when it is loaded, each FILE or FILE:SCALE; of two transformers
    each names its own, transformer_2:FILE:SCALE. FILE:SCALE:partly leaves out what has no place in it."""
    decoder: str | None = None
    """The folder of a distilled decoder, in the place of the autoencoder's own; null is its own."""
    steps: int | None = None
    """Sampler steps."""
    shift: float | None = None
    """Shift s of the step grid, whose time k, from 1 for noise down to 0, becomes s k / (1 + (s - 1) k)."""
    timesteps: list[float] | None = None
    """Times of the grid in place of `steps` and `shift`, from 1000 (noise) down, such as [1000, 757, 522]."""
    sigmas: list[float] | None = None
    """The same from 1 down, such as [1, 0.94, 0.85, 0.63]."""
    guidance: float | None = None
    """Classifier-free guidance scale g."""
    guidance_2: float | None = None
    """That of the second of two transformers (Wan 2.2 A14B); null is that of `guidance` where this is said."""
    two_pass: bool | None = None
    """true: two forward passes a step; false: one, with g embedded; null: two unless the model embeds g."""
    negative_prompt: str | None = None
    """What guidance in two passes leads away from; a student has its own inside."""
    instantaneous: bool = False
    """true: a student of mean velocities is sampled as the model of instantaneous ones that it contains (r = t)."""
    predictor: str | None = None
    """What stands in for the transformer on the steps that are not full: the folder of a trained predictor, of fitted
    scalars or of searched schedules, a file of weights that others have released, sprites/predictor or sprites/scalars,
    or a forecaster's name (`reuse`, `taylor`); null runs every step in full."""
    full_steps: list[int] | None = None
    """Positions of the full steps, from 0."""
    every: int | None = None
    """n, in place of `full_steps`: steps 0, n, 2n, ... are full."""
    budget: int | None = None
    """Number of full steps, in place of either: the predictor's schedule says which."""
    schedule: str | None = None
    """A schedule.json to take them from; null is the predictor's own."""
    compare_to: str | None = None
    """With `--compare`: the model whose own full way the video is held against; null is that which a student was
    distilled from, else the model itself."""
    force: bool = False
    """true takes a predictor that was trained for another student."""
    num_frames: int | None = None
    """Frames of the video; null is the model's own."""
    height: int | None = None
    """Pixels of the video; null is the model's own."""
    width: int | None = None
    """Pixels of the video; null is the model's own."""
    seed: int = 0
    """Seed of the first prompt's noise; prompt i of a file gets seed + i."""
    dtype: str = "auto"
    """`auto` (float32 on a CPU, as stored on a GPU), `float32`, `bfloat16` or `float16`."""
    offload: str = "none"
    """Weights that wait on the CPU: `none`, `group` (each block of the transformer is on the GPU for its own call: a
    predicted step moves none), `model` (one model of the pipeline at a time) or `sequential` (one layer at a time)."""
    parallel: ParallelConfig = field(default_factory=ParallelConfig)

    def __post_init__(self) -> None:
        expand_paths(self)
        super().__post_init__()
        require(bool(self.model.strip()), "model", self.model, "must name a model")
        require_seed(self)
        require_scales(self)
        settle_times(self)
        for key in ("steps", "every", "budget"):
            value = getattr(self, key)
            require(value is None or value >= 1, key, value, "must be at least 1")
        require(self.shift is None or 0 < self.shift < math.inf, "shift", self.shift, "must be above 0 and finite")
        ways = ("none", "group", "model", "sequential")
        require(self.offload in ways, "offload", self.offload, f"is one of {', '.join(ways)}")
        dtypes = ("auto", *DTYPES)
        require(self.dtype in dtypes, "dtype", self.dtype, f"is one of {', '.join(dtypes)}")


def default_conf(given: Mapping[str, Any]) -> str:
    """The shipped configuration under settings that name none: the predictor of `default` belongs to its model."""
    return "teacher" if "model" in given else "default"


def withdrawn(given: Mapping[str, Any]) -> list[str]:
    """Settings that take back (by null) a configuration's way of saying which steps are full, where `given` says
    another."""
    if ("predictor" in given and given["predictor"] is None) or given.keys() & {"full_steps", "every"}:
        others = {"full_steps", "every", "budget", "schedule"}
    elif given.keys() & {"budget", "schedule"}:
        others = {"full_steps", "every"}
    else:
        others = set()
    return sorted(others - given.keys())
