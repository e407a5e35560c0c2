"""Over which intervals a mean velocity is learnt: t - r of at most the restrict factor R (method.md, section 2)."""

import torch
from torch import Tensor

from vidaccel.errors import UserError
from vidaccel.models.grid import Grid, denoiser_at
from vidaccel.train.methods.mean_velocity.settings import MeanVelocityTraining


def widest_interval(steps: int, shift: float, span: tuple[float, float] = (0.0, 1.0)) -> float:
    """The largest t - r of the step grid that a student is sampled on; of one of two transformers, that takes the steps
    which begin in `span`, between the times of that.

    Raises:
        UserError: no step of the grid begins there.
    """
    grid, (low, high) = Grid.shifted(steps, shift), span
    if span == (0.0, 1.0):
        return grid.widest
    begun = zip(grid.times, grid.times[1:], strict=False)
    after = [] if high == 1 else [high]  # where the one before, if there is one, ends
    own = [denoiser_at(t, [*after, low]) == len(after) for t in grid.tensor[:-1]]
    lengths = [t - max(r, low) for (t, r), its in zip(begun, own, strict=True) if its]
    if not lengths:
        raise UserError(
            f"no step of {steps} at shift {shift:g} begins from t = {low:g} to {high:g}, the transformer's own times",
            "set sample_steps= to more, or another shift=",
        )
    return max(lengths)


def restrict_at(config: MeanVelocityTraining, widest: float, progress: float) -> float:
    """R at a share `progress` in [0, 1] of the training; `widest` is the step grid's widest interval."""
    first = widest if config.restrict is None else config.restrict
    last = first if config.restrict_end is None else config.restrict_end
    return first + (last - first) * progress


def sample_interval_ends(
    t: Tensor, restrict: float, r_equals_t_share: float, generator: torch.Generator, low: float = 0.0
) -> Tensor:
    """r [B] for t [B]: max(low, t - T) with T ~ U(0, R), and t itself for a share of the samples; `low` is where the
    next of several transformers takes over."""
    given = {"generator": generator, "device": generator.device}
    r = (t - restrict * torch.rand(len(t), **given)).clamp(min=low)
    return torch.where(torch.rand(len(t), **given) < r_equals_t_share, t, r)
