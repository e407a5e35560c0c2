"""Every setting a user meets: dataclasses that validate themselves once, filled by Hydra from `conf/`.

`load` composes conf/<command>/<name>.yaml (or the YAML at a path) with `key=value` overrides and returns the dataclass.
A key that does not exist names its nearest neighbour; a value of the wrong type or out of range says what it may be.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from vidaccel.errors import UserError, nearest

Schema = TypeVar("Schema")


def _require(holds: bool, key: str, value: Any, rule: str) -> None:
    if not holds:
        raise UserError(f"{key}={value!r} is not possible", f"{key} {rule}")


@dataclass
class TrainConfig:
    """What every training run has (train/loop.py)."""

    steps: int = 1000
    """Optimiser steps in all; 0 leaves the weights as they are."""
    batch_size: int = 8
    """Samples in one forward pass."""
    accumulate: int = 1
    """Forward passes whose gradients are averaged into one optimiser step."""
    optimizer: str = "adamw"
    """`adamw`, or `muon`: Muon for the matrices of the blocks, AdamW for the rest. PyTorch 2.9."""
    learning_rate: float = 1e-3
    """AdamW's; Muon's is five times that."""
    warmup: int = 50
    """Steps over which the rate rises linearly from zero."""
    schedule: str = "cosine"
    """`cosine` (down to zero at the last step) or `constant`."""
    weight_decay: float = 0.0
    clip_norm: float = 1.0
    """Gradients are scaled down to this global norm."""
    ema_decay: float = 0.999
    """Decay per step of the averaged weights, which are the ones that get saved as the result."""
    precision: str = "float32"
    """`float32` or `bfloat16` (autocast; weights stay float32)."""
    checkpointing: bool = False
    """Activations are computed again in the backward pass instead of kept: less memory, more time."""
    lora_rank: int = 0
    """Rank of low-rank adapters that are trained in place of the full weights; 0 trains the weights."""
    save_every: int = 200
    """Steps between checkpoints."""
    log_every: int = 10
    """Steps between lines of metrics.jsonl."""
    evaluate_every: int = 1000
    """Steps between evaluations of the averaged weights, where a training has one; the best checkpoint is kept."""
    sample_every: int = 1000
    """Steps between sample sheets of the averaged weights, where a training makes them."""
    trackers: list[str] = field(default_factory=list)
    """Where metrics go besides metrics.jsonl: names of trackers that accelerate knows, such as tensorboard or wandb."""

    def __post_init__(self) -> None:
        for key in ("batch_size", "accumulate", "save_every", "log_every", "evaluate_every", "sample_every"):
            _require(getattr(self, key) >= 1, key, getattr(self, key), "must be at least 1")
        for key in ("steps", "warmup", "lora_rank"):
            _require(getattr(self, key) >= 0, key, getattr(self, key), "must be at least 0")
        _require(0 < self.learning_rate < math.inf, "learning_rate", self.learning_rate, "must be above 0 and finite")
        _require(0 <= self.weight_decay < math.inf, "weight_decay", self.weight_decay, "must be at least 0 and finite")
        _require(self.clip_norm > 0, "clip_norm", self.clip_norm, "must be above 0")
        _require(0 <= self.ema_decay < 1, "ema_decay", self.ema_decay, "must be in [0, 1)")
        _require(self.optimizer in ("adamw", "muon"), "optimizer", self.optimizer, "is adamw or muon")
        _require(self.schedule in ("cosine", "constant"), "schedule", self.schedule, "is cosine or constant")
        _require(self.precision in PRECISIONS, "precision", self.precision, f"is one of {', '.join(PRECISIONS)}")


PRECISIONS = ("float32", "bfloat16")


@dataclass
class RuntimeConfig:
    """How the model is run, in every command that runs one (models/runtime.py). By default it is the stock one."""

    kernels: str = "reference"
    """Norms, modulation and rotary embedding of the blocks: `reference` (as diffusers writes them), `fused` (Triton) or
    `auto` (fused on a CUDA device)."""
    attention: str = "native"
    """diffusers' attention backend: `native`, `flash`, `sage`, `flash_hub`, ..."""
    trim_text: bool = False
    """Cut text padding off and drop its mask where a batch allows, which lets flash attention run; changes rounding."""
    quantize: str = "none"
    """Linear layers of the transformer's blocks: `none`, `int8` or `fp8` (weights and activations)."""
    compile: bool = False
    """torch.compile each transformer block, with CUDA graphs on a CUDA device."""

    def __post_init__(self) -> None:
        kernels, quantize = ("reference", "fused", "auto"), ("none", "int8", "fp8")
        _require(self.kernels in kernels, "kernels", self.kernels, f"is one of {', '.join(kernels)}")
        _require(self.quantize in quantize, "quantize", self.quantize, f"is one of {', '.join(quantize)}")


