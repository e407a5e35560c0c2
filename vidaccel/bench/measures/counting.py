"""What really happens in a generation, pass by pass: FLOPs from the shapes that each operation met, and the bytes that
caches hold in between.

No hook of a cache can hide anything from it, since it sees the calls that reach torch's functions: what a cache left
out is what is missing. Attention is seen where diffusers hands it to a backend, since few backends are torch's own.
Counted are the same operations as in flops.py, so that a full pass comes to the formula's number. Watching costs time,
so nothing is timed meanwhile, and compiled blocks run as they were written.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import groupby
from operator import attrgetter
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from vidaccel.compat.diffusers import attention_backends, hook_registry
from vidaccel.compat.torch import storage_key
from vidaccel.families.walk import denoisers_of
from vidaccel.models.grid import current_step
from vidaccel.models.loading import LoadedPipeline


@dataclass(frozen=True)
class CountedPass:
    """One forward pass of a denoiser."""

    step: int
    """Of the sampler, from 0."""
    flops: int
    """Of the whole batch."""
    held: int
    """Bytes that caches kept when it had ended."""


class Observer(TorchFunctionMode):
    """`with Observer(loaded) as seen: loaded.pipe(...)`, then `seen.passes`."""

    def __init__(self, loaded: LoadedPipeline):
        super().__init__()
        self.passes: list[CountedPass] = []
        self._pipe = loaded.pipe
        self._denoisers = denoisers_of(loaded.pipe, loaded.family)
        self._flops: int | None = None

    @property
    def flops(self) -> int:
        """Of all passes."""
        return sum(each.flops for each in self.passes)

    @property
    def held(self) -> int:
        """Most bytes that caches kept."""
        return max((each.held for each in self.passes), default=0)

    @property
    def full(self) -> list[bool]:
        """Whether each pass computed as much as the one in its place in the first step, which no cache can shorten.

        The two passes of guidance need not compute the same: text that is cut to its length has two lengths.
        """
        steps = [list(passes) for _, passes in groupby(self.passes, key=attrgetter("step"))]
        return [each.flops == first.flops for passes in steps for each, first in zip(passes, steps[0], strict=True)]

    @property
    def full_steps(self) -> list[int]:
        """Steps all of whose passes were full."""
        shortened = {each.step for each, full in zip(self.passes, self.full, strict=True) if not full}
        return sorted({each.step for each in self.passes} - shortened)

    def __enter__(self) -> "Observer":
        self._hooks = [module.register_forward_pre_hook(self._begin) for module in self._denoisers]
        self._hooks += [module.register_forward_hook(self._end) for module in self._denoisers]
        self._eager = torch.compiler.set_stance("force_eager")
        self._eager.__enter__()
        self._backends = dict(attention_backends())
        attention_backends().update({name: self._counting(attend) for name, attend in self._backends.items()})
        return super().__enter__()

    def __exit__(self, *error) -> None:
        for hook in self._hooks:
            hook.remove()
        super().__exit__(*error)
        attention_backends().update(self._backends)
        self._eager.__exit__(*error)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if self._flops is not None and func in COUNTED:
            self._flops += COUNTED[func](result, *args, **(kwargs or {}))
        return result

    def _counting(self, attend: Callable[..., Any]) -> Callable[..., Any]:
        """A backend of [B, N, H, d] by [B, M, H, d], whatever it calls for that."""

        def counting(query: Tensor, key: Tensor, **others: Any) -> Any:
            before = self._flops
            result = attend(query=query, key=key, **others)
            if before is not None:
                self._flops = before + 4 * query.numel() * key.shape[1]
            return result

        return counting

    def _begin(self, module: nn.Module, inputs: tuple) -> None:
        self._flops, self._step = 0, current_step(self._pipe.scheduler).index

    def _end(self, module: nn.Module, inputs: tuple, output: Any) -> None:
        flops, self._flops = self._flops, None
        grid = self._pipe.scheduler.timesteps, self._pipe.scheduler.sigmas
        self.passes.append(CountedPass(self._step, flops, sum(held_bytes(each, but=grid) for each in self._denoisers)))


def _linear(result: Tensor, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> int:
    return 2 * input.numel() * len(weight)


def _convolution(result: Tensor, input: Tensor, weight: Tensor, *more: Any, **options: Any) -> int:
    return 2 * weight.numel() * result.numel() // result.shape[1]


def _attention(result: Tensor, query: Tensor, key: Tensor, value: Tensor, *more: Any, **options: Any) -> int:
    """Scores and values: [B, H, N, d] by [B, H, M, d] each."""
    return 4 * query.numel() * key.shape[-2]


def _product(result: Tensor, left: Tensor, right: Tensor) -> int:
    return 2 * result.numel() * left.shape[-1]


def _added_product(result: Tensor, to: Tensor, left: Tensor, right: Tensor) -> int:
    return _product(result, left, right)


COUNTED = {
    F.linear: _linear,
    F.conv3d: _convolution,
    F.scaled_dot_product_attention: _attention,
    torch.matmul: _product,
    Tensor.matmul: _product,
    Tensor.__matmul__: _product,
    torch.addmm: _added_product,
}
"""FLOPs of a call from its result and its arguments. None of our fused kernels multiplies by weights."""


def held_bytes(transformer: nn.Module, but: tuple[Tensor, ...] = ()) -> int:
    """Bytes of the tensors that hooks of diffusers' kind on the transformer and its modules hold, each storage once.

    Weights are not counted, nor the tensors in `but`.
    """
    registries = [registry for module in transformer.modules() if (registry := hook_registry(module)) is not None]
    known = {
        storage_key(tensor.untyped_storage()) for tensor in (*transformer.parameters(), *transformer.buffers(), *but)
    }
    held = _tensors([registry.hooks for registry in registries], set())
    storages = {storage_key(tensor.untyped_storage()): tensor.untyped_storage().nbytes() for tensor in held}
    return sum(size for storage, size in storages.items() if storage not in known)


def _tensors(found: Any, seen: set[int]) -> Iterator[Tensor]:
    """Every tensor within containers and plain objects; modules and functions are looked into by no cache."""
    if isinstance(found, Tensor):
        yield found
    elif id(found) not in seen and not isinstance(found, nn.Module | type) and not callable(found):
        seen.add(id(found))
        inner = found.values() if isinstance(found, dict) else found if isinstance(found, list | tuple | set) else ()
        for each in (*inner, *getattr(found, "__dict__", {}).values()):
            yield from _tensors(each, seen)
