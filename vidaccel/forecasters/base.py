"""What a forecaster is, and those that need no training of a network.

A forecaster takes the place of the whole trunk on a predicted step: from the tokens that enter the first block and the
tokens that left the last one on earlier full steps it makes the tokens that leave now. Video tokens are called
`hidden_states`, text tokens `encoder_hidden_states`, as diffusers' blocks call them.

These are the published ideas (FORA 2407.01425, TaylorSeer 2503.06923, LinCa) carried over to the trunk boundary, where
they keep one set of tokens a full pass and not one a layer.

B batch, N tokens, D width"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol

from torch import Tensor

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
    """What the family's `held` embedders gave in it, by their paths; one that is not here runs on predicted steps."""


class Forecaster(Protocol):
    """Anything that can be called like this; a `torch.nn.Module` if it has weights."""

    history: int
    """How many full passes it looks back on, at least 1. Each costs the memory of one set of tokens."""

    def __call__(self, arguments: dict[str, Tensor], memory: tuple[Cached, ...], t: Tensor | None) -> Tokens:
        """Tokens that leave the trunk, `hidden_states` at least.

        Args:
            arguments: what the trunk's first block was called with, by the names and in the order of its `BlockList`.
            memory: the latest full passes of the same context, newest first, 1 to `history` of them.
            t: time of this pass, as in `Cached`.
        """


def even_time(t: Tensor | None, grid: Grid | None) -> Tensor:
    """The place of a time along the grid (`Grid.even`), in which its steps are even; without a grid the time itself.

    Raises:
        ValueError: the time is not known.
    """
    if t is None:
        raise ValueError("it has to know the time of each pass: trunk.full(t=...), trunk.predicted(..., t=...)")
    return t if grid is None else grid.even(t)
