"""Caches of what a range of blocks adds to the tokens, as Delta-DiT and TeaCache are.

On a skipped pass the blocks in the range are left out, and the difference that they made on the last full pass is added
in their place.
"""

from collections.abc import Iterator
from typing import Any

from torch import nn

from vidaccel.bench.baselines.parts import PartHook, PartsCache
from vidaccel.families.base import BlockList
from vidaccel.families.walk import as_output, blocks_of, named_arguments, named_outputs


class RangeCache(PartsCache):
    """Blocks `span[0]` to `span[1] - 1`, counted through all block lists, are left out on skipped passes."""

    span = (0, 0)

    def hooks(self, transformer: nn.Module) -> Iterator[tuple[nn.Module, PartHook]]:
        blocks = blocks_of(transformer, self.family)
        self.blocks = len(blocks)
        for index, (kind, block) in enumerate(blocks):
            yield block, RangeHook(self, kind, index)

    def decide(self, block: nn.Module, arguments: dict[str, Any]) -> None:
        """Set `full` and `span` for the pass, whose first block is called with these arguments."""
        raise NotImplementedError


class RangeHook(PartHook):
    """On each block."""

    def __init__(self, cache: RangeCache, kind: BlockList, index: int):
        super().__init__(cache)
        self.kind, self.index = kind, index

    def new_forward(self, module: nn.Module, *args, **kwargs) -> Any:
        arguments = named_arguments(self.kind, args, kwargs)
        if self.index == 0:
            self.cache.decide(module, arguments)
        (start, end), kept = self.cache.span, self.cache.kept
        entering = {name: arguments[name] for name in self.kind.returns}
        if not self.cache.full and start <= self.index < end:
            added = kept["added"] if self.index == start else {}
            return as_output(self.kind, entering | {name: entering[name] + added[name] for name in added})
        if self.cache.full and self.index == start:
            kept["entering"] = entering
        output = self.fn_ref.original_forward(*args, **kwargs)
        if self.cache.full and self.index == end - 1:
            left = named_outputs(self.kind, output)
            before = kept.pop("entering")
            kept["added"] = {name: left[name] - before[name] for name in left}
        return output
