"""Settings that every training run has (train/trainer.py)."""

import math
from dataclasses import dataclass, field

from vidaccel.config.checks import PRECISIONS, require

STEPS = 1000
"""Of a training for which neither steps nor minutes are said."""


@dataclass
class TrainConfig:
    """What every training run has (train/trainer.py)."""

    steps: int | None = None
    """Optimiser steps in all; 0 leaves the weights as they are. Null is 1000, or as many as there is time for in
    `minutes`."""
    minutes: float | None = None
    """Wall-clock time in place of `steps`, preparations included: the rate falls over what is left of it. Such a run is
    repeated by the steps that it reached."""
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
    """Share of the rate by which each step shrinks the weights."""
    clip_norm: float = 1.0
    """Gradients are scaled down to this global norm."""
    ema_decay: float = 0.999
    """Decay per step of the averaged weights, which are the ones that get saved as the result."""
    precision: str = "float32"
    """`float32` or `bfloat16` (autocast; weights stay float32)."""
    checkpointing: bool = False
    """Activations are computed again in the backward pass instead of kept: less memory, more time."""
    graph: str = "auto"
    """Each step as one CUDA graph, blocks compiled: `on`, `off`, or `auto`, which is on where that can be."""
    lora_rank: int = 0
    """Rank of low-rank adapters that are trained in place of the full weights; 0 trains the weights."""
    save_every: int = 200
    """Steps between checkpoints."""
    log_every: int = 10
    """Steps between lines of metrics.jsonl."""
    evaluate_every: int = 1000
    """Steps between evaluations of the averaged weights, where a training has one; the best checkpoint is kept."""
    sample_every: int = 1000
    """Steps between sample sheets of the averaged weights, where a training makes them, one at its end besides; 0 is
    never."""
    gates_every: int = 0
    """Steps between looks at how much the averaged weights have learnt, where a training has a number for it, into
    metrics.jsonl and gates.png, one at its end besides; 0 leaves it at the one when all is done. One that has none
    refuses other numbers."""
    trackers: list[str] = field(default_factory=list)
    """Where metrics go besides metrics.jsonl: names of trackers that accelerate knows, such as tensorboard or wandb."""

    def __post_init__(self) -> None:
        both = self.steps is not None and self.minutes is not None
        require(not both, "minutes", self.minutes, "and steps are two ways to end a training: set steps=null, or this")
        if self.minutes is None and self.steps is None:
            self.steps = STEPS
        minutes = self.minutes
        require(minutes is None or 0 < minutes < math.inf, "minutes", minutes, "must be above 0 and finite, or null")
        for key in ("batch_size", "accumulate", "save_every", "log_every", "evaluate_every"):
            require(getattr(self, key) >= 1, key, getattr(self, key), "must be at least 1")
        for key in ("warmup", "lora_rank", "sample_every", "gates_every"):
            require(getattr(self, key) >= 0, key, getattr(self, key), "must be at least 0")
        require(self.steps is None or self.steps >= 0, "steps", self.steps, "must be at least 0, or null")
        require(0 < self.learning_rate < math.inf, "learning_rate", self.learning_rate, "must be above 0 and finite")
        require(0 <= self.weight_decay < math.inf, "weight_decay", self.weight_decay, "must be at least 0 and finite")
        require(self.clip_norm > 0, "clip_norm", self.clip_norm, "must be above 0")
        require(0 <= self.ema_decay < 1, "ema_decay", self.ema_decay, "must be in [0, 1)")
        require(self.optimizer in ("adamw", "muon"), "optimizer", self.optimizer, "is adamw or muon")
        require(self.schedule in ("cosine", "constant"), "schedule", self.schedule, "is cosine or constant")
        require(self.graph in ("auto", "on", "off"), "graph", self.graph, "is auto, on or off")
        require(self.precision in PRECISIONS, "precision", self.precision, f"is one of {', '.join(PRECISIONS)}")

    @property
    def is_on(self) -> bool:
        """Whether there is anything to train."""
        return self.steps != 0
