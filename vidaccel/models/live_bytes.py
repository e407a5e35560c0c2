"""Bytes of tensors as operations make them and let them go, on any device, the meta device included."""

import weakref
from collections.abc import Iterable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from vidaccel.compat.torch import TorchDispatchMode, is_traceable_wrapper_subclass, storage_key, tree_leaves


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