@dataclass
class GenerateConfig(RuntimeConfig):
    """`vidaccel generate`. A key left null takes the model's own default."""

    model: str = "sprites/teacher"
    """A shipped model (sprites/teacher), a local folder (a diffusers pipeline or a student), or a hub id."""
    steps: int | None = None
    """Sampler steps."""
    shift: float | None = None
    """Shift s of the step grid, whose time k, from 1 for noise down to 0, becomes s k / (1 + (s - 1) k)."""
    guidance: float | None = None
    """Classifier-free guidance scale g."""
    two_pass: bool | None = None
    """true: two forward passes a step; false: one, with g embedded; null: two unless the model embeds g."""
    instantaneous: bool = False
    """true: a student of mean velocities is sampled as the model of instantaneous ones that it contains (r = t)."""
    predictor: str | None = None
    """What stands in for the transformer on the steps that are not full: the folder of a trained predictor,
    sprites/predictor, `reuse` or `taylor`; null runs every step in full."""
    full_steps: list[int] | None = None
    """Positions of the full steps, from 0."""
    every: int | None = None
    """n, in place of `full_steps`: steps 0, n, 2n, ... are full."""
    budget: int | None = None
    """Number of full steps, in place of either: the predictor's schedule says which."""
    schedule: str | None = None
    """A schedule.json to take them from; null is the predictor's own."""
    force: bool = False
    """true takes a predictor that was trained for another student."""
    num_frames: int | None = None
    height: int | None = None
    width: int | None = None
    """Pixels."""
    seed: int = 0
    """Seed of the first prompt's noise; prompt i of a file gets seed + i."""
    dtype: str = "auto"
    """`auto` (float32 on a CPU, as stored on a GPU), `float32`, `bfloat16` or `float16`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _require(bool(self.model.strip()), "model", self.model, "must name a model")
        _require(0 <= self.seed < 2**63, "seed", self.seed, "must be in 0 .. 2^63 - 1")
        _require(self.steps is None or self.steps >= 1, "steps", self.steps, "must be at least 1")
        _require(self.shift is None or 0 < self.shift < math.inf, "shift", self.shift, "must be above 0 and finite")
        dtypes = ("auto", "float32", "bfloat16", "float16")
        _require(self.dtype in dtypes, "dtype", self.dtype, f"is one of {', '.join(dtypes)}")


@dataclass
class CollectConfig:
    """`vidaccel collect-features`. A key left null takes the model's own default."""

    kind: str = "encoded"
    """`encoded` (clips as latents and text embeddings) or `trajectory` (the model's own sampling of their captions)."""
    model: str = "sprites/teacher"
    """A shipped model (sprites/teacher), a local diffusers pipeline folder, or a hub id."""
    data: str | None = None
    """A folder of videos with captions.jsonl; null renders scenes, which a model of the sprites world understands."""
    clips: int = 4000
    """Scenes that are rendered; of a folder of videos all are taken."""
    max_bad_share: float = 0.1
    """Share of a folder's clips that may be unusable, and are then left out; a larger one stops."""
    num_frames: int | None = None
    height: int | None = None
    width: int | None = None
    """Pixels."""
    fps: float | None = None
    """Frames a second that clips are brought to."""
    steps: int | None = None
    """Of trajectories: sampler steps."""
    shift: float | None = None
    """Of trajectories: shift of the step grid."""
    guidance: float | None = None
    """Of trajectories: classifier-free guidance scale g."""
    cache: bool = False
    """Of trajectories: the tokens that leave the trunk at each step are stored too, instead of being computed again by
    who needs them. They are large: 0.39 GB a step for HunyuanVideo."""
    seed: int = 0
    """Of rendered scenes and of noise: trajectory i starts from the noise of `vidaccel generate` with seed + i."""
    dtype: str = "auto"
    """What the model computes in: `auto` (float32 on a CPU, as stored on a GPU), `float32`, `bfloat16` or `float16`."""
    store: str = "float16"
    """What is stored: `float16`, `bfloat16` or `float32`."""
    tiling: bool = False
    """The autoencoder encodes overlapping tiles and blends them: large videos in less memory."""
    batch_size: int = 1
    """Samples computed together, which is what a kill loses at most."""
    per_shard: int = 256
    """Samples in one file."""
    max_gigabytes: float | None = 100.0
    """Nothing is written where the whole folder would be larger; null is no limit."""

    def __post_init__(self) -> None:
        kinds = ("encoded", "trajectory")
        _require(self.kind in kinds, "kind", self.kind, f"is {' or '.join(kinds)}")
        _require(not self.cache or self.kind == "trajectory", "cache", self.cache, "goes with kind=trajectory")
        _require(bool(self.model.strip()), "model", self.model, "must name a model")
        for key in ("clips", "batch_size", "per_shard"):
            _require(getattr(self, key) >= 1, key, getattr(self, key), "must be at least 1")
        _require(self.steps is None or self.steps >= 1, "steps", self.steps, "must be at least 1")
        g = self.guidance
        _require(g is None or 1 <= g < math.inf, "guidance", g, "is a number from 1 up")
        _require(0 <= self.max_bad_share < 1, "max_bad_share", self.max_bad_share, "must be in [0, 1)")
        _require(0 <= self.seed < 2**63, "seed", self.seed, "must be in 0 .. 2^63 - 1")
        for key in ("fps", "shift", "max_gigabytes"):
            value = getattr(self, key)
            _require(value is None or 0 < value < math.inf, key, value, "must be above 0 and finite")
        dtypes = ("float32", "bfloat16", "float16")
        _require(self.dtype in ("auto", *dtypes), "dtype", self.dtype, f"is one of auto, {', '.join(dtypes)}")
        _require(self.store in dtypes, "store", self.store, f"is one of {', '.join(dtypes)}")


