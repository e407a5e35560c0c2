"""What a forecaster is, and those that need no training of a network.

A forecaster takes the place of the whole trunk on a predicted step: from the tokens that enter the first block and the
tokens that left the last one on earlier full steps it makes the tokens that leave now. Video tokens are called
`hidden_states`, text tokens `encoder_hidden_states`, as diffusers' blocks call them.

These are the published ideas (FORA 2407.01425, TaylorSeer 2503.06923, LinCa) carried over to the trunk boundary, where
they keep one set of tokens a full pass and not one a layer.

B batch, N tokens, D width
"""

from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

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


class Reuse:
    """The tokens of the last full pass once more."""

    history = 1

    def __call__(self, arguments: dict[str, Tensor], memory: tuple[Cached, ...], t: Tensor | None = None) -> Tokens:
        return memory[0].tokens


class Taylor:
    """The polynomial through the last `order` + 1 full passes, carried on; of lower order while there are fewer.

    At order 1, TaylorSeer's best, it is its forecast h_0 + (k - k_0) (h_0 - h_1) / (k_0 - k_1). Like there, distances
    are those of steps: times are taken back through the shift s of the grid, whose steps are even in
    k = t / (s - (s - 1) t). On the sprites teacher (20 steps, s = 3, every second, third and fourth step full) its
    velocities are 5, 10 and 16 % nearer than with distances in t. Above order 1 it is exact on polynomials, which
    differences divided by factorials are not. Without the time of each pass it raises `ValueError`.
    """

    def __init__(self, order: int = 1, shift: float = 1.0):
        """`shift` is the step grid's; 1 leaves times as they are."""
        if order < 1:
            raise ValueError(f"order {order}: 1 or more; 0 is Reuse")
        self.history, self.shift = order + 1, shift

    def __call__(self, arguments: dict[str, Tensor], memory: tuple[Cached, ...], t: Tensor | None) -> Tokens:
        now, *then = (even_time(time, self.shift) for time in (t, *(cached.t for cached in memory)))
        latest = memory[0].tokens
        forecast = dict(latest)
        for k, cached in enumerate(memory[1:], start=1):
            weight = _lagrange(now, then, k).reshape(-1, 1, 1)
            for name, tokens in latest.items():
                forecast[name] = forecast[name] + weight.to(tokens) * (cached.tokens[name] - tokens)
        return forecast


def even_time(t: Tensor | None, shift: float | None) -> Tensor:
    """k in [0, 1] of the time t = shift k / (1 + (shift - 1) k): steps of a grid of that shift are even in it.

    Raises:
        ValueError: the time is not known.
    """
    if t is None:
        raise ValueError("it has to know the time of each pass: trunk.full(t=...), trunk.predicted(..., t=...)")
    shift = shift or 1.0
    return t / (shift - (shift - 1) * t)


def _lagrange(at: Tensor, places: list[Tensor], k: int) -> Tensor:
    """Weight of the k-th value in the polynomial through values at these places; all weights add up to 1."""
    weight = torch.ones_like(at)
    for i, other in enumerate(places):
        if i != k:
            weight = weight * (at - other) / (places[k] - other)
    return weight


class LinearMap(nn.Module):
    """Cached tokens plus a linear map of [entering tokens; cached tokens; 1], one for video and one for text."""

    history = 1

    def __init__(self, weights: Tokens):
        """`weights` are [D, 2 D + 1] by the name of the tokens."""
        super().__init__()
        for name, weight in weights.items():
            self.register_buffer(name, weight)

    def forward(self, arguments: dict[str, Tensor], memory: tuple[Cached, ...], t: Tensor | None = None) -> Tokens:
        cached = memory[0].tokens
        return {
            name: cached[name] + _features(arguments[name], cached[name]) @ getattr(self, name).mT for name in cached
        }


def fit_linear(samples: Iterable[tuple[Tokens, Tokens, Tokens]], ridge: float = 1e-2) -> LinearMap:
    """The `LinearMap` of least squared error, by its normal equations in float64.

    Args:
        samples: (tokens that enter on a step, tokens cached on the full step before, tokens that should leave), as many
            as there are; only their [2 D + 1, 2 D + 1] sums are kept. Names are those of the second.
        ridge: penalty on the square of a weight, as a share of its feature's own sum of squares. It pulls towards
            reuse, which is no weight at all.
    """
    sums: dict[str, tuple[Tensor, Tensor]] = {}
    for entering, cached, leaving in samples:
        for name, tokens in cached.items():
            features = _features(entering[name], tokens).flatten(0, 1).double()
            change = (leaving[name] - tokens).flatten(0, 1).double()
            gram, moment = sums.get(name, (0, 0))
            sums[name] = gram + features.mT @ features, moment + features.mT @ change
    weights = {}
    for name, (gram, moment) in sums.items():
        penalty = torch.diag(ridge * gram.diagonal())
        weights[name] = torch.linalg.solve(gram + penalty, moment).mT.to(cached[name])
    return LinearMap(weights)


def _features(entering: Tensor, cached: Tensor) -> Tensor:
    """[B, N, 2 D + 1]."""
    return torch.cat([entering, cached, torch.ones_like(cached[..., :1])], dim=-1)
