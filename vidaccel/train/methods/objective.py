"""What a student is trained on: its losses, and what can be said of them before a training.

B batch, C channels, T frames, H and W latent pixels
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vidaccel.collect.encode import LATENT, batch
from vidaccel.collect.source import EncodedSource
from vidaccel.config.distill import DistillConfig
from vidaccel.data.shards import ShardFolder
from vidaccel.errors import UserError
from vidaccel.models.velocity import Text, Velocity
from vidaccel.train.flow_matching import sample_times
from vidaccel.train.methods import jvp
from vidaccel.train.methods import mean_velocity as meanflow
from vidaccel.train.methods.cfg import cfg_loss, sample_guidance
from vidaccel.train.parallel import world
from vidaccel.train.trainer import generator_for

log = logging.getLogger(__name__)

Data = ShardFolder | EncodedSource


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

    @property
    def train_shift(self) -> float:
        """Of the times that are trained on."""
        return self.config.train_shift or (self.shift if self.config.times == "logit_normal" else 1.0)

    def draw(self, index: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor, Tensor, Text]:
        """x_0 and eps [B, C, T, H, W], t and g [B], and text, of forward pass `index`."""
        size, device = self.config.train.batch_size, next(self.student.parameters()).device
        chosen = [self.data.at(index * size + i, self.config.seed) for i in range(size)]
        text = batch([tensors for tensors, _ in self.data.read(chosen)], device, torch.float32)
        x_0 = text.pop(LATENT)
        eps = torch.randn(x_0.shape, generator=generator).to(x_0)
        t = sample_times(size, self.train_shift, generator, self.config.times)
        g = sample_guidance(size, *self.config.guidance_range, generator)
        return x_0, eps, t.to(device), g.to(device), text


def _cfg(task: Distillation) -> Callable:
    def loss(model: nn.Module, index: int, generator: torch.Generator):
        x_0, eps, t, g, text = task.draw(index, generator)
        return cfg_loss(model, task.teacher, _noised(x_0, eps, t), t, g, text, task.empty), {}

    return loss


def _mean_velocity(task: Distillation) -> Callable:
    config, steps = task.config.mean_velocity, task.config.train.steps
    per_step = task.config.train.accumulate * world()
    widest = meanflow.widest_interval(task.config.sample_steps, task.shift)

    def loss(model: nn.Module, index: int, generator: torch.Generator):
        x_0, eps, t, g, text = task.draw(index, generator)
        restrict = meanflow.restrict_at(config, widest, min(1.0, index / (steps * per_step)))
        r = meanflow.sample_interval_ends(t.cpu(), restrict, config.r_equals_t_share, generator).to(t)
        x = _noised(x_0, eps, t)
        teacher, student = _bound(task.teacher, text, g), _bound(model, text, g)
        if config.target == "rollout":
            target = meanflow.rollout_target(lambda x, t: teacher(x, t, t), x, t, r, config.substeps)
        else:
            v = teacher(x, t, t).detach().to(x) if config.velocity == "teacher" else eps - x_0
            warmup = min(1.0, index / per_step / config.tangent_warmup) if config.tangent_warmup else 1.0
            target = meanflow.derivative_target(student, v, x, t, r, config, warmup)
        error, left_out = meanflow.weighted_error(student(x, t, r), target, config.error_power, config.error_constant)
        return error, {"restrict": restrict, "left_out": float(left_out)}

    return loss


def _bound(model: nn.Module, text: Text, g: Tensor) -> meanflow.MeanVelocity:
    """u(x, t, r) of a Velocity with its text, and its scale where it embeds one."""
    scale = g if model.embeds("g") else None
    return lambda x, t, r: model(x, t, text, r=r, g=scale)


def _noised(x_0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
    at = t.view(-1, 1, 1, 1, 1)
    return (1 - at) * x_0 + at * eps


LOSSES = {"cfg": _cfg, "mean_velocity": _mean_velocity}


def preflight(task: Distillation) -> None:
    """How wide the grid's intervals are, and, before a training on Du/Dt, what the student is about to see."""
    config, steps = task.config.mean_velocity, task.config.sample_steps
    widest = meanflow.widest_interval(steps, task.shift)
    restrict = meanflow.restrict_at(config, widest, 0.0)
    log.info("%d steps, shift %g: widest interval %.2f; R starts at %.2f", steps, task.shift, widest, restrict)
    if config.target == "rollout":
        return
    x_0, eps, t, g, text = task.draw(0, generator_for(task.config.seed, 0))
    x, r = _noised(x_0, eps, t), (t - restrict).clamp(min=0.0)
    student = _bound(task.student, text, g)
    missing = jvp.missing_memory(student, x, t, r, config.kernels)
    if missing and config.derivative == "exact":
        needed, free = (count / 2**30 for count in missing)
        raise UserError(
            f"the exact derivative would need {needed:.1f} GiB for attention, and {free:.1f} GiB are free",
            "set mean_velocity.derivative=finite_difference, or run on a GPU with mean_velocity.kernels=fused",
        )
    with torch.no_grad():
        v = _bound(task.teacher, text, g)(x, t, t) if config.velocity == "teacher" else eps - x_0
    with_exact = not missing and (world() == 1 or config.derivative == "exact")
    check = jvp.check_derivatives(student, x, t, r, v, config, with_exact)
    log.info("before training: %s", check)