@dataclass
class MeanVelocityTraining:
    """What a few-step student learns: the mean velocity over short intervals (method.md, section 2)."""

    target: str = "rollout"
    """`rollout` (the frozen teacher integrated over the interval) or `derivative` (the MeanFlow identity)."""
    restrict: float | None = 0.2
    """Restrict factor R in (0, 1], the widest interval t - r: 0.2 is the paper's, 1 is plain MeanFlow, null the widest
    interval of the step grid that the student is sampled on."""
    restrict_end: float | None = None
    """R at the end of the training, to which it moves in a straight line; null keeps it."""
    equal_share: float = 0.25
    """Share of samples with r = t, which keep the student a model of the instantaneous velocity as well."""
    substeps: int = 2
    """Midpoint steps of the rollout, two teacher passes each."""
    velocity: str = "teacher"
    """`teacher` (the frozen model's) or `data` (eps - x_0): what the trajectory of the derivative follows."""
    derivative: str | None = None
    """`exact` (forward-mode differentiation), `finite_difference`, or null: exact, but finite_difference on more than
    one process."""
    difference_step: float = 0.02
    """h of the finite difference in t. Wide, because a transformer's time embedding ripples on a finer scale."""
    tangent_clip: float | None = None
    """c of the derivative's clipping d / (|d| + c), |d| a sample's root mean square; null leaves it alone."""
    tangent_warmup: int = 0
    """Steps over which the derivative's share rises from zero."""
    error_power: float = 0.0
    """p of the adaptive weight 1 / (error + c)^p of a sample; 0 is the plain mean squared error."""
    error_constant: float = 1e-3
    """c of that weight."""
    kernels: str = "auto"
    """Attention of the exact derivative: `reference`, `fused` or `auto`."""
    attention_precision: str = "float32"
    """What that attention computes in: `float32`, or `bfloat16`, which the fused kernel is made for. All else of the
    derivative's pass is float32."""

    def __post_init__(self) -> None:
        for key in ("restrict", "restrict_end"):
            value = getattr(self, key)
            _require(value is None or 0 < value <= 1, key, value, "must be in (0, 1], or null")
        for key, names in {
            "target": ("rollout", "derivative"),
            "velocity": ("teacher", "data"),
            "derivative": (None, "exact", "finite_difference"),
            "kernels": ("auto", "reference", "fused"),
            "attention_precision": PRECISIONS,
        }.items():
            _require(getattr(self, key) in names, key, getattr(self, key), f"is one of {', '.join(map(str, names))}")
        _require(0 <= self.equal_share <= 1, "equal_share", self.equal_share, "must be in [0, 1]")
        _require(self.substeps >= 1, "substeps", self.substeps, "must be at least 1")
        _require(0 < self.difference_step < 0.5, "difference_step", self.difference_step, "must be in (0, 0.5)")
        clip = self.tangent_clip
        _require(clip is None or 0 < clip < math.inf, "tangent_clip", clip, "must be above 0 and finite, or null")
        for key in ("tangent_warmup", "error_power"):
            _require(0 <= getattr(self, key) < math.inf, key, getattr(self, key), "must be at least 0 and finite")
        _require(self.error_constant > 0, "error_constant", self.error_constant, "must be above 0")


@dataclass
class DistillConfig:
    """`vidaccel distill`."""

    method: str = "cfg"
    """`cfg` (two-pass guidance into one pass) or `mean_velocity` (few steps)."""
    teacher: str = "sprites/teacher"
    """The model to distil: shipped, a local folder, or a hub id."""
    start: str | None = None
    """A student of this teacher by this method, whose weights are trained further; null starts from the teacher's."""
    features: str | None = None
    """A folder of encoded clips from `vidaccel collect-features`; null encodes while training."""
    on_damage: str = "stop"
    """At a damaged shard of it: `stop`, or `skip` to go on without."""
    data: str | None = None
    """Without `features`, a folder of videos with captions.jsonl; null renders the sprites world."""
    clips: int = 4000
    """Scenes of the sprites world, where neither of those is given."""
    seed: int = 0
    guidance_range: list[float] = field(default_factory=lambda: [1.0, 8.0])
    """Scales g that the student learns, drawn uniformly."""
    times: str = "logit_normal"
    """Distribution of t before it is moved towards noise: `uniform` or `logit_normal`."""
    train_shift: float | None = None
    """By how much it is: s t / (1 + (s - 1) t). Null is the step grid's shift for `logit_normal`, 1 for `uniform`."""
    sample_steps: int = 50
    """Sampler steps that the student is made for: what it is saved, sampled and shown with."""
    guidance: float | None = None
    """Scale it is sampled with unless told; null is the teacher's."""
    shift: float | None = None
    """Shift of its step grid; null is the teacher's."""
    prompts: list[str] = field(default_factory=list)
    """Captions of the sample sheets; empty takes four from the data."""
    merge_lora: bool = True
    """With adapters: save them merged into the weights, or apart in lora/."""
    mean_velocity: MeanVelocityTraining = field(default_factory=MeanVelocityTraining)
    """Only for `mean_velocity`."""
    train: TrainConfig = field(default_factory=TrainConfig)

    def __post_init__(self) -> None:
        _require(self.method in ("cfg", "mean_velocity"), "method", self.method, "is cfg or mean_velocity")
        _require(self.on_damage in ("stop", "skip"), "on_damage", self.on_damage, "is stop or skip")
        _require(self.times in ("uniform", "logit_normal"), "times", self.times, "is uniform or logit_normal")
        for key in ("clips", "sample_steps"):
            _require(getattr(self, key) >= 1, key, getattr(self, key), "must be at least 1")
        low_high = self.guidance_range
        fits = len(low_high) == 2 and 1 <= low_high[0] <= low_high[1] < math.inf
        _require(fits, "guidance_range", low_high, "is [low, high] with 1 <= low <= high")
        for key in ("shift", "train_shift"):
            value = getattr(self, key)
            _require(value is None or 0 < value < math.inf, key, value, "must be above 0 and finite")


