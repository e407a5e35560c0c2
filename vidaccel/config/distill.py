"""Settings of `vidaccel distill`."""

import math
from dataclasses import dataclass, field

from vidaccel.config.checks import PRECISIONS, require
from vidaccel.config.training import TrainConfig


@dataclass
class MeanVelocityTraining:
    """What a few-step student learns: the mean velocity over short intervals (method.md, section 2)."""

    RENAMED = {"equal_share": "r_equals_t_share"}

    target: str = "rollout"
    """`rollout` (the frozen teacher integrated over the interval) or `derivative` (the MeanFlow identity)."""
    restrict: float | None = 0.2
    """Restrict factor R in (0, 1], the widest interval t - r: 0.2 is the paper's, 1 is plain MeanFlow, null the widest
    interval of the step grid that the student is sampled on."""
    restrict_end: float | None = None
    """R at the end of the training, to which it moves in a straight line; null keeps it."""
    r_equals_t_share: float = 0.25
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
            require(value is None or 0 < value <= 1, key, value, "must be in (0, 1], or null")
        for key, names in {
            "target": ("rollout", "derivative"),
            "velocity": ("teacher", "data"),
            "derivative": (None, "exact", "finite_difference"),
            "kernels": ("auto", "reference", "fused"),
            "attention_precision": PRECISIONS,
        }.items():
            require(getattr(self, key) in names, key, getattr(self, key), f"is one of {', '.join(map(str, names))}")
        require(0 <= self.r_equals_t_share <= 1, "r_equals_t_share", self.r_equals_t_share, "must be in [0, 1]")
        require(self.substeps >= 1, "substeps", self.substeps, "must be at least 1")
        require(0 < self.difference_step < 0.5, "difference_step", self.difference_step, "must be in (0, 0.5)")
        clip = self.tangent_clip
        require(clip is None or 0 < clip < math.inf, "tangent_clip", clip, "must be above 0 and finite, or null")
        for key in ("tangent_warmup", "error_power"):
            require(0 <= getattr(self, key) < math.inf, key, getattr(self, key), "must be at least 0 and finite")
        require(self.error_constant > 0, "error_constant", self.error_constant, "must be above 0")


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
        require(self.method in ("cfg", "mean_velocity"), "method", self.method, "is cfg or mean_velocity")
        require(self.on_damage in ("stop", "skip"), "on_damage", self.on_damage, "is stop or skip")
        require(self.times in ("uniform", "logit_normal"), "times", self.times, "is uniform or logit_normal")
        for key in ("clips", "sample_steps"):
            require(getattr(self, key) >= 1, key, getattr(self, key), "must be at least 1")
        low_high = self.guidance_range
        fits = len(low_high) == 2 and 1 <= low_high[0] <= low_high[1] < math.inf
        require(fits, "guidance_range", low_high, "is [low, high] with 1 <= low <= high")
        for key in ("shift", "train_shift"):
            value = getattr(self, key)
            require(value is None or 0 < value < math.inf, key, value, "must be above 0 and finite")
