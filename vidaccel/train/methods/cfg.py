"""Classifier-free guidance distilled into one pass (method.md, section 1).

The student learns the two-pass velocity v_g = v_uncond + g (v_cond - v_uncond) for g drawn uniformly from a range, told
which g by an embedding, so that the scale is still chosen when a video is made.

B batch, C channels, T frames, H and W latent pixels
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vidaccel.errors import UserError
from vidaccel.models.loading import LoadedPipeline
from vidaccel.models.velocity import Text, Velocity, guided_velocity
from vidaccel.train.flow_matching import noised
from vidaccel.train.gates import (
    GUIDANCE_GATES,
    GUIDANCE_PASSES,
    SCALES,
    TIMES,
    HeldOut,
    Measured,
    guidance_gap,
)
from vidaccel.train.methods.base import Distillation, Method
from vidaccel.train.objective import Batch, Loss, Objective, in_batch, text_of
from vidaccel.train.passes import Passes


def cfg_loss(student: Velocity, teacher: Velocity, x: Tensor, t: Tensor, g: Tensor, text: Text, empty: Text) -> Tensor:
    """Mean squared error to the teacher's two-pass velocity at x [B, C, T, H, W], t [B], g [B]."""
    with torch.no_grad():
        target = guided_velocity(teacher, x, t, text, empty, g)
    return F.mse_loss(student(x, t, text, g=g).float(), target.float())


def _loss(task: Distillation) -> Loss:
    def draw(index: int, generator: torch.Generator) -> Batch:
        x_0, eps, t, g, text = task.draw(index, generator)
        return Batch({"x": noised(x_0, eps, t), "t": t, "g": g} | in_batch(text))

    def loss(model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        x, t, g = (batch.tensors[name] for name in ("x", "t", "g"))
        return cfg_loss(model, task.teacher, x, t, g, text_of(batch.tensors), task.empty), {}

    return Objective(draw, loss, (task.teacher, task.student))


def _check_teacher(loaded: LoadedPipeline, teacher: Velocity) -> None:
    if teacher.embeds("g"):
        raise UserError(
            f"{loaded.source} has its guidance distilled into one pass already",
            "train a few-step student of it: --conf few_steps, or method=mean_velocity",
        )


def _gates(task: Distillation, held_out: HeldOut) -> Measured:
    """At those of the usual scales that the student is told in its training: of others it knows nothing."""
    x_0, eps, text, generator, _, size, brief = held_out
    low, high = task.config.guidance_range or (min(SCALES), max(SCALES))
    learnt, gated = ([g for g in scales if low <= g <= high] for scales in (SCALES, GUIDANCE_GATES))
    gap = guidance_gap(
        *(task.student, task.teacher, x_0, eps, text, task.empty, task.shift, generator, learnt),
        times=() if brief or not gated else TIMES,
        timed_scales=gated,
        batch_size=size,
        span=task.span,
    )
    return Measured(guidance=gap)


METHOD = Method(
    embeds="g",
    loss=_loss,
    check_teacher=_check_teacher,
    gates=_gates,
    passes=lambda settings: Passes(teacher=2),
    gate_passes=Passes(*GUIDANCE_PASSES),
)
