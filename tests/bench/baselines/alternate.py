"""The smallest training-free cache: a file of its own, for tests that add it."""

from typing import Any

from diffusers import DiffusionPipeline
from torch import nn

from vidaccel.bench.baselines.range_cache import RangeCache
from vidaccel.families.base import DiTFamily


class Alternate(RangeCache):
    """Every N-th step runs all blocks; the others add what those added on the last one that did."""

    def __init__(self, pipe: DiffusionPipeline, every: int, family: DiTFamily | None = None):
        super().__init__(pipe, family)
        self.every = every

    def decide(self, block: nn.Module, arguments: dict[str, Any]) -> None:
        self.span = (0, self.blocks)
        self.full = self.step.index % self.every == 0
