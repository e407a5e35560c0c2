"""Bytes that a pass holds: what caches keep, and the activations of a block as it runs on the meta device.

Activations are what lives inside one block beside the weights, at its highest, as the stock model runs with an
attention that stores no scores (flash attention and its like). Embedders and head hold less, and the blocks run one
after another. HunyuanVideo-1.5's stock block makes a mask of every pair of tokens, three times over, and that is most
of what it holds. A GPU's allocator adds its rounding.
"""

import math
import weakref
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from vidaccel.bench.measures.flops import planned_trunk, width
from vidaccel.compat.torch import TorchDispatchMode, is_traceable_wrapper_subclass, storage_key, tree_leaves
from vidaccel.families.base import BlockList, DiTFamily
from vidaccel.families.costs import Argument
from vidaccel.families.walk import call_block, patch_of
from vidaccel.forecasters.registry import FORECASTERS, forecaster_class


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
    kept = {
        "branches": sum(depths[name] * rows[s] for name, block in costs.blocks.items() for s in block.branches),
        "attention": sum(depths[name] * rows[q] for name, block in costs.blocks.items() for q, _ in block.attentions),
    }
    size = {kind: CacheBytes(tokens * width(model) * dtype.itemsize, 0) for kind, tokens in kept.items()}
    trunk = CacheBytes(
        each=sum(rows[stream] for stream in costs.fusions) * width(model) * dtype.itemsize,
        newest=sum(_bytes(each, model, rows, dtype) for each in costs.static_embedders),
    )
    config: Any = model.config
    latent = rows["video"] * math.prod(patch_of(model)) * config.out_channels * dtype.itemsize
    forecasters = {
        name: CacheBytes(2 * latent, 0) if forecaster_class(name).costs(planned).answers_pass else trunk
        for name in FORECASTERS
    }
    return {**forecasters, **size}


def _bytes(argument: Argument, model: nn.Module, rows: Mapping[str, int], dtype: torch.dtype) -> int:
    return argument.copies * math.prod(_shape(argument, model, rows)) * _dtype(argument, dtype).itemsize


def _shape(argument: Argument, model: nn.Module, rows: Mapping[str, int]) -> list[int]:
    config: Any = model.config
    sizes = {**rows, "width": width(model), "head": config.attention_head_dim}
    return [sizes.get(size, config.get(size, size)) for size in argument.shape]


def _dtype(argument: Argument, of_model: torch.dtype) -> torch.dtype:
    return of_model if argument.dtype == "model" else getattr(torch, argument.dtype)


def activation_bytes(model: nn.Module, family: DiTFamily, rows: Mapping[str, int]) -> int:
    """Most bytes alive at once in a block of a `model` on the meta device, arguments included."""
    return max(_block_bytes(model, family, block_list, rows) for block_list in family.block_lists)


def _block_bytes(model: nn.Module, family: DiTFamily, block_list: BlockList, rows: Mapping[str, int]) -> int:
    block = model.get_submodule(block_list.name)[0]
    with torch.no_grad(), LiveBytes() as live, FusedAttention():
        call_block(block_list, block, block_arguments(model, family, block_list, rows))
    return live.peak


def block_arguments(
    model: nn.Module, family: DiTFamily, block_list: BlockList, rows: Mapping[str, int]
) -> dict[str, Tensor | tuple[Tensor, ...] | None]:
    """The arguments of a block's call, one video, empty, on the device and in the dtype of the model."""
    like = next(model.parameters())
    tokens = {"hidden_states": "video", "encoder_hidden_states": "text"}
    known: dict[str, Argument | None] = {name: Argument((1, stream, "width")) for name, stream in tokens.items()}
    known |= family.costs.blocks[block_list.name].arguments
    given = {}
    for name in block_list.arguments:
        if (argument := known[name]) is None:
            given[name] = None
            continue
        shape, dtype = _shape(argument, model, rows), _dtype(argument, like.dtype)
        tensors = tuple(torch.zeros(shape, dtype=dtype, device=like.device) for _ in range(argument.copies))
        given[name] = tensors if argument.copies > 1 else tensors[0]
    return given


class LiveBytes(TorchDispatchMode):
    """Follows the storages that operations inside make, until the last tensor that shares them is gone.

    It sees any device, meta included, which torch's own allocator statistics do not.
    """

    def __init__(self):
        super().__init__()
        self.peak = 0
        self._live: dict[int, int] = {}

    @property
    def now(self) -> int:
        """Bytes that are alive."""
        return sum(self._live.values())

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        known = {storage_key(storage) for storage in _storages((args, kwargs))}  # a view of a weight makes nothing
        for storage in _storages(result):
            if storage_key(storage) not in known:
                self._follow(storage)
        self.peak = max(self.peak, self.now)
        return result

    def _follow(self, storage: torch.UntypedStorage) -> None:
        key = storage_key(storage)
        if key not in self._live:
            self._live[key] = storage.nbytes()
            weakref.finalize(storage, self._live.pop, key)


def weight_bytes(modules: Iterable[nn.Module]) -> int:
    """Of all parameters and buffers, each storage once."""
    weights = [weight for module in modules for weight in (*module.parameters(), *module.buffers())]
    return sum({storage_key(storage): storage.nbytes() for storage in _storages(weights)}.values())


def _storages(tree: object) -> list[torch.UntypedStorage]:
    return [part.untyped_storage() for leaf in tree_leaves(tree) if isinstance(leaf, Tensor) for part in _parts(leaf)]


def _parts(tensor: Tensor) -> Iterator[Tensor]:
    """Quantised weights are tensors made of others, and have no storage of their own."""
    if is_traceable_wrapper_subclass(tensor):
        for name in tensor.__tensor_flatten__()[0]:
            yield from _parts(getattr(tensor, name))
    else:
        yield tensor


class FusedAttention(TorchFunctionMode):
    """Answers attention with an empty tensor of its result's size, which is all that a fused kernel allocates, and with
    gradients keeps what such a kernel keeps: queries, keys, values, the result, and a mask that is added to scores."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            names = ("query", "key", "value", "attn_mask")
            given = dict(zip(names, args, strict=False)) | kwargs
            return _Attention.apply(*(given.get(name) for name in names))
        return func(*args, **kwargs)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        result = torch.empty_like(query)
        added = mask.to(query.dtype) if mask is not None and ctx.needs_input_grad[0] else None
        ctx.save_for_backward(query, key, value, result, added)
        return result

    @staticmethod
    def backward(ctx, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return *(torch.empty_like(tensor) for tensor in ctx.saved_tensors[:3]), None
