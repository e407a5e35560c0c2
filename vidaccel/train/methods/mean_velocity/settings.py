"""Settings of `method=mean_velocity`, and the table of its targets. Neither imports torch."""

import math
from dataclasses import dataclass

from vidaccel.config.checks import PRECISIONS, require

TARGETS = {
    "rollout": "vidaccel.train.methods.mean_velocity.rollout:TARGET",
    "derivative": "vidaccel.train.methods.mean_velocity.derivative:TARGET",
}
"""What u(x_t, r, t) is trained towards: name -> where its `Target` (target.py) is, as "module:name"."""


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
            "target": tuple(TARGETS),
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
