"""What a distillation method is: the number its students are told, its loss, and what it checks before a training.

B batch, C channels, T frames, H and W latent pixels
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vidaccel.collect.bank import Bank
from vidaccel.collect.encode import LATENT, batch
from vidaccel.collect.source import EncodedSource
from vidaccel.config.distill import DistillConfig
from vidaccel.data.shards import ShardFolder
from vidaccel.models.loading import LoadedPipeline
from vidaccel.models.velocity import Text, Velocity
from vidaccel.train.flow_matching import sample_guidance, sample_times
from vidaccel.train.gates import HeldOut, Measured
from vidaccel.train.objective import Loss
from vidaccel.train.passes import Passes

Data = ShardFolder | EncodedSource | Bank


def taken(data: Data, chosen: Sequence[int], device: torch.device) -> dict[str, Tensor]:
    """Latents and texts [B, ...] of those samples in float32."""
    if isinstance(data, Bank):
        return data.batch(chosen, torch.float32)
    return batch([tensors for tensors, _ in data.read(chosen)], device, torch.float32)


def drawn(data: Data, index: int, count: int, seed: int) -> list[int]:
    """The samples of batch `index`, all of one size."""
    if not isinstance(data, Bank) and data.buckets is not None:
        return data.buckets.batch(index, count, seed)
    return [data.at(index * count + i, seed) for i in range(count)]


@dataclass(frozen=True)
class Distillation:
    """What a loss is computed from."""

    config: DistillConfig
    teacher: Velocity
    student: Velocity
    data: Data
    empty: Text
    """The unconditional text [1, ...]."""
    shift: float
    span: tuple[float, float] = (0.0, 1.0)
    """Times that the transformer takes, where others take the rest."""

    @property
    def settings(self) -> Any:
        """Those of the method alone."""
        return self.config.own_settings

    @property
    def train_shift(self) -> float:
        """Of the times that are trained on."""
        return self.config.train_shift or (self.shift if self.config.times == "logit_normal" else 1.0)

    def draw(self, index: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor, Tensor, Text]:
        """x_0 and eps [B, C, T, H, W], t and g [B], and text, of forward pass `index`."""
        size, device = self.config.train.batch_size, next(self.student.parameters()).device
        chosen = drawn(self.data, index, size, self.config.seed)
        text = taken(self.data, chosen, device)
        x_0 = text.pop(LATENT)
        eps = torch.randn(x_0.shape, generator=generator, device=generator.device).to(x_0)
        t = sample_times(size, self.train_shift, generator, self.config.times)
        if self.span != (0.0, 1.0):
            t = self.span[0] + (self.span[1] - self.span[0]) * t
        g = sample_guidance(size, *self.config.guidance_range, generator)
        return x_0, eps, t.to(device), g.to(device), text


@dataclass(frozen=True)
class OtherTraining:
    """A method that trains something else than a model's transformer, as the line of it in `METHODS` names it."""

    run: Callable[[DistillConfig, Path, str], None]
    """All of `vidaccel distill`: settings, the folder, which is locked, and a device."""
    format: str
    """Of the folder that it makes."""
    made: str
    """What that folder is and what runs it, with {output} in its place, for who gave the command."""
    plan: str
    """What works out its `--plan`, as "module:name", called as `bench.plan_distill.plan_distillation`."""


@dataclass(frozen=True)
class Method:
    """A way to distil, as the line of it in `METHODS` names it."""

    embeds: str
    """The number that its students are told: "r", the end of an interval, or "g", the guidance scale."""
    loss: Callable[[Distillation], Loss]
    """An `Objective`, whose steps can be CUDA graphs, or a plain loss."""
    check_teacher: Callable[[LoadedPipeline, Velocity], None] = lambda loaded, teacher: None
    """Raises `UserError` for a teacher that it cannot distil, given as the pipeline and as its velocity."""
    resolved: Callable[[Any], Any] = lambda settings: settings
    """Its settings with what they leave open chosen; called where the number of processes is known."""
    conditioning: Callable[[DistillConfig, float, tuple[float, float]], dict[str, Any]] = lambda config, shift, span: {}
    """What the student's conditioning config is to record of the training besides its step grid, of that shift; `span`
    as of a `Distillation`."""
    gates: Callable[[Distillation, HeldOut], Measured] = lambda task, held_out: Measured()
    """The numbers that say that a student was trained, computed when it is."""
    preflight: Callable[[Distillation], None] = lambda task: None
    """Called before the training: what is worth saying or checking when models and data are there."""
    passes: Callable[[Any], Passes] = lambda settings: Passes()
    """Of its settings: those that the target of a sample takes, beside the student's own with gradients."""
    gate_passes: Passes = Passes()
    """Those that its gates take of a clip, or of a run."""
    gates_runs: bool = False
    """Whether its gates are computed on runs, which large models make only if asked for (`gate_runs`)."""
