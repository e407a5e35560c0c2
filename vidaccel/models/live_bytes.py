"""Bytes of tensors as operations make them and let them go, on any device, the meta device included."""

import weakref
from collections.abc import Iterable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from vidaccel.compat.torch import TorchDispatchMode, is_traceable_wrapper_subclass, storage_key


class LiveBytes(TorchDispatchMode):
    """Follows the storages that operations inside make, until the last tensor that shares them is gone.

    It sees any device, meta included, which torch's own allocator statistics do not.
    """

    def __init__(self):
        super().__init__()
        self.peak, self.now = 0, 0
        """Bytes that were alive at most, and that are."""
        self.largest = 0
        """Elements of the largest tensor that was made."""
        self._live: dict[int, weakref.ref] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if type(result) is Tensor and storage_key(result.untyped_storage()) in self._live:  # as of most operations
            return result
        made = {key: storage for storage in _storages(result) if (key := storage_key(storage)) not in self._live}
        if made:
            for storage in _storages((args, kwargs)):  # a view of a weight makes nothing
                made.pop(storage_key(storage), None)
            for key, storage in made.items():
                self._follow(key, storage)
            self.peak = max(self.peak, self.now)
            self.largest = max(self.largest, *(tensor.numel() for tensor in _tensors(result)))
        return result

    def _follow(self, key: int, storage: torch.UntypedStorage) -> None:
        size = storage.nbytes()

        def gone(_: weakref.ref) -> None:
            del self._live[key]
            self.now -= size

        self._live[key] = weakref.ref(storage, gone)
        self.now += size


def weight_bytes(modules: Iterable[nn.Module]) -> int:
    """Of all parameters and buffers, each storage once."""
    weights = [weight for module in modules for weight in (*module.parameters(), *module.buffers())]
    return sum({storage_key(storage): storage.nbytes() for storage in _storages(weights)}.values())


def _storages(tree: object) -> Iterator[torch.UntypedStorage]:
    """Of all tensors in what an operation takes or gives."""
    return (tensor.untyped_storage() for tensor in _tensors(tree))


def _tensors(tree: object) -> Iterator[Tensor]:
    """One tensor, or those in lists and dictionaries of such."""
    if isinstance(tree, Tensor):
        if is_traceable_wrapper_subclass(tree):  # quantised weights are made of others, with no storage of their own
            for name in tree.__tensor_flatten__()[0]:
                yield from _tensors(getattr(tree, name))
        else:
            yield tree
    elif isinstance(tree, list | tuple | dict):
        for each in tree.values() if isinstance(tree, dict) else tree:
            yield from _tensors(each)


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


class NothingMasked(TorchFunctionMode):
    """Tells blocks that ask a mask where it is set that it is everywhere, since the meta device cannot say."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.nonzero:
            return torch.empty(args[0].numel(), args[0].ndim, dtype=torch.int64, device=args[0].device)
        return func(*args, **(kwargs or {}))


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


class Unwritten(TorchFunctionMode):
    """Leaves writes into parts of a tensor out: HunyuanVideo-1.5 makes its mask by one for each token."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        return None if func is Tensor.__setitem__ else func(*args, **(kwargs or {}))
