"""FORA (2407.01425): every N-th step is computed, and on the others each residual branch gives its last output again.

The gates that scale a branch, and all norms, are computed at every step. A cache of every branch of every block is
large: 27 GB for a HunyuanVideo video of 129 x 704 x 704.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from diffusers import DiffusionPipeline
from torch import Tensor, nn

from vidaccel.bench.baselines.parts import PartHook, PartsCache
from vidaccel.errors import UserError
from vidaccel.families.base import DiTFamily

TOKENS = ("hidden_states", "encoder_hidden_states")


@dataclass(frozen=True)
class Branches:
    """The modules of one block that its residual stream is added to from."""

    outputs: tuple[str, ...]
    """Their names: what they give back is kept."""
    feeding: tuple[str, ...] = ()
    """Modules that only work for those, and have nothing to do where those give again what they gave."""


_DOUBLE_STREAM = Branches(("attn", "ff", "ff_context"))
BRANCHES: dict[str, dict[str, Branches]] = {
    "hunyuan_video": {
        "transformer_blocks": _DOUBLE_STREAM,
        "single_transformer_blocks": Branches(("proj_out",), feeding=("attn", "proj_mlp")),
    },
    "hunyuan_video_15": {"transformer_blocks": _DOUBLE_STREAM},
    "wan": {"blocks": Branches(("attn1", "attn2", "ffn"))},
}
"""Of every family in the catalogue, by name, and by name of the block list."""


class Fora(PartsCache):
    """Steps 0, N, 2N, ... are full."""

    def __init__(self, pipe: DiffusionPipeline, every: int, family: DiTFamily | None = None):
        if every < 1:
            raise UserError(f"FORA every {every} steps", "1 makes every step full")
        super().__init__(pipe, family)
        self.every = every

    def hooks(self, transformer: nn.Module) -> Iterator[tuple[nn.Module, PartHook]]:
        for name, branches in BRANCHES[self.family.name].items():
            for block in getattr(transformer, name):
                yield from ((block.get_submodule(output), OutputHook(self)) for output in branches.outputs)
                yield from ((block.get_submodule(feeding), FeedingHook(self)) for feeding in branches.feeding)

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
