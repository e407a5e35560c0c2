"""FORA (2407.01425): every N-th step is computed, and on the others each residual branch gives its last output again.

The gates that scale a branch, and all norms, are computed at every step. A cache of every branch of every block is
large.
"""

from collections.abc import Iterator
from typing import Any

from diffusers import DiffusionPipeline
from torch import Tensor, nn

from vidaccel.bench.baselines.parts import PartHook, PartsCache
from vidaccel.errors import UserError
from vidaccel.families.base import DiTFamily
from vidaccel.families.walk import blocks_of

TOKENS = ("hidden_states", "encoder_hidden_states")


class Fora(PartsCache):
    """Steps 0, N, 2N, ... are full."""

    def __init__(self, pipe: DiffusionPipeline, every: int, family: DiTFamily | None = None):
        if every < 1:
            raise UserError(f"FORA every {every} steps", "1 makes every step full")
        super().__init__(pipe, family)
        self.every = every

    def hooks(self, transformer: nn.Module) -> Iterator[tuple[nn.Module, PartHook]]:
        for kind, block in blocks_of(transformer, self.family):
            parts = dict(block.named_children())  # a last block may have not all
            yield from ((parts[name], OutputHook(self)) for name in kind.branches if parts.get(name) is not None)
            yield from ((parts[name], FeedingHook(self)) for name in kind.feeding)

    def begin(self) -> None:
        self.full = self.step.index % self.every == 0 or not self.kept


class OutputHook(PartHook):
    def new_forward(self, module: nn.Module, *args, **kwargs) -> Any:
        if self.cache.full:
            self.cache.kept[module] = self.fn_ref.original_forward(*args, **kwargs)
        return self.cache.kept[module]


class FeedingHook(PartHook):
    def new_forward(self, module: nn.Module, *args, **kwargs) -> Any:
        """On a skipped pass tokens of no width, so that what is done to them costs nothing."""
        if self.cache.full:
            return self.fn_ref.original_forward(*args, **kwargs)
        tokens: list[Tensor] = [*args, *(kwargs[name] for name in TOKENS if name in kwargs)]
        empty = tuple(t[..., :0] for t in tokens)
        return empty if len(empty) > 1 else empty[0]
