"""A linear map of entering and cached tokens (LinCa, carried over to the trunk boundary), fitted to a model's own
sampling: no training, one generation, a small linear system.

Every step of that generation runs in full. On those that a schedule would predict, the map learns to make the tokens
that leave the trunk from those that enter it and those that left it on the last full step.

B batch, N tokens, D width
"""

from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from vidaccel.artefacts import atomic_path, read_run, verify_files
from vidaccel.compat.diffusers import execution_device
from vidaccel.errors import UserError
from vidaccel.families.base import DiTFamily
from vidaccel.families.walk import blocks_of, denoisers_of, named_arguments, named_outputs, widths
from vidaccel.forecasters.base import Cached, ForecasterCosts, Making, PlannedTrunk, Tokens
from vidaccel.forecasters.checkpoint import SCHEDULES, WEIGHTS_FILE
from vidaccel.models.grid import Grid, step_of


class LinearMap(nn.Module):
    """Cached tokens plus a linear map of [entering tokens; cached tokens; 1], one for video and one for text."""

    history = 1

    def __init__(self, weights: Tokens):
        """`weights` are [D, 2 D + 1] by the name of the tokens."""
        super().__init__()
        for name, weight in weights.items():
            self.register_buffer(name, weight)

    @classmethod
    def make(cls, making: Making) -> "LinearMap | LinearMaps":
        """Those of a folder; without one, fitted to `making.generate`, for its full steps."""
        if making.folder is not None:
            return saved_maps(making.folder, making.pipe, making.family)
        if making.generate is None:
            raise UserError("a linear map is fitted to a generation, and there is none", "take predictor=taylor")
        return fitted(making.pipe, making.family, making.full_steps, making.generate)

    @staticmethod
    def costs(trunk: PlannedTrunk) -> ForecasterCosts:
        return ForecasterCosts(1, linear=sum(2 * N * (2 * D + 1) * D for N, D in trunk.kinds))

    def forward(self, arguments: dict[str, Tensor], memory: tuple[Cached, ...], t: Tensor | None = None) -> Tokens:
        return {
            name: tokens + _features(arguments[name], tokens) @ getattr(self, name).to(tokens).mT
            for name, tokens in memory[0].tokens.items()
        }


class LinearMaps(nn.Module):
    """One for each number of steps: a generation runs under that of its own."""

    history = 1

    def __init__(self, maps: Mapping[int, LinearMap]):
        super().__init__()
        self.maps = dict(maps)
        self._current: LinearMap | None = None

    def follow(self, grid: Grid) -> None:
        """Take that for the grid of a sampling that begins; `UserError` if there is none."""
        if grid.steps not in self.maps:
            known, way = " and ".join(map(str, sorted(self.maps))), "vidaccel train-predictor forecaster=linear"
            hint = f"search one: {way} steps={grid.steps}"
            raise UserError(f"the linear map is for {known} steps, and the pipeline takes {grid.steps}", hint)
        self._current = self.maps[grid.steps]

    def forward(self, arguments: dict[str, Tensor], memory: tuple[Cached, ...], t: Tensor | None = None) -> Tokens:
        if self._current is None:
            raise ValueError("it has to know the grid: follow(grid)")
        return self._current(arguments, memory, t)


def saved_maps(folder: Path, pipe: DiffusionPipeline, family: DiTFamily) -> LinearMaps:
    """Those beside the schedules in a folder, on the pipeline's device; `UserError` if there are none for its tokens,
    or the folder is not whole."""
    verify_files(folder, read_run(folder, SCHEDULES))
    if not (folder / WEIGHTS_FILE).is_file():
        way = "vidaccel train-predictor forecaster=linear"
        raise UserError(
            f"{folder} has schedules of a linear map, and no map", f"search some into another folder: {way}"
        )
    transformer: Any = denoisers_of(pipe, family)[0]
    own = widths(transformer.config, family.block_lists[-1])
    found: dict[int, Tokens] = {}
    for key, weight in load_file(folder / WEIGHTS_FILE).items():
        steps, _, name = key.partition(".")
        found.setdefault(int(steps), {})[name] = weight.to(execution_device(pipe))
    for weights in found.values():
        if {name: list(weight.shape) for name, weight in weights.items()} != {
            n: [D, 2 * D + 1] for n, D in own.items()
        }:
            raise UserError(f"the linear map in {folder} is for tokens of other widths", "search one for this model")
    return LinearMaps({steps: LinearMap(weights) for steps, weights in found.items()})


def save_map(linear: LinearMap, steps: int, folder: Path) -> None:
    """Beside those for other numbers of steps that the folder holds."""
    path = folder / WEIGHTS_FILE
    others = load_file(path) if path.is_file() else {}
    own = {f"{steps}.{name}": weight.contiguous() for name, weight in linear.state_dict().items()}
    with atomic_path(path) as temporary:
        save_file(others | own, str(temporary))


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