@dataclass
class DiscriminatorConfig:
    """What tells the predictor's steps from the student's in the second stage of its training."""

    depths: list[float] = field(default_factory=lambda: [0.25, 0.5, 0.75])
    """Where features are taken from the student's trunk: shares of its blocks, rising; 1 is the last block."""
    scales: list[int] = field(default_factory=lambda: [1, 2, 4])
    """Heads at each depth: one for means of s x s neighbouring tokens each."""
    width: int = 64
    """Hidden units of a head."""
    learning_rate: float = 1e-2
    """Its peak; the schedule is the predictor's."""
    weight: float = 1.0
    """Of the adversarial loss beside the squared error."""

    def __post_init__(self) -> None:
        rising = self.depths == sorted(set(self.depths)) and bool(self.depths)
        rule = "rises within (0, 1], without repetition"
        _require(rising and self.depths[0] > 0 and self.depths[-1] <= 1, "depths", self.depths, rule)
        _require(min(self.scales, default=0) >= 1, "scales", self.scales, "are one or more numbers from 1 up")
        _require(self.width >= 1, "width", self.width, "must be at least 1")
        for key in ("learning_rate", "weight"):
            _require(0 < getattr(self, key) < math.inf, key, getattr(self, key), "must be above 0 and finite")


@dataclass
class PredictorConfig:
    """`vidaccel train-predictor`."""

    student: str = "sprites/student"
    """The model that the predictor is for, which stays as it is: shipped, a local folder, or a hub id."""
    stage: str = "all"
    """`all` (train, then search schedules) or `search` (search schedules for the predictor that is there already)."""
    features: str | None = None
    """A folder from `vidaccel collect-features`: encoded clips or trajectories of the student. Null encodes clips while
    training; `pairs=trajectory` collects trajectories first, unless they are given, on the captions of what is."""
    data: str | None = None
    """Without `features`, a folder of videos with captions.jsonl; null renders the sprites world."""
    clips: int = 4000
    """Scenes of the sprites world, where neither of those is given, and most trajectories that are collected."""
    on_damage: str = "stop"
    """What to do about damaged shards of `features`: `stop`, or `skip` to train without them."""
    seed: int = 0
    blocks: int = 2
    """Transformer blocks of the predictor."""
    history: int = 1
    """Full steps that it looks back on, 1 or 2; each takes the memory of one set of tokens. With 2 it corrects the line
    through both, and needs `pairs=trajectory`."""
    pairs: str = "data"
    """What it learns from: `data` (noised clips) or `trajectory` (the student's own sampling, predicted steps
    included)."""
    intervals: str = "restricted"
    """Of noised clips: `restricted` (t uniform, t - r uniform up to `restrict`, the predicted step up to `lag` later)
    or `grid` (full and predicted step are two of the step grid, at most `lag` and at least one step apart)."""
    restrict: float | None = None
    """Widest interval t - r, in (0, 1]; null is what the student was trained on, else its step grid's widest."""
    lag: float = 0.2
    """Longest time from the full step to the predicted one, in (0, 1]."""
    longest: int = 4
    """Of trajectories: most predicted steps in a row."""
    relative: bool = False
    """Count each sample's squared error as a share of what reusing the cached tokens has. Long lags, where that is
    large, are then not all that is learnt."""
    guidance: float | None = None
    """Scale g that the predictor learns to work at, for a student that embeds it; null is the student's own."""
    guidance_range: list[float] | None = None
    """[low, high] of scales drawn uniformly in its place, for a predictor that is to serve many."""
    steps: int | None = None
    """Steps of the grid that it is made for; null is the student's own."""
    shift: float | None = None
    """Shift of that grid; null is the student's own."""
    search_prompts: int = 8
    """Prompts whose trajectories schedules are searched on."""
    mse: TrainConfig = field(default_factory=lambda: TrainConfig(steps=500, learning_rate=1e-4, schedule="constant"))
    """The first stage, on the squared error."""
    adversarial: TrainConfig = field(
        default_factory=lambda: TrainConfig(steps=1000, learning_rate=1e-4, schedule="constant")
    )
    """The second stage, against a discriminator as well; 0 steps leave it out."""
    discriminator: DiscriminatorConfig = field(default_factory=DiscriminatorConfig)

    def __post_init__(self) -> None:
        _require(bool(self.student.strip()), "student", self.student, "must name a model")
        for key, names in {
            "stage": ("all", "search"),
            "on_damage": ("stop", "skip"),
            "pairs": ("data", "trajectory"),
            "intervals": ("restricted", "grid"),
        }.items():
            _require(getattr(self, key) in names, key, getattr(self, key), f"is {' or '.join(names)}")
        for key in ("clips", "blocks", "longest", "search_prompts"):
            _require(getattr(self, key) >= 1, key, getattr(self, key), "must be at least 1")
        _require(self.history in (1, 2), "history", self.history, "is 1 or 2")
        both = self.history == 1 or self.pairs == "trajectory"
        _require(both, "history", self.history, "needs pairs=trajectory: noised clips have one full step")
        _require(self.steps is None or self.steps >= 2, "steps", self.steps, "must be at least 2, or null")
        _require(self.shift is None or 0 < self.shift < math.inf, "shift", self.shift, "must be above 0 and finite")
        _require(0 < self.lag <= 1, "lag", self.lag, "must be in (0, 1]")
        widest = self.restrict
        _require(widest is None or 0 < widest <= 1, "restrict", widest, "must be in (0, 1], or null")
        g = self.guidance
        _require(g is None or 1 <= g < math.inf, "guidance", g, "is a number from 1 up, or null")
        scales = self.guidance_range
        if scales is not None:
            fits = len(scales) == 2 and 1 <= scales[0] <= scales[1] < math.inf
            _require(fits, "guidance_range", scales, "is [low, high] with 1 <= low <= high, or null")
            _require(self.pairs == "data", "guidance_range", scales, "is null for trajectories, which have their own")


