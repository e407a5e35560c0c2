"""Bytes that a pass holds: what caches keep, and the activations of a block as it runs on the meta device.

Activations are what lives inside one block beside the weights, at its highest, as the stock model runs with an
attention that stores no scores (flash attention and its like). Embedders and head hold less, and the blocks run one
after another. HunyuanVideo-1.5's stock block makes a mask of every pair of tokens, three times over, and that is most
of what it holds: `trim_text` does without. A GPU's allocator adds its rounding.
"""

import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vidaccel.bench.measures.flops import planned_trunk, width
from vidaccel.families.base import BlockList, DiTFamily
from vidaccel.families.costs import Argument
from vidaccel.families.walk import call_block, latent_channels, patch_of
from vidaccel.forecasters.registry import FORECASTERS, forecaster_class
from vidaccel.models.live_bytes import FusedAttention, LiveBytes, NothingMasked
from vidaccel.runtime.fuse import take_any_mask


class CacheBytes(NamedTuple):
    """What a kind of cheap pass keeps for one video."""

    each: int
    """Bytes from each full pass that it looks back on."""
    newest: int
    """Bytes on top, from the last of them."""


def cache_bytes(
    model: nn.Module, family: DiTFamily, rows: Mapping[str, int], dtype: torch.dtype
) -> dict[str, CacheBytes]:
    """What each kind of cheap pass keeps, by the names that `MethodConfig.on_skipped` knows.

    Forecasters keep the tokens that leave the trunk, and from the last full pass what the family's `static_embedders`
    gave, or, of those that answer a whole pass, the latents that went in and the velocities that came out; `branches`
    and `attention` keep tokens of every block.
    """
    costs, planned = family.costs, planned_trunk(model, family, rows)
    depths = {name: len(model.get_submodule(name)) for name in costs.blocks}
    own = dict(zip(costs.fusions, planned.widths, strict=False))  # of streams that are not as wide as the video

    def numbers(streams: Iterable[str]) -> int:
        return sum(rows[stream] * own.get(stream, planned.width) for stream in streams)

    kept = {
        "branches": sum(depths[name] * numbers(block.branches) for name, block in costs.blocks.items()),
        "attention": sum(depths[name] * numbers(q for q, *_ in a.attentions) for name, a in costs.blocks.items()),
    }
    size = {kind: CacheBytes(count * dtype.itemsize, 0) for kind, count in kept.items()}
    trunk = CacheBytes(
        each=sum(N * D for N, D in planned.kinds) * dtype.itemsize,
        newest=sum(_bytes(each, model, rows, dtype) for each in costs.static_embedders),
    )
    latent = rows["video"] * math.prod(patch_of(model)) * latent_channels(model) * dtype.itemsize
    forecasters = {
        name: CacheBytes(2 * latent, 0) if forecaster_class(name).costs(planned).answers_pass else trunk
        for name in FORECASTERS
    }
    return {**forecasters, **size}


def _bytes(argument: Argument, model: nn.Module, rows: Mapping[str, int], dtype: torch.dtype) -> int:
    return argument.copies * math.prod(_shape(argument, model, rows)) * _dtype(argument, dtype).itemsize


def _shape(argument: Argument, model: nn.Module, rows: Mapping[str, int]) -> list[int]:
    config: Any = model.config
    head = config.attention_head_dim
    sizes = {**rows, "width": width(model), "head": head, "half": head // 2}
    return [
        math.prod(config[key] for key in size) if isinstance(size, tuple) else sizes.get(size, config.get(size, size))
        for size in argument.shape
    ]


def _dtype(argument: Argument, of_model: torch.dtype) -> torch.dtype:
    return of_model if argument.dtype == "model" else getattr(torch, argument.dtype)


def activation_bytes(model: nn.Module, family: DiTFamily, rows: Mapping[str, int], trim_text: bool = False) -> int:
    """Most bytes alive at once in a block of a `model` on the meta device, arguments included; as the stock model runs,
    or with `trim_text`, which leaves blocks without a mask."""
    return max(_block_bytes(model, family, block_list, rows, trim_text) for block_list in family.all_lists)


def _block_bytes(
    model: nn.Module, family: DiTFamily, block_list: BlockList, rows: Mapping[str, int], trim_text: bool
) -> int:
    block = model.get_submodule(block_list.name)[0]
    undo = take_any_mask(block, family) if trim_text and family.needs_mask else None
    with torch.no_grad(), LiveBytes() as live, FusedAttention(), NothingMasked():
        arguments = block_arguments(model, family, block_list, rows)
        if trim_text and block_list.mask is not None:
            arguments[block_list.mask] = None
        call_block(block_list, block, arguments)
    if undo is not None:
        undo()
    return live.peak


def block_arguments(
    model: nn.Module, family: DiTFamily, block_list: BlockList, rows: Mapping[str, int]
) -> dict[str, Tensor | tuple[Tensor, ...] | dict[str, Tensor] | int | None]:
    """The arguments of a block's call, one video, empty, on the device and in the dtype of the model."""
    like = next(model.parameters())
    tokens = {"hidden_states": "video", "encoder_hidden_states": "text"}
    if len(family.costs.fusions) == len(block_list.returns):
        tokens |= dict(zip(block_list.returns, family.costs.fusions, strict=True))
    known: dict[str, Argument | str | None] = {
        name: Argument((1, stream, block_list.widths.get(name, "width"))) for name, stream in tokens.items()
    }
    known |= family.costs.blocks[block_list.name].arguments
    given = {}
    for name in block_list.arguments:
        argument = known[name]
        if not isinstance(argument, Argument):
            given[name] = argument and rows[argument]
            continue
        shape, dtype = _shape(argument, model, rows), _dtype(argument, like.dtype)
        tensors = tuple(torch.zeros(shape, dtype=dtype, device=like.device) for _ in range(argument.copies))
        given[name] = tensors if argument.copies > 1 else tensors[0]
        if argument.names:
            given[name] = dict.fromkeys(argument.names, tensors[0])
    return given
