"""Delta-DiT (2406.01125): every N-th step is computed; the others leave out the rear blocks early in sampling and the
front ones late, and add what those added on the last full step.
"""

from typing import Any

from diffusers import DiffusionPipeline
from torch import nn

from vidaccel.bench.baselines.range_cache import RangeCache
from vidaccel.errors import UserError
from vidaccel.families.base import DiTFamily


class DeltaDiT(RangeCache):
    """Steps 0, N, 2N, ... are full; `share` of the blocks is left out on the others."""

    def __init__(
        self,
        pipe: DiffusionPipeline,
        every: int,
        share: float = 0.7,
        boundary: float = 0.5,
        family: DiTFamily | None = None,
    ):
        """From `boundary` on, as a share of the steps, the front blocks are left out in place of the rear ones."""
        if every < 1 or not 0 < share <= 1 or not 0 <= boundary <= 1:
            raise UserError(
                f"Delta-DiT with every={every}, share={share}, boundary={boundary}",
                "every is at least 1, share in (0, 1] and boundary in [0, 1]",
            )
        super().__init__(pipe, family)
        self.every, self.share, self.boundary = every, share, boundary

    def decide(self, block: nn.Module, arguments: dict[str, Any]) -> None:
        self.full = self.step.index % self.every == 0 or "added" not in self.kept
        if self.full:
            count = max(1, round(self.share * self.blocks))
            early = self.step.index < self.boundary * self.step.count
            self.kept["span"] = (self.blocks - count, self.blocks) if early else (0, count)
        self.span = self.kept["span"]
