"""FLOPs of one forward pass, by formula: of a full pass, and of each kind of pass that leaves something out.

A formula and not torch.utils.flop_counter on the meta device, because a whole HunyuanVideo-1.5 does not run there (its
forward asks its masks for their values), because it splits by what a cache leaves out, and because another video size
is then a multiplication. The counter is what the tests hold it against. One multiplication and one addition are two
FLOPs; text padding is counted, since the stock models compute it.

N video tokens, L text tokens, D width, H heads
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

from torch import nn

from vidaccel.families.base import DiTFamily
from vidaccel.families.costs import Attentions, Layers
from vidaccel.families.walk import width, widths
from vidaccel.forecasters.base import PlannedTrunk
from vidaccel.forecasters.registry import FORECASTERS, forecaster_class

ATTENTION_MODULES = "attn"
"""What is in the names of a block's attention modules, in every family (diffusers' own caches rely on it too)."""


@dataclass(frozen=True)
class PassFlops:
    """FLOPs of one forward pass of one video."""

    embedders: int
    """Embedders and output head."""
    blocks: int
    """Linear layers of the trunk's blocks, or of the predictor's."""
    attention: int
    """Products of queries, keys and values in those blocks."""

    @property
    def total(self) -> int:
        return self.embedders + self.blocks + self.attention


class LayerFlops(NamedTuple):
    name: str
    stream: str
    flops: int


class BlockFlops(NamedTuple):
    layers: list[LayerFlops]
    attention: int


def layer_flops(module: nn.Module, streams: Layers, rows: Mapping[str, int]) -> list[LayerFlops]:
    """Of each Linear and patch convolution: 2 a weight and row."""
    found = []
    for name, layer in module.named_modules():
        if isinstance(layer, (nn.Linear, nn.Conv2d, nn.Conv3d)):
            stream = next(stream for pattern, stream in streams if fnmatchcase(name, pattern))
            found.append(LayerFlops(name, stream, 2 * layer.weight.numel() * _count(rows, stream)))
    return found


def _count(rows: Mapping[str, int], stream: str) -> int:
    """Rows of a stream, or of one and some more."""
    name, _, more = stream.partition("+")
    return rows[name] + int(more or 0)


def attention_flops(
    attentions: Attentions, rows: Mapping[str, int], width: int, config: Mapping[str, int] | None = None
) -> int:
    """Of attentions with H heads of width D / H: 2 D a pair of query and key for the scores, 2 D for the values.

    D is `width`, unless an attention names keys of the transformer's `config`.
    """
    total = 0
    for queries, keys, *own in attentions:
        D = math.prod((config or {})[key] for key in own) if own else width
        total += 4 * _count(rows, queries) * _count(rows, keys) * D
    return total


def blocks_flops(
    model: Any, family: DiTFamily, rows: Mapping[str, int], name: str, places: Iterable[int]
) -> Iterator[BlockFlops]:
    """Of the blocks in these places of a list."""
    blocks, costs, head = model.get_submodule(name), family.costs.blocks[name], model.config.attention_head_dim
    summed = {**rows, "head": head, "half": head // 2}
    attention = attention_flops(costs.attentions, summed, width(model), model.config)
    for place in places:
        yield BlockFlops(layer_flops(blocks[place], costs.layers, rows), attention)


def planned_trunk(
    model: Any, family: DiTFamily, rows: Mapping[str, int], blocks: int = 2, **settings: int
) -> PlannedTrunk:
    """What a forecaster's costs follow from; `settings` are those of `PlannedTrunk`."""
    kind = family.block_lists[-1]
    own = widths(model.config, kind)
    lasts = range(-min(blocks, len(getattr(model, kind.name))), 0)
    found = list(blocks_flops(model, family, rows, kind.name, lasts))
    return PlannedTrunk(
        width=width(model),
        rows=tuple(rows[stream] for stream in family.costs.fusions),
        linear=sum(layer.flops for block in found for layer in block.layers),
        attention=sum(block.attention for block in found),
        parameters=sum(parameters(getattr(model, kind.name)[place]) for place in lasts),
        widths=() if kind.joint else tuple(own.values()),
        blocks=blocks,
        **settings,
    )


def parameters(module: nn.Module) -> int:
    return sum(weight.numel() for weight in module.parameters())


def pass_flops(
    model: nn.Module, family: DiTFamily, rows: Mapping[str, int], predictor_blocks: int = 2
) -> dict[str, PassFlops]:
    """FLOPs of a `full` pass and of what may run in its place, by the names that `MethodConfig.on_skipped` knows.

    Args:
        model: the transformer; the meta device will do.
        rows: number of rows of each stream (`sizes.rows`).
        predictor_blocks: blocks of the learned predictor.
    """
    depths = {name: len(model.get_submodule(name)) for name in family.costs.blocks}
    every = {name: list(blocks_flops(model, family, rows, name, range(depth))) for name, depth in depths.items()}
    outside = _outside(model, family, rows)
    predicted_outside = _outside(model, family, rows, but=family.static_embedders)
    trunk = planned_trunk(model, family, rows, blocks=predictor_blocks)
    forecasters = {name: forecaster_class(name).costs(trunk) for name in FORECASTERS}

    sides = {kind.name for kind in family.side_lists}  # which caches of what is within the trunk's blocks leave alone

    def blocks(counted) -> int:
        layers = ((name, layer) for name, blocks in every.items() for block in blocks for layer in block.layers)
        return sum(layer.flops for name, layer in layers if name in sides or counted(layer))

    attention = {name: sum(block.attention for block in blocks) for name, blocks in every.items()}
    beside = sum(attention[name] for name in sides)
    return {
        "full": PassFlops(outside, blocks(lambda layer: True), sum(attention.values())),
        **{
            name: PassFlops(0 if each.answers_pass else predicted_outside, each.linear, each.attention)
            for name, each in forecasters.items()
        },
        "branches": PassFlops(outside, blocks(lambda layer: layer.stream.partition("+")[0] == "one"), beside),
        "attention": PassFlops(
            outside, blocks(lambda layer: ATTENTION_MODULES not in layer.name.split(".")[0]), beside
        ),
    }


def _outside(model: Any, family: DiTFamily, rows: Mapping[str, int], but: tuple[str, ...] = ()) -> int:
    """Of everything but blocks, and what is within the modules at the paths in `but`."""
    costs, left_out = family.costs, tuple(f"{path}." for path in but)
    layers = layer_flops(_without_blocks(model, family), costs.layers, rows)
    attention = sum(
        _number(model.get_submodule(path)) * attention_flops(attentions, rows, width(model), model.config)
        for path, attentions in costs.attentions.items()
        if not f"{path}.".startswith(left_out)
    )
    products = sum(
        2 * model.get_parameter(name).numel() * _count(rows, stream)
        for path, (name, stream) in costs.products.items()
        if not f"{path}.".startswith(left_out)
    )
    return sum(layer.flops for layer in layers if not f"{layer.name}.".startswith(left_out)) + attention + products


def _number(module: nn.Module) -> int:
    return len(module) if isinstance(module, nn.ModuleList) else 1


def _without_blocks(model: nn.Module, family: DiTFamily) -> nn.ModuleDict:
    trunk = {block_list.name for block_list in family.all_lists}
    return nn.ModuleDict({name: child for name, child in model.named_children() if name not in trunk})