@dataclass
class TextTraining:
    """The two text encoders of the sprites model, trained to know a caption's meaning."""

    width: int = 64
    train: TrainConfig = field(default_factory=TrainConfig)


@dataclass
class AutoencoderTraining:
    """The sprites model's video autoencoder."""

    latent_channels: int = 16
    block_out_channels: list[int] = field(default_factory=lambda: [16, 24, 48, 64])
    """Widths at 64, 32, 16 and 8 pixels, each a multiple of `norm_groups`."""
    norm_groups: int = 2
    """Groups of the group norms. Few: a norm over two channels would wipe out a plain background's brightness."""
    layers_per_block: int = 1
    image_pixels: int = 32
    """Size of the crops of single frames that it is trained on first: many different pictures a step."""
    excerpts: list[list[int]] = field(default_factory=lambda: [[5, 32], [9, 32], [9, 32], [17, 32], [9, 64], [17, 64]])
    """[frames, pixels] of the excerpts of clips that it is trained on then, in turn."""
    kl_weight: float = 1e-4
    """Weight of the Kullback-Leibler term, per latent element."""
    l1_weight: float = 0.1
    """Weight of the absolute error beside the squared one; it sharpens what is nearly right."""
    gradient_weight: float = 1.0
    """Weight of the squared error of spatial differences, which keeps edges sharp."""
    latent_noise: float = 0.2
    """Noise on the whitened latents that the decoder has to see through, over their standard deviation. It also bounds
    how far weak directions are widened."""
    images: TrainConfig = field(default_factory=TrainConfig)
    """The first stage; its batch size counts crops. With 0 steps it is left out, as when a trained model goes on."""
    clips: TrainConfig = field(default_factory=TrainConfig)
    """The second stage; its batch size counts crops of `image_pixels`, and longer or larger excerpts are fewer. Where a
    stage trained the encoder, latents are whitened afterwards."""
    decoder: TrainConfig = field(default_factory=lambda: TrainConfig(steps=0))
    """The last stage, of the decoder alone, on noisy latents and excerpts as before: latents, and a transformer trained
    on them, stay what they are."""

    def __post_init__(self) -> None:
        _require(0 < self.latent_noise < 1, "latent_noise", self.latent_noise, "must be in (0, 1)")
        for excerpt in [[1, self.image_pixels], *self.excerpts]:
            rule = "is [frames, pixels] with frames = 4k + 1 and pixels a multiple of 8, at most 64"
            _require(
                len(excerpt) == 2 and excerpt[0] % 4 == 1 and excerpt[1] % 8 == 0 and 8 <= excerpt[1] <= 64,
                "excerpts",
                excerpt,
                rule,
            )


