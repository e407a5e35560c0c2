"""A distillation method as a stranger would write one: the student learns the velocity of the data under its r.

It is in no table: tests put it there.
"""

import torch
from torch import nn
from torch.nn import functional as F

from vidaccel.errors import UserError
from vidaccel.models.loading import LoadedPipeline
from vidaccel.models.velocity import Velocity
from vidaccel.train.flow_matching import noised
from vidaccel.train.methods.base import Distillation, Method
from vidaccel.train.objective import Loss

SEEN: list[str] = []


def _loss(task: Distillation) -> Loss:
    def loss(model: nn.Module, index: int, generator: torch.Generator):
        x_0, eps, t, g, text = task.draw(index, generator)
        r = t * task.settings.end
        error = F.mse_loss(model(noised(x_0, eps, t), t, text, r=r, g=g if model.embeds("g") else None), eps - x_0)
        return error, {"end": task.settings.end}

    return loss


def _check_teacher(loaded: LoadedPipeline, teacher: Velocity) -> None:
    if teacher.embeds("r"):
        raise UserError(f"{loaded.source} knows r already", "give another teacher")


METHOD = Method(
    embeds="r",
    loss=_loss,
    check_teacher=_check_teacher,
    conditioning=lambda config, shift, span: {"restrict": config.own_settings.end},
    preflight=lambda task: SEEN.append("preflight"),
)
