"""Caches of what a run of blocks adds to the tokens: Delta-DiT and TeaCache.

On a skipped pass the blocks in the range are left out, and the difference that they made on the last full pass is added
in their place. Delta-DiT (2406.01125) does so on all steps but every N-th, with the rear blocks early in sampling and
the front ones late. TeaCache (2411.19108) leaves out the whole trunk for as long as the input of its first block, as
modulated by the timestep, has not moved too far.

B batch, N tokens, D width
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from diffusers import DiffusionPipeline
from diffusers.models.normalization import AdaLayerNormZero
from torch import Tensor, nn

from vidaccel.bench.baselines.parts import PartHook, PartsCache
from vidaccel.errors import UserError
from vidaccel.families.base import BlockList, DiTFamily

Tokens = dict[str, Tensor]
Indicator = Callable[[nn.Module, dict[str, Any]], Tensor]
"""From a block and its arguments by name."""

DEGREE = 4
"""Of TeaCache's polynomial."""


class RangeCache(PartsCache):
    """Blocks `span[0]` to `span[1] - 1`, counted through all block lists, are left out on skipped passes."""

    span = (0, 0)

    def hooks(self, transformer: nn.Module) -> Iterator[tuple[nn.Module, PartHook]]:
        blocks = [(kind, block) for kind in self.family.block_lists for block in getattr(transformer, kind.name)]
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
        arguments = dict(zip(self.kind.arguments, args, strict=False)) | kwargs
        if self.index == 0:
            self.cache.decide(module, arguments)
        (start, end), kept = self.cache.span, self.cache.kept
        entering = {name: arguments[name] for name in self.kind.returns}
        if not self.cache.full and start <= self.index < end:
            added = kept["added"] if self.index == start else {}
            left = tuple(tokens + added[name] if name in added else tokens for name, tokens in entering.items())
            return left if len(left) > 1 else left[0]
        if self.cache.full and self.index == start:
            kept["entering"] = entering
        output = self.fn_ref.original_forward(*args, **kwargs)
        if self.cache.full and self.index == end - 1:
            left = dict(zip(self.kind.returns, output if isinstance(output, tuple) else (output,), strict=True))
            before = kept.pop("entering")
            kept["added"] = {name: left[name] - before[name] for name in left}
        return output


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


class TeaCache(RangeCache):
    """Full where the accumulated change of the indicator reaches the threshold, and at the first and the last step."""

    def __init__(
        self,
        pipe: DiffusionPipeline,
        threshold: float,
        coefficients: Sequence[float] = (1.0, 0.0),
        family: DiTFamily | None = None,
        indicator: Indicator | None = None,
    ):
        """
        Args:
            threshold: larger is faster.
            coefficients: of the polynomial, highest power first, that turns a relative change of the indicator into
                the change of the model's output to expect. `Calibration` finds a model's own.
            indicator: `modulated_input` unless given.
        """
        if threshold < 0:
            raise UserError(f"TeaCache with threshold={threshold}", "it is a number from 0 up; 0 computes every step")
        super().__init__(pipe, family)
        self.threshold, self.coefficients, self.indicator = threshold, coefficients, indicator or modulated_input

    def decide(self, block: nn.Module, arguments: dict[str, Any]) -> None:
        kept, now = self.kept, self.indicator(block, arguments)
        self.span = (0, self.blocks)
        self.full = "added" not in kept or self.step.index == self.step.count - 1
        if not self.full:
            kept["distance"] += float(np.polyval(self.coefficients, relative_change(now, kept["indicator"])))
            self.full = kept["distance"] >= self.threshold
        if self.full:
            kept["distance"] = 0.0
        kept["indicator"] = now


class Calibration(PartsCache):
    """Runs everything, and sees how changes of the indicator go with changes of the model's output."""

    def __init__(self, pipe: DiffusionPipeline, family: DiTFamily | None = None, indicator: Indicator | None = None):
        super().__init__(pipe, family)
        self.indicator = indicator or modulated_input
        self.changes: list[tuple[float, float]] = []
        """(of the indicator, of the output) from a step to the next one, relative."""

    def coefficients(self, degree: int = DEGREE) -> list[float]:
        """For `TeaCache`; of lower degree where there are no more than `degree` changes."""
        before, after = np.array(self.changes).T
        return np.polyfit(before, after, min(degree, len(before) - 1)).tolist()

    def hooks(self, transformer: nn.Module) -> Iterator[tuple[nn.Module, PartHook]]:
        kind = self.family.block_lists[0]
        yield getattr(transformer, kind.name)[0], IndicatorHook(self, kind)
        self._undo.append(transformer.register_forward_hook(self._compare).remove)

    def _compare(self, transformer: nn.Module, inputs: tuple, output: Any) -> None:
        now, before = (self.kept["indicator"], output[0]), self.kept.get("before")
        if before is not None:
            self.changes.append(tuple(relative_change(a, b) for a, b in zip(now, before, strict=True)))
        self.kept["before"] = now


class IndicatorHook(PartHook):
    def __init__(self, cache: Calibration, kind: BlockList):
        super().__init__(cache)
        self.kind = kind

    def new_forward(self, module: nn.Module, *args, **kwargs) -> Any:
        arguments = dict(zip(self.kind.arguments, args, strict=False)) | kwargs
        self.cache.kept["indicator"] = self.cache.indicator(module, arguments)
        return self.fn_ref.original_forward(*args, **kwargs)


def modulated_input(block: nn.Module, arguments: dict[str, Any]) -> Tensor:
    """What TeaCache watches: the normed and modulated video tokens [B, N, D] of the block; for Wan, whose block does
    that inside, the projected timestep embedding, as its authors do."""
    if isinstance(block.norm1, AdaLayerNormZero):
        return block.norm1(arguments["hidden_states"], emb=arguments["temb"])[0]
    return arguments["temb"]


def relative_change(now: Tensor, before: Tensor) -> float:
    """mean |now - before| / mean |before|."""
    return float((now.float() - before.float()).abs().mean() / before.float().abs().mean())
