"""TeaCache (2411.19108): the whole trunk is left out for as long as the input of its first block, as modulated by the
timestep, has not moved too far; what it added on the last full step is added instead.

B batch, N tokens, D width
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from diffusers import DiffusionPipeline
from diffusers.models.normalization import AdaLayerNormZero
from torch import Tensor, nn

from vidaccel.bench.baselines.parts import PartHook, PartsCache
from vidaccel.bench.baselines.range_cache import RangeCache
from vidaccel.errors import UserError
from vidaccel.families.base import BlockList, DiTFamily
from vidaccel.families.walk import blocks_of, named_arguments
from vidaccel.models.loading import LoadedPipeline

Indicator = Callable[[nn.Module, dict[str, Any]], Tensor]
"""From a block and its arguments by name."""

DEGREE = 4
"""Of the polynomial."""


class TeaCache(RangeCache):
    """Full where the accumulated change of the indicator reaches the threshold, and at the first and the last step."""

    one_at_a_time = True

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

    @classmethod
    def calibrated(
        cls, loaded: LoadedPipeline, settings: dict[str, Any], generate: Callable[[], None]
    ) -> dict[str, Any]:
        if "coefficients" in settings:
            return settings
        with Calibration(loaded.pipe, loaded.family) as seen:
            generate()
        return settings | {"coefficients": seen.coefficients()}

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
        kind, first = blocks_of(transformer, self.family)[0]
        yield first, IndicatorHook(self, kind)
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
        arguments = named_arguments(self.kind, args, kwargs)
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
