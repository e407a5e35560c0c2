"""The step grid of a pipeline, and where on it a running one is.

The scheduler is asked by position and not by the value of its timestep: HunyuanVideo-1.5 casts timesteps to bfloat16,
whose spacing is 4 above 512, so that neighbouring steps of a fine grid look alike. `set_timesteps` puts the position
back to the start, also after a generation that an exception ended.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler

from vidaccel.errors import UserError
from vidaccel.families.base import DiTFamily


@dataclass(frozen=True)
class Step:
    """One step of the grid, from time `t` down to `r`, both in [0, 1]."""

    index: int
    """Counted from 0."""
    count: int
    """Steps of the whole grid."""
    t: float
    r: float


def current_step(scheduler: Any) -> Step:
    """The step that a flow-matching scheduler of diffusers will take next."""
    index = scheduler.step_index or 0  # None before the first step
    t, r = (float(scheduler.sigmas[i]) for i in (index, index + 1))
    return Step(index, len(scheduler.timesteps), t, r)


def step_grid(steps: int, shift: float) -> torch.Tensor:
    """[steps + 1] float32 times s k / (1 + (s - 1) k), k from 1 down to 0 in equal steps (method.md, section 0).

    Bit for bit the sigmas of diffusers' flow-match Euler, which rounds k to float32 first.
    """
    k = np.linspace(1, 0, steps + 1).astype(np.float32)
    return torch.from_numpy(shift * k / (1 + (shift - 1) * k))


def shift_of(scheduler: Any, family: DiTFamily) -> float:
    """Shift of the step grid that a pipeline's scheduler has, else the family's."""
    return scheduler.config.get("shift") or scheduler.config.get("flow_shift") or family.defaults.shift


@contextmanager
def shifted(pipe: DiffusionPipeline, shift: float | None) -> Iterator[None]:
    """The pipeline on the step grid of that shift, for the time of the block; None leaves it its own.

    Raises:
        UserError: its scheduler has no fixed shift.
    """
    if shift is None:
        yield
        return
    own = pipe.scheduler
    key = next((key for key in ("shift", "flow_shift") if key in own.config), None)
    if key is None or own.config.get("use_dynamic_shifting"):
        why = "takes it from the size of the video" if key else "knows none"
        raise UserError(f"shift={shift:g}, and the model's {type(own).__name__} {why}", "leave shift= out")
    pipe.scheduler = type(own).from_config(own.config, **{key: shift})
    try:
        yield
    finally:
        pipe.scheduler = own


class GridScheduler(FlowMatchEulerDiscreteScheduler):
    """Flow-match Euler on `step_grid`, also for a pipeline that leaves the grid to its scheduler, as Wan's does.

    The stock one would then shift its smallest sigma twice and spend a last step on the hundredth part that remains.
    """

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        sigmas: list[float] | None = None,
        mu: float | None = None,
        timesteps: list[float] | None = None,
    ) -> None:
        if sigmas is None and timesteps is None:
            sigmas = np.linspace(1, 0, num_inference_steps + 1)[:-1]
        super().set_timesteps(num_inference_steps, device, sigmas, mu, timesteps)
