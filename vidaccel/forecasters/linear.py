"""A linear map of entering and cached tokens (LinCa, carried over to the trunk boundary), fitted to a model's own
sampling: no training, one generation, a small linear system.

Every step of that generation runs in full. On those that a schedule would predict, the map learns to make the tokens
that leave the trunk from those that enter it and those that left it on the last full step.

B batch, N tokens, D width
"""

from collections.abc import Callable, Collection, Iterable

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from vidaccel.errors import UserError
from vidaccel.families.base import DiTFamily
from vidaccel.families.walk import blocks_of, denoisers_of, named_arguments, named_outputs
from vidaccel.forecasters.base import Cached, ForecasterCosts, Making, PlannedTrunk, Tokens
from vidaccel.models.grid import step_of


class LinearMap(nn.Module):
    """Cached tokens plus a linear map of [entering tokens; cached tokens; 1], one for video and one for text."""

    history = 1

    def __init__(self, weights: Tokens):
        """`weights` are [D, 2 D + 1] by the name of the tokens."""
        super().__init__()
        for name, weight in weights.items():
            self.register_buffer(name, weight)

    @classmethod
    def make(cls, making: Making) -> "LinearMap":
        """Fitted to `making.generate`, for its full steps."""
        if making.generate is None:
            raise UserError("a linear map is fitted to a generation, and there is none", "take predictor=taylor")
        return fitted(making.pipe, making.family, making.full_steps, making.generate)

    @staticmethod
    def costs(trunk: PlannedTrunk) -> ForecasterCosts:
        return ForecasterCosts(1, linear=sum(2 * N * (2 * D + 1) * D for N, D in trunk.kinds))

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


def fitted(
    pipe: DiffusionPipeline, family: DiTFamily, full_steps: Collection[int], generate: Callable[[], None]
) -> LinearMap:
    """The map for these full steps; `generate` runs the pipeline, which makes one pass a step, once."""
    return fit_linear(predicted_passes(pipe, family, full_steps, generate))


def predicted_passes(
    pipe: DiffusionPipeline, family: DiTFamily, full_steps: Collection[int], generate: Callable[[], None]
) -> list[tuple[Tokens, Tokens, Tokens]]:
    """(entering, left on the last full step, leaving) of each step that is not full, as `fit_linear` takes them."""
    transformer, *others = denoisers_of(pipe, family)
    if others:
        raise UserError(
            f"{family.title} denoises with {1 + len(others)} transformers, and the map is of one", "take taylor"
        )
    blocks = blocks_of(transformer, family)
    (first_kind, first), (last_kind, last) = blocks[0], blocks[-1]
    entering: dict[str, Tensor] = {}
    cached: Tokens = {}
    found = []

    def enter(block: nn.Module, args: tuple, kwargs: dict) -> None:
        entering.update(named_arguments(first_kind, args, kwargs))

    def leave(block: nn.Module, inputs: tuple, output: Tensor | tuple[Tensor, ...]) -> None:
        nonlocal cached
        left = named_outputs(last_kind, output)
        if step_of(pipe).index in full_steps:
            cached = left
        else:
            found.append(({name: entering[name] for name in left}, cached, left))

    hooks = [first.register_forward_pre_hook(enter, with_kwargs=True), last.register_forward_hook(leave)]
    try:
        generate()
    finally:
        for hook in hooks:
            hook.remove()
    return found
