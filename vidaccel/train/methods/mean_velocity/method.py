"""The student learns u(x_t, r, t), the mean velocity over [r, t], towards one of TARGETS.

B batch, C channels, T frames, H and W latent pixels
"""

import logging
import pkgutil
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from vidaccel.config.distill import DistillConfig
from vidaccel.errors import UserError
from vidaccel.models.loading import LoadedPipeline
from vidaccel.models.velocity import Text, Velocity, per_sample
from vidaccel.processes import world
from vidaccel.train.flow_matching import noised
from vidaccel.train.gates import (
    GRIDS,
    MEAN_VELOCITY_GATES,
    MEAN_VELOCITY_PASSES,
    RUN_GUIDANCE,
    HeldOut,
    Measured,
    mean_velocity_gap_closed,
)
from vidaccel.train.methods.base import Distillation, Method
from vidaccel.train.methods.mean_velocity.intervals import restrict_at, sample_interval_ends, widest_interval
from vidaccel.train.methods.mean_velocity.jvp import MeanVelocity
from vidaccel.train.methods.mean_velocity.settings import TARGETS, MeanVelocityTraining
from vidaccel.train.methods.mean_velocity.target import Interval, Target
from vidaccel.train.objective import Batch, Loss, Objective, generator_for, in_batch, text_of
from vidaccel.train.passes import Passes

log = logging.getLogger(__name__)


def _loss(task: Distillation) -> Loss:
    settings, target, steps = task.settings, _target(task), task.config.train.steps
    per_step = task.config.train.accumulate * world()
    widest = widest_interval(task.config.sample_steps, task.shift, task.span)
    if steps is None and settings.restrict_end is not None:
        raise UserError("restrict_end, and nobody knows how many steps there will be", "set train.steps, not minutes")

    def draw(index: int, generator: torch.Generator) -> Batch:
        x_0, eps, t, g, text = task.draw(index, generator)
        restrict = restrict_at(settings, widest, min(1.0, index / (steps * per_step)) if steps else 0.0)
        share, low = settings.r_equals_t_share, task.span[0]
        ends = sample_interval_ends(t.to(generator.device), restrict, share, generator, low)
        numbers = {"restrict": restrict, "step": index / per_step}
        numbers = {name: torch.tensor(number, dtype=torch.float64, device=t.device) for name, number in numbers.items()}
        tensors = {"x": noised(x_0, eps, t), "t": t, "r": ends.to(t), "g": g, "v": eps - x_0}
        return Batch(tensors | numbers | in_batch(text))

    def loss(model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        x, t, r, g, v, step = (batch.tensors[name] for name in ("x", "t", "r", "g", "v", "step"))
        teacher, student = (_bound(velocity, text_of(batch.tensors), g) for velocity in (task.teacher, model))
        goal = target.mean_velocity(Interval(x, t, r, v, teacher, student, step, task.span), settings)
        error, left_out = weighted_error(student(x, t, r), goal, settings.error_power, settings.error_constant)
        return error, {"restrict": batch.tensors["restrict"], "left_out": left_out}

    return Objective(draw, loss, (task.teacher, task.student))


def weighted_error(predicted: Tensor, target: Tensor, power: float, constant: float) -> tuple[Tensor, Tensor]:
    """Loss, and how many samples were left out because their target is not finite.

    The mean squared error of each sample, over its squared error plus `constant` to the `power` (MeanFlow's adaptive
    weight, arXiv 2505.13447); power 0 is the plain mean squared error. NaN if no target is finite.
    """
    finite = target.isfinite().flatten(1).all(dim=1)
    error = (predicted.float() - torch.where(per_sample(finite, target), target, predicted.detach()).float()).square()
    error = error.mean(dim=(1, 2, 3, 4))
    weight = (error.detach() + constant) ** -power
    return (weight * error * finite).sum() / finite.sum(), (~finite).sum()


def _preflight(task: Distillation) -> None:
    """Says how wide the grid's intervals are, and has the target look at the first batch."""
    settings, target, steps = task.settings, _target(task), task.config.sample_steps
    widest = widest_interval(steps, task.shift, task.span)
    restrict = restrict_at(settings, widest, 0.0)
    log.info("%d steps, shift %g: widest interval %.2f; R starts at %.2f", steps, task.shift, widest, restrict)
    if target.preflight is None:
        return
    x_0, eps, t, g, text = task.draw(0, generator_for(task.config.seed, 0))
    r = (t - restrict).clamp(min=task.span[0])
    teacher, student = _bound(task.teacher, text, g), _bound(task.student, text, g)
    at = Interval(noised(x_0, eps, t), t, r, eps - x_0, teacher, student, torch.zeros(()), task.span)
    target.preflight(at, settings)


def _target(task: Distillation) -> Target:
    return pkgutil.resolve_name(TARGETS[task.settings.target])


def _bound(model: nn.Module, text: Text, g: Tensor) -> MeanVelocity:
    """u(x, t, r) of a Velocity with its text, and its scale where it embeds one."""
    scale = g if model.embeds("g") else None
    return lambda x, t, r: model(x, t, text, r=r, g=scale)


def _check_teacher(loaded: LoadedPipeline, teacher: Velocity) -> None:
    if not teacher.embeds("g"):
        log.warning(
            "%s is not CFG-distilled: the student learns its velocities without guidance, and follows prompts as "
            "loosely as they do; distil it with --conf cfg first",
            loaded.source,
        )


def _resolved(settings: MeanVelocityTraining) -> MeanVelocityTraining:
    """With the way to the derivative chosen, which under sharding is the difference."""
    derivative = settings.derivative or ("exact" if world() == 1 else "finite_difference")
    return replace(settings, derivative=derivative)


def _conditioning(config: DistillConfig, shift: float, span: tuple[float, float]) -> dict[str, Any]:
    """R at the end of the training, which a predictor's training asks for, and the least r."""
    widest = widest_interval(config.sample_steps, shift, span)
    return {"restrict": restrict_at(config.own_settings, widest, 1.0), "until": span[0]}


def _gates(task: Distillation, held_out: HeldOut) -> Measured:
    noise, runs = held_out.eps[: held_out.runs], held_out.runs
    if not runs:
        return Measured()
    text = {name: tensor[:runs] for name, tensor in held_out.text.items()}
    low, high = task.config.guidance_range or (RUN_GUIDANCE, RUN_GUIDANCE)
    g = min(max(RUN_GUIDANCE, low), high)
    grids = tuple(MEAN_VELOCITY_GATES) if held_out.brief else GRIDS
    closed = mean_velocity_gap_closed(
        *(task.student, task.teacher, noise, text, task.shift, g, grids),
        batch_size=held_out.batch_size,
        span=task.span,
        x_0=held_out.x_0[:runs],
    )
    return Measured(mean_velocity=closed)


METHOD = Method(
    embeds="r",
    loss=_loss,
    check_teacher=_check_teacher,
    resolved=_resolved,
    conditioning=_conditioning,
    gates=_gates,
    preflight=_preflight,
    passes=lambda settings: pkgutil.resolve_name(TARGETS[settings.target]).passes(settings),
    gate_passes=Passes(*MEAN_VELOCITY_PASSES),
    gates_runs=True,
)
