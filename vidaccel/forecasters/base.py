"""What a forecaster is, how one is made, and what it says of its costs.

A forecaster takes the place of the whole trunk on a predicted step: from the tokens that enter the first block and the
tokens that left the last one on earlier full steps it makes the tokens that leave now. Video tokens are called
`hidden_states`, text tokens `encoder_hidden_states`, as diffusers' blocks call them.

Published ideas (FORA 2407.01425, TaylorSeer 2503.06923, LinCa) are carried over to the trunk boundary, where they keep
one set of tokens a full pass and not one a layer.

B batch, N tokens, D width"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol, Self

from diffusers import DiffusionPipeline
from torch import Tensor

from vidaccel.families.base import DiTFamily
from vidaccel.models.grid import Grid

Tokens = dict[str, Tensor]
"""Tokens [B, N, D] by the name that blocks know them by."""


class Cached(NamedTuple):
    """What a full pass left behind."""

    tokens: Tokens
    """What the last block returned."""
    t: Tensor | None
    """Time in [0, 1] of that pass, [] or [B]; None where the caller did not say."""
    held: Mapping[str, Any] = MappingProxyType({})
    """What the family's `static_embedders` gave in it, by their paths; one that is not here runs on predicted steps."""


class Forecaster(Protocol):
    """Anything that can be called like this; a `torch.nn.Module` if it has weights.

    One that has a method `follow(grid)` is told the `Grid` of each sampling before its first pass, and may refuse it.
    Where one says that it `recomputes`, embedders whose output is otherwise held run on its passes as well.
    """

    history: int
    """How many full passes it looks back on, at least 1. Each costs the memory of one set of tokens."""

    def __call__(self, arguments: dict[str, Tensor], memory: tuple[Cached, ...], t: Tensor | None) -> Tokens:
        """Tokens that leave the trunk, `hidden_states` at least.

        Args:
            arguments: what the trunk's first block was called with, by the names and in the order of its `BlockList`.
            memory: the latest full passes of the same context, newest first, 1 to `history` of them.
            t: time of this pass, as in `Cached`.
        """


@dataclass(frozen=True)
class Making:
    """What a forecaster may be made from; whoever asks for one fills in what there is."""

    pipe: DiffusionPipeline
    """Whose trunk it is to stand in for."""
    family: DiTFamily
    """Of the pipeline."""
    order: int = 0
    """Derivatives to look at, for those that do; 0 leaves it to them."""
    folder: Path | None = None
    """Of a trained one; or a file of weights that others have released."""
    full_steps: Collection[int] = ()
    """Steps that will be full."""
    generate: Callable[[], None] | None = None
    """Runs the pipeline once, each step in full and in one pass, on prompts and noise that are measured nowhere."""


def of_denoiser(forecaster: Any, which: int) -> Any:
    """The part of a forecaster that is for one of several transformers; the forecaster itself where all share it."""
    parts = getattr(forecaster, "parts", None)
    return forecaster if parts is None else parts[which]


@dataclass(frozen=True)
class PlannedTrunk:
    """What a plan knows of the trunk that is stood in for, and of the forecaster's settings."""

    width: int
    """D of the video's tokens."""
    rows: tuple[int, ...]
    """N of each kind of tokens that leave it: video and text, or both as one sequence."""
    linear: int
    """FLOPs of the linear layers of its last blocks, as many as a predictor has."""
    attention: int
    """FLOPs of their attention."""
    parameters: int
    """Their parameters."""
    widths: tuple[int, ...] = ()
    """D of each kind of tokens, where they are not all as wide as the video's."""
    blocks: int = 2
    """Blocks of a predictor that is trained."""
    history: int = 1
    """Full passes that such a one looks back on."""
    order: int = 0
    """As in `Making`."""

    @property
    def kinds(self) -> tuple[tuple[int, int], ...]:
        """(N, D) of each kind of tokens that leave it."""
        return tuple(zip(self.rows, self.widths or [self.width] * len(self.rows), strict=True))


class ForecasterCosts(NamedTuple):
    """What a forecaster costs for one video, beside embedders and output head, which always run."""

    history: int
    """Full passes whose tokens it keeps."""
    linear: int = 0
    """FLOPs of its linear layers in one pass."""
    attention: int = 0
    """FLOPs of its attentions in one pass."""
    parameters: int = 0
    """Parameters."""
    answers_pass: bool = False
    """Whether it stands in for the whole pass, embedders and head included, and keeps latents and velocities of full
    passes in place of tokens."""


class NamedForecaster(Forecaster, Protocol):
    """The class of a forecaster that stands in the registry."""

    @classmethod
    def make(cls, making: Making) -> Self:
        """One for this pipeline; `UserError` if something that it is made from is not there."""

    @staticmethod
    def costs(trunk: PlannedTrunk) -> ForecasterCosts:
        """Of one made for this trunk with these settings."""


def even_time(t: Tensor | None, grid: Grid | None) -> Tensor:
    """The place of a time along the grid (`Grid.even`), in which its steps are even; without a grid the time itself.

    Raises:
        ValueError: the time is not known.
    """
    if t is None:
        raise ValueError("it has to know the time of each pass: trunk.full(t=...), trunk.predicted(..., t=...)")
    return t if grid is None else grid.even(t)