@dataclass
class TeacherTraining:
    """The sprites model's diffusion transformer, by flow matching."""

    heads: int = 4
    head_dim: int = 32
    double_blocks: int = 8
    single_blocks: int = 16
    train_shift: float = 3.0
    """Shift of the logit-normal distribution of t (method.md, section 0)."""
    caption_dropout: float = 0.1
    """Share of samples trained with the empty caption, for classifier-free guidance."""
    alignment: float = 0.5
    """Weight of the loss for naming what each token shows; used where scenes are rendered, and so known."""
    growth: int = 4
    """Blocks at full depth for each one of the shallow stage."""
    shallow: TrainConfig = field(default_factory=lambda: TrainConfig(steps=0))
    """A first stage on a `growth`-th of the blocks, from random weights; 0 steps begin at full depth."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """The stage at full depth."""

    def __post_init__(self) -> None:
        _require(0 <= self.caption_dropout < 1, "caption_dropout", self.caption_dropout, "must be in [0, 1)")
        _require(self.alignment >= 0, "alignment", self.alignment, "must be at least 0")
        _require(self.growth >= 1, "growth", self.growth, "must be at least 1")
        if self.shallow.steps:
            for key in ("double_blocks", "single_blocks"):
                rule = f"must be a multiple of growth={self.growth} for a shallow stage"
                _require(getattr(self, key) % self.growth == 0, key, getattr(self, key), rule)


@dataclass
class SpritesConfig:
    """`python -m vidaccel.sprites`: the shipped world made from nothing."""

    seed: int = 0
    device: str = "auto"
    data: str | None = None
    """A folder of videos with captions.jsonl to train on; null renders scenes on the fly."""
    start: str | None = None
    """A sprites model whose weights every part goes on from; null starts from random ones. A part whose steps are 0
    stays as it is there."""
    clips: int = 10000
    """Clips that are encoded once and then trained on (all of the folder's, if `data` is set)."""
    pair_share: float = 0.5
    """Share of rendered scenes with two sprites."""
    odds: dict[str, int] = field(default_factory=dict)
    """How often a shape or a background is drawn, by its name, against once for the others: {cross: 2, gray: 2}."""
    text: TextTraining = field(default_factory=TextTraining)
    autoencoder: AutoencoderTraining = field(default_factory=AutoencoderTraining)
    teacher: TeacherTraining = field(default_factory=TeacherTraining)
    score_prompts: int = 256
    """Held-out prompts that the teacher is scored on."""
    steps: int = 50
    guidance: float = 4.0
    sample_shift: float = 3.0
    """Shift of the sampler's step grid."""

    def __post_init__(self) -> None:
        for key in ("clips", "score_prompts", "steps"):
            _require(getattr(self, key) >= 1, key, getattr(self, key), "must be at least 1")
        _require(0 <= self.pair_share <= 1, "pair_share", self.pair_share, "must be in [0, 1]")
        _require(all(times >= 1 for times in self.odds.values()), "odds", self.odds, "must each be at least 1")


BETWEEN = ("predictor", "linear", "trunk", "branches", "attention")
CACHES = (
    "pab",
    "fastercache",
    "first_block",
    "taylorseer",
    "magcache",
    "seacache",
    "fora",
    "teacache",
    "delta_dit",
)
"""Training-free caches: six of diffusers' own and three of ours."""


@dataclass
class MethodConfig:
    """A row of the benchmark: how many steps, which of them run the whole transformer, and what runs on the others."""

    weights: str = "student"
    """Which weights it runs on: `teacher` or `student`. A teacher's single pass a step needs guidance distilled into
    it: `BenchmarkConfig.distilled`."""
    steps: int = 50
    """Sampler steps."""
    shift: float | None = None
    """Shift of the step grid; null is the model's own."""
    guidance: float | None = None
    """Classifier-free guidance scale g of this row alone."""
    two_pass: bool = False
    """true: two forward passes a step, with and without the prompt (classifier-free guidance)."""
    full_steps: list[int] | None = None
    """Steps, counted from 0, that run the whole transformer; null: all, or those that `every` gives."""
    every: int | None = None
    """Steps 0, n, 2n, ... run the whole transformer."""
    budget: int | None = None
    """So many steps run the whole transformer: those that the predictor's own schedule.json lists."""
    between: str = "predictor"
    """What runs on the other steps, beside embedders and output head: `predictor`, the learned one; `linear`, a linear
    map fitted beforehand to the row's own sampling, with one pass a step; or a cache that gives again the last full
    step's `trunk` output, every block's residual `branches`, or every block's `attention` (whose blocks compute the
    rest)."""
    order: int = 0
    """Derivatives that the cache keeps of each tensor beside its value (TaylorSeer)."""
    cache: str | None = None
    """A training-free cache, which then decides on its own by `settings`; `full_steps`, `every` and `between` say what
    that leads to, where it does not depend on the video, and only plans read them."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Of that cache, by its own names."""
    sweep: dict[str, list[Any]] = field(default_factory=dict)
    """Settings with values that are tried as well, a row each, where quality is measured too."""
    model: str | None = None
    """Weights of this row alone, in place of the benchmark's teacher or student."""
    predictor: str | None = None
    """The predictor of this row alone."""

    def __post_init__(self) -> None:
        _require(self.weights in ("teacher", "student"), "weights", self.weights, "is teacher or student")
        g = self.guidance
        _require(self.steps >= 1, "steps", self.steps, "must be at least 1")
        _require(self.shift is None or 0 < self.shift < math.inf, "shift", self.shift, "must be above 0 and finite")
        _require(g is None or 1 <= g < math.inf, "guidance", g, "is a number from 1 up, or null")
        _require(self.every is None or self.every >= 1, "every", self.every, "must be at least 1")
        _require(self.order >= 0, "order", self.order, "must be at least 0")
        _require(self.between in BETWEEN, "between", self.between, f"is one of {', '.join(BETWEEN)}")
        _require(self.between != "linear" or not self.two_pass, "between", self.between, "is for one pass a step")
        _require(self.cache in (None, *CACHES), "cache", self.cache, f"is one of {', '.join(CACHES)}")
        _require(self.cache is not None or not self.settings, "settings", self.settings, "are those of a cache")
        _require(self.cache is not None or not self.sweep, "sweep", self.sweep, "is over settings of a cache")
        if self.budget is not None:
            alone = self.every is None and self.full_steps is None and self.cache is None
            rule = f"is from 1 to {self.steps}, without full_steps, every or cache, and with between=predictor"
            fits = 1 <= self.budget <= self.steps and self.between == "predictor"
            _require(alone and fits, "budget", self.budget, rule)
        if self.full_steps is not None:
            _require(self.every is None, "every", self.every, "must be null where full_steps is set")
            ordered = self.full_steps == sorted(set(self.full_steps)) and self.full_steps[:1] == [0]
            rule = f"rises from 0, without repetition, to at most {self.steps - 1}"
            _require(ordered and self.full_steps[-1] < self.steps, "full_steps", self.full_steps, rule)

    @property
    def planned(self) -> bool:
        """Whether what it computes is known before it runs."""
        return self.cache is None or self.every is not None or self.full_steps is not None

    @property
    def predicts(self) -> bool:
        """Whether the learned predictor takes part."""
        return self.cache is None and self.between == "predictor" and self.full_count() != self.steps

    def schedule(self) -> list[int] | None:
        """The steps that run the whole transformer; None where the settings alone do not say."""
        if not self.planned or self.budget is not None:
            return None
        return list(range(0, self.steps, self.every or 1)) if self.full_steps is None else self.full_steps

    def full_count(self) -> int | None:
        """How many steps run the whole transformer."""
        return self.budget if self.schedule() is None else len(self.schedule())

    def swept(self) -> dict[str, "MethodConfig"]:
        """This row for each value of its sweep but the one that it has, by what is to stand behind its name."""
        return {
            f" {key}={value}": replace(
                self, settings=self.settings | {key: value}, sweep={}, full_steps=None, every=None
            )
            for key, values in self.sweep.items()
            for value in values
            if value != self.settings.get(key)
        }


@dataclass
class BenchmarkConfig(RuntimeConfig):
    """`vidaccel benchmark`."""

    family: str = "hunyuan_video"
    """Name of the model family."""
    model: str | None = None
    """The teacher: a shipped model (sprites/teacher), a diffusers pipeline folder or, to run it, a hub id. A plan
    reads only its transformer's settings; null: `transformer`."""
    student: str | None = None
    """The distilled student, as `model`."""
    distilled: str | None = None
    """The teacher with guidance distilled into one pass; null: the teacher itself if it embeds its guidance, else the
    student sampled with r = t."""
    predictor: str | None = None
    """Folder of the trained predictor, or a shipped one (sprites/predictor)."""
    transformer: dict[str, Any] = field(default_factory=dict)
    """Arguments of the family's transformer class that are not its defaults."""
    compression: list[int] = field(default_factory=lambda: [4, 8])
    """[frames, pixels] of a video that the autoencoder makes one latent of."""
    text_tokens: dict[str, int] = field(default_factory=lambda: {"prompt": 256})
    """Tokens of each text, padding included, as the pipeline hands them to the transformer."""
    dtype: str = "bfloat16"
    """Of weights, activations and caches: `float32`, `bfloat16` or `float16`."""
    sizes: list[list[int]] = field(default_factory=lambda: [[129, 704, 704]])
    """Videos: [frames, height, width]."""
    predictor_blocks: int = 2
    """Transformer blocks of the learned predictor that is planned with."""
    predictor_history: int = 1
    """Full steps that a planned predictor looks back on, 1 or 2: it holds the tokens of each."""
    methods: dict[str, MethodConfig] = field(default_factory=dict)
    """Rows, by name."""
    only: list[str] | None = None
    """Names of the rows that are wanted; null: all."""
    baseline: str = "cfg-50"
    """Name of the row that speedups are relative to, and whose videos the others' are compared with."""
    marker: str | None = None
    """What scores videos beyond their likeness to the baseline's: `sprites`, for models of the shipped world."""
    prompts: list[str] = field(default_factory=list)
    """Prompts; where there are none the marker has its own."""
    seed: int = 0
    """Of the first prompt's noise; prompt i gets seed + i."""
    guidance: float | None = None
    """Classifier-free guidance scale g of all rows that name none; null is each model's own."""
    rounds: int = 3
    """Times that every row is timed, one after the other."""
    timed_prompts: int = 1
    """Prompts of a round."""
    timed_seconds: float = 0.75
    """Least that a row denoises in a round: its videos are made again until then, and the mean is what counts."""
    scored_prompts: int = 64
    """Prompts that quality is measured on."""
    sweeps: bool = True
    """Whether caches whose threshold sets their speed are scored at others too, as their rows say."""
    keep_videos: bool = False
    """Whether the videos that quality is measured on stay: videos/ROW/PROMPT-N.mp4, as VBench wants them named."""
    batch_size: int = 8
    """Videos made together where they are only scored; a cache that decides by what it sees gets one at a time."""
    whole: bool | None = None
    """Random weights: true times the whole transformer, false one block of each kind; null: whole if it fits."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _require(bool(self.sizes), "sizes", self.sizes, "must hold at least one size")
        for size in self.sizes:
            _require(len(size) == 3 and min(size) >= 1, "sizes", size, "is a list of [frames, height, width]")
        lowest = min(self.compression, default=0)
        _require(len(self.compression) == 2 and lowest >= 1, "compression", self.compression, "is [frames, pixels]")
        _require(self.rounds >= 2, "rounds", self.rounds, "must be at least 2: one time has no spread")
        for key in ("predictor_blocks", "timed_prompts", "scored_prompts", "batch_size"):
            _require(getattr(self, key) >= 1, key, getattr(self, key), "must be at least 1")
        _require(0 <= self.timed_seconds < math.inf, "timed_seconds", self.timed_seconds, "is in seconds, 0 or more")
        _require(self.predictor_history in (1, 2), "predictor_history", self.predictor_history, "is 1 or 2")
        _require(min(self.text_tokens.values(), default=1) >= 1, "text_tokens", self.text_tokens, "are at least 1 each")
        dtypes = ("float32", "bfloat16", "float16")
        _require(self.dtype in dtypes, "dtype", self.dtype, f"is one of {', '.join(dtypes)}")
        _require(self.marker in (None, "sprites"), "marker", self.marker, "is sprites, or null")
        _require(0 <= self.seed < 2**63, "seed", self.seed, "must be in 0 .. 2^63 - 1")
        g = self.guidance
        _require(g is None or 1 <= g < math.inf, "guidance", g, "is a number from 1 up, or null")

    def wanted(self, swept: bool = False) -> dict[str, MethodConfig]:
        """The wanted methods and, first, the baseline; with the rows of their sweeps behind each of them if asked for.

        Raises:
            UserError: a name is not among `methods`.
        """
        names = dict.fromkeys((self.baseline, *(self.methods if self.only is None else self.only)))
        for name in names:
            if name not in self.methods:
                raise UserError(f'there is no method "{name}"', nearest(name, self.methods))
        rows = {}
        for name in names:
            rows[name] = self.methods[name]
            if swept:
                rows |= {name + suffix: row for suffix, row in self.methods[name].swept().items()}
        return rows


SCHEMAS = {
    "generate": GenerateConfig,
    "distill": DistillConfig,
    "collect-features": CollectConfig,
    "train-predictor": PredictorConfig,
    "benchmark": BenchmarkConfig,
    "sprites": SpritesConfig,
}
"""Of each folder of `conf/`."""


def conf_root() -> Path:
    """The folder of shipped YAMLs: inside the package in a wheel, beside it in a checkout."""
    package = Path(__file__).resolve().parent
    return package / "conf" if (package / "conf").is_dir() else package.parent / "conf"


def load(command: str, schema: type[Schema], conf: str, overrides: Sequence[str] = ()) -> Schema:
    """The settings of `command`: conf/<command>/<conf>.yaml, or the YAML file `conf`, then the overrides.

    Either may build on a shipped one, by its name: `defaults: [teacher, _self_]`.

    Raises:
        UserError: no such file, no such key, or a value the schema refuses.
    """
    from hydra import compose, initialize_config_dir
    from hydra.core.override_parser.types import Quote, QuotedString
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    path = _find(command, conf)
    shipped = QuotedString(f"file://{conf_root() / command}", Quote.single).with_quotes()
    words = [f"hydra.searchpath=[{shipped}]", *(_override(word, schema) for word in overrides)]
    try:
        with initialize_config_dir(str(path.parent), version_base=None):
            chosen = compose(path.stem, words)
    except (YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not YAML: {' '.join(str(error).split())}", "mend that line") from error
    except (HydraException, OmegaConfBaseException) as error:
        reason = next(iter(str(error).splitlines()), "a key that is no name")  # OmegaConf says nothing of a null key
        raise UserError(f"{path.name}: {reason}", "see `--print-conf` for what can be set") from error
    _check_keys(OmegaConf.to_container(chosen), schema, path.name)
    try:
        return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(schema), chosen))
    except OmegaConfBaseException as error:
        key = getattr(error, "full_key", None) or path.name
        raise UserError(f"{key}: {str(error).splitlines()[0]}", "see `--print-conf` for values that fit") from error


def to_yaml(config: Any) -> str:
    """The settings as YAML text that `--conf` would accept."""
    from omegaconf import OmegaConf

    return OmegaConf.to_yaml(OmegaConf.structured(config))


def to_dict(config: Any) -> dict[str, Any]:
    """The settings as plain dictionaries, lists and scalars, for run.json."""
    from omegaconf import OmegaConf

    return OmegaConf.to_container(OmegaConf.structured(config))


def _find(command: str, conf: str) -> Path:
    if conf.endswith((".yaml", ".yml")):
        path = Path(conf).resolve()
        if path.suffix == ".yml":
            raise UserError(f"{conf} does not end in .yaml", "rename it: Hydra reads no other suffix")
        if not path.is_file():
            raise UserError(
                f"no configuration file {conf}", "give the path of a YAML file, or the name of a shipped one"
            )
        return path
    folder = conf_root() / command
    path = folder / f"{conf}.yaml"
    if not path.is_file():
        names = [str(p.relative_to(folder).with_suffix("")) for p in folder.rglob("*.yaml")]
        raise UserError(f'no configuration "{conf}" for {command}', nearest(conf, names))
    return path


def _override(word: str, schema: type) -> str:
    """A `key=value` word, checked, as Hydra takes it.

    Text is quoted, unless it is already: to Hydra's grammar a comma in a path is a sweep and an accent an error.
    """
    from hydra.core.override_parser.types import Quote, QuotedString

    key, equals, value = word.lstrip("+").partition("=")
    if not equals:
        raise UserError(f'"{word}" is neither a flag nor a key=value setting', "write settings as key=value")
    here = schema
    for part in key.split("."):
        if get_origin(here) is dict:  # of rows or settings by name
            here = get_args(here)[1]
            continue
        hints = get_type_hints(here) if is_dataclass(here) else {}
        if part not in hints:
            known = list(hints) or [f.name for f in fields(schema)]
            raise UserError(f'there is no setting "{key}"', nearest(part, known))
        here = hints[part]
    if here in (str, str | None) and value != "null" and not value.startswith(("'", '"')):
        value = QuotedString(value, Quote.single).with_quotes()
    return f"++{key}={value}"


def _check_keys(chosen: dict, schema: type, where: str) -> None:
    hints = get_type_hints(schema)
    for key, value in chosen.items():
        if key not in hints:
            raise UserError(f'{where}: there is no setting "{key}"', nearest(str(key), hints))
        if is_dataclass(hints[key]):
            if not isinstance(value, dict):
                raise UserError(f"{where}: {key}={value!r}, where {key} is a group of settings", f"set {key}.<name>")
            _check_keys(value, hints[key], where)
