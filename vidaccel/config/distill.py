"""Settings of `vidaccel distill`."""

import math
from dataclasses import dataclass, field, make_dataclass
from importlib import import_module
from types import ModuleType
from typing import Any, TypeVar

from vidaccel.config.checks import changed, expand_paths, require, require_clip_size, require_seed, require_sizes
from vidaccel.config.training import TrainConfig
from vidaccel.errors import UserError

Settings = TypeVar("Settings")


def with_method_groups(config: type[Settings]) -> type[Settings]:
    """`config` with a group of settings for every registered method that has some, under the method's name.

    Methods lie in a layer below: their table and their settings are imported by name.
    """
    groups = [(name, own, field(default_factory=own)) for name, own in _methods().method_settings().items()]
    named = {"__doc__": config.__doc__, "__module__": config.__module__}
    return make_dataclass(config.__name__, groups, bases=(config,), namespace=named)


def _methods() -> ModuleType:
    return import_module("vidaccel.train.methods")


@with_method_groups
@dataclass
class DistillConfig:
    """`vidaccel distill`. Each method's own settings are a group of its name. What means nothing to the method that is
    chosen is refused."""

    method: str = "cfg"
    """`cfg` (two-pass guidance into one pass), `mean_velocity` (few steps) or `decoder` (a narrower decoder)."""
    teacher: str = "sprites/teacher"
    """The model to distil: shipped, a local folder, or a hub id."""
    lora: list[str] | None = None
    """LoRA files that are added to its transformer when it is loaded, each FILE or FILE:SCALE: the student starts as
    that model, and has them in its weights."""
    denoiser: str | None = None
    """Which of two transformers is distilled (Wan 2.2 A14B): `transformer`, then, from the folder that this made,
    `transformer_2`; null where there is one."""
    start: str | None = None
    """A student of this teacher by this method (of `decoder` a decoder's folder), whose weights are trained further;
    null starts from the teacher's."""
    features: str | None = None
    """A folder of encoded clips from `vidaccel collect-features` (of `decoder` of trajectories too, whose last latents
    are taken); null encodes while training."""
    on_damage: str = "stop"
    """At a damaged shard of it: `stop`, or `skip` to go on without."""
    data: str | None = None
    """Without `features`, a folder of videos with captions.jsonl; null renders the sprites world."""
    clips: int = 4000
    """Scenes of the sprites world, where neither of those is given."""
    bank: str = "auto"
    """Encoded clips in the device's memory: `on`, `off`, or `auto`, which is on where it is a CUDA device and they take
    less than a quarter of what is free, and on a CPU where some are kept out for gates."""
    num_frames: int | None = None
    """Frames of clips that are encoded while training; null is the model's own. Features have their size."""
    height: int | None = None
    """Pixels of such clips; null is the model's own."""
    width: int | None = None
    """Pixels of such clips; null is the model's own."""
    sizes: list[list[int]] | None = None
    """[frames, height, width] of several sizes of the clips in `data`, in place of those three: as of collect-features.
    Batches are of one size each."""
    fps: float | None = None
    """Frames a second that such clips are brought to; null is the model's own."""
    seed: int = 0
    """Of the order of the data, noise, times and scales."""
    guidance_range: list[float] | None = None
    """[low, high] of the scales g that the student learns, drawn uniformly; null is what a teacher with its guidance
    distilled learnt, else 1 to 8, or to the scale that the student is called with where that is larger."""
    times: str = "logit_normal"
    """Distribution of t before it is moved towards noise: `uniform` or `logit_normal`."""
    train_shift: float | None = None
    """By how much it is: s t / (1 + (s - 1) t). Null is the step grid's shift for `logit_normal`, 1 for `uniform`."""
    sample_steps: int = 50
    """Sampler steps that the student is made for: what it is saved, sampled and shown with."""
    guidance: float | None = None
    """Scale it is sampled with unless told; null is that of the features, else the teacher's."""
    negative_prompt: str | None = None
    """What the teacher's guidance in two passes leads away from; null is that of the features, else the teacher's."""
    shift: float | None = None
    """Shift of its step grid; null is the teacher's."""
    embedding_rate: float = 1.0
    """Learning rate of the embeddings of r and g over that of everything else."""
    gate_samples: int | None = None
    """Clips that are kept out of the training and that its gates are computed on; 0 computes none, null is 512 on CUDA,
    64 of a model of more than a billion parameters, none on a CPU, where they take longer than most trainings, and none
    for one of two transformers."""
    gate_runs: int | None = None
    """Of them, those that the mean-velocity gap is taken on, which costs 350 passes each; null is all of them, and none
    of a model of more than a billion parameters."""
    prompts: list[str] = field(default_factory=list)
    """Captions of the sample sheets; empty takes four from the data."""
    merge_lora: bool = True
    """With adapters: save them merged into the weights, or apart in lora/."""
    train: TrainConfig = field(default_factory=TrainConfig)

    def __post_init__(self) -> None:
        expand_paths(self)
        methods = _methods().METHODS
        require(self.method in methods, "method", self.method, f"is {' or '.join(methods)}")
        require(self.bank in ("auto", "on", "off"), "bank", self.bank, "is auto, on or off")
        rate = self.embedding_rate
        require(0 < rate < math.inf, "embedding_rate", rate, "must be above 0 and finite")
        for key in ("gate_samples", "gate_runs"):
            value = getattr(self, key)
            require(value is None or value >= 0, key, value, "must be at least 0, or null")
        require(self.on_damage in ("stop", "skip"), "on_damage", self.on_damage, "is stop or skip")
        require(self.times in ("uniform", "logit_normal"), "times", self.times, "is uniform or logit_normal")
        for key in ("clips", "sample_steps"):
            require(getattr(self, key) >= 1, key, getattr(self, key), "must be at least 1")
        require_clip_size(self)
        require_seed(self)
        require_sizes(self, self.data is not None and self.features is None, "data=, without features")
        low_high = self.guidance_range
        fits = low_high is None or (len(low_high) == 2 and 1 <= low_high[0] <= low_high[1] < math.inf)
        require(fits, "guidance_range", low_high, "is [low, high] with 1 <= low <= high, or null")
        g = self.guidance
        require(g is None or 1 <= g < math.inf, "guidance", g, "is a number from 1 up, or null")
        for key in ("shift", "train_shift"):
            value = getattr(self, key)
            require(value is None or 0 < value < math.inf, key, value, "must be above 0 and finite")
        for key, value in changed(self):
            if (why := _methods().why_unread(self.method, key)) is not None:
                raise UserError(
                    f"{key}={value} means nothing to method={self.method}: {why}",
                    "leave it out; if it comes from a configuration, take one of this method (--conf)",
                )

    @property
    def own_settings(self) -> Any:
        """The chosen method's group; None for a method without settings of its own."""
        return getattr(self, self.method) if self.method in _methods().method_settings() else None
