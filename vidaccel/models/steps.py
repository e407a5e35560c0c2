"""Where a running pipeline is on its step grid.

The scheduler is asked by position and not by the value of its timestep: HunyuanVideo-1.5 casts timesteps to bfloat16,
whose spacing is 4 above 512, so that neighbouring steps of a fine grid look alike. `set_timesteps` puts the position
back to the start, also after a generation that an exception ended.
"""

from dataclasses import dataclass
from typing import Any

import torch


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
    """[steps + 1] times s k / (1 + (s - 1) k), k from 1 down to 0 in equal steps (method.md, section 0).

    It is the grid of flow-match Euler as diffusers' pipelines use it (test: their sigmas are equal).
    """
    k = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    return (shift * k / (1 + (shift - 1) * k)).float()
