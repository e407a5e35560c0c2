"""The polynomial through the last full passes (TaylorSeer, 2503.06923, carried over to the trunk boundary)."""

import torch
from torch import Tensor

from vidaccel.errors import UserError
from vidaccel.forecasters.base import Cached, ForecasterCosts, Making, PlannedTrunk, Tokens, even_time
from vidaccel.models.grid import Grid


class Taylor:
    """The polynomial through the last `order` + 1 full passes, carried on; of lower order while there are fewer.

    At order 1, TaylorSeer's best, it is its forecast h_0 + (k - k_0) (h_0 - h_1) / (k_0 - k_1). Like there, distances
    are those of steps: k is the place of a time along the step grid. Above order 1 it is exact on polynomials, which
    differences divided by factorials are not. Without the time of each pass it raises `ValueError`.
    """

    def __init__(self, order: int = 1, grid: Grid | None = None):
        """`grid` is that of all passes to come; without one it is what `follow` tells, until then times count."""
        if order < 1:
            raise ValueError(f"order {order}: 1 or more; 0 is Reuse")
        self.history, self.grid, self._given = order + 1, grid, grid

    def follow(self, grid: Grid) -> None:
        """Count distances along the grid of a sampling that begins; `UserError` if it was made for another."""
        if self._given is not None and not self._given.fits(grid.times):
            raise UserError(
                f"the forecast counts along the grid of {self._given}, and the pipeline is on that of {grid}",
                "make it without a grid: it then takes that of the pipeline",
            )
        self.grid = self._given or grid

    @classmethod
    def make(cls, making: Making) -> "Taylor":
        return cls(making.order or 1)

    @staticmethod
    def costs(trunk: PlannedTrunk) -> ForecasterCosts:
        return ForecasterCosts(history=(trunk.order or 1) + 1)

    def __call__(self, arguments: dict[str, Tensor], memory: tuple[Cached, ...], t: Tensor | None) -> Tokens:
        now, *then = (even_time(time, self.grid) for time in (t, *(cached.t for cached in memory)))
        latest = memory[0].tokens
        forecast = dict(latest)
        for k, cached in enumerate(memory[1:], start=1):
            weight = _lagrange(now, then, k).reshape(-1, 1, 1)
            for name, tokens in latest.items():
                forecast[name] = forecast[name] + weight.to(tokens) * (cached.tokens[name] - tokens)
        return forecast


def _lagrange(at: Tensor, places: list[Tensor], k: int) -> Tensor:
    """Weight of the k-th value in the polynomial through values at these places; all weights add up to 1."""
    weight = torch.ones_like(at)
    for i, other in enumerate(places):
        if i != k:
            weight = weight * (at - other) / (places[k] - other)
    return weight
