"""What happens in a generation, pass by pass: FLOPs of all that ran, and the bytes that caches hold in between.

No hook of a cache can hide anything from it, since PyTorch's counter sees what is computed: what a cache left out is
what is missing. Attention is counted where diffusers hands it to a backend, since few backends are PyTorch's own. A
full pass comes to the number of the formula in flops.py. Watching costs time, so nothing is timed meanwhile, and
compiled blocks run as they were written.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import groupby
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from vidaccel.cache.whole_pass import scalars_on
from vidaccel.compat.cache_dit import kept_by
from vidaccel.compat.diffusers import attention_backends, hook_registry
from vidaccel.compat.torch import CPU_ATTENTION, FP8_PRODUCT, INT8_PRODUCT, TorchDispatchMode, composite, storage_key
from vidaccel.families.walk import denoisers_of, passes_of_call
from vidaccel.models.grid import step_of
from vidaccel.models.loading import LoadedPipeline


@dataclass(frozen=True)
class CountedPass:
    """One forward pass of a denoiser."""

    step: int
    """Of the sampler, from 0."""
    flops: int
    """Of the whole batch; of its half where the two passes of guidance are one call."""
    held: int
    """Bytes that caches kept when it had ended."""


class Observer:
    """`with Observer(loaded) as seen: loaded.pipe(...)`, then `seen.passes`."""

    def __init__(self, loaded: LoadedPipeline):
        self.passes: list[CountedPass] = []
        self._pipe, self._family = loaded.pipe, loaded.family
        self._denoisers = denoisers_of(loaded.pipe, loaded.family)
        self._counter = Flops()
        self._corrected = 0
        """FLOPs of attention that the counter did not see."""
        self._stack = ExitStack()

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
        for module in self._denoisers:
            self._stack.callback(module.register_forward_pre_hook(self._begin).remove)
            self._stack.callback(module.register_forward_hook(self._end).remove)
        self._stack.enter_context(torch.compiler.set_stance("force_eager"))
        backends = dict(attention_backends())
        self._stack.callback(attention_backends().update, backends)
        attention_backends().update({name: self._counting(attend) for name, attend in backends.items()})
        self._stack.enter_context(self._counter)
        return self

    def __exit__(self, *error) -> None:
        self._stack.close()

    def _counting(self, attend: Callable[..., Any]) -> Callable[..., Any]:
        """A backend of [B, N, H, d] by [B, M, H, d], whatever it calls for that."""

        def counting(query: Tensor, key: Tensor, **others: Any) -> Any:
            before = self._total()
            result = attend(query=query, key=key, **others)
            self._corrected += before + 4 * query.numel() * key.shape[1] - self._total()
            return result

        return counting

    def _total(self) -> int:
        return self._counter.total + self._corrected

    def _begin(self, module: nn.Module, inputs: tuple) -> None:
        self._before, self._step = self._total(), step_of(self._pipe).index

    def _end(self, module: nn.Module, inputs: tuple, output: Any) -> None:
        scheduler = self._pipe.scheduler
        grid = scheduler.timesteps, getattr(scheduler, "sigmas", scheduler.timesteps)
        held = sum(held_bytes(each, but=grid) for each in self._denoisers)
        passes = passes_of_call(self._pipe, self._family)
        self.passes += [CountedPass(self._step, (self._total() - self._before) // passes, held)] * passes


class Flops(TorchDispatchMode):
    """What PyTorch's counter counts, in total alone: it asks at each operation which modules it is in, for most of the
    time that counting takes. Operations of higher order, such as conditions, PyTorch refuses under it."""

    def __init__(self):
        super().__init__()
        self.total = 0
        self._formulas = FlopCounterMode(display=False, custom_mapping=FORMULAS).flop_registry
        self._known: dict[Any, tuple[bool, Callable[..., int] | None]] = {}
        """Whether each operation is made of others, and its formula."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func not in self._known:
            self._known[func] = composite(func), self._formulas.get(func.overloadpacket)
        made_of_others, formula = self._known[func]
        if made_of_others:
            with self:
                return func.decompose(*args, **kwargs)
        result = func(*args, **kwargs)
        if formula is not None:
            self.total += formula(*args, **kwargs, out_val=result)
        return result


def _attention(query: Sequence[int], key: Sequence[int], *others: Any, out_shape: Any = None, **options: Any) -> int:
    """Scores and values, from shapes [B, H, N, d] and [B, H, M, d]."""
    return 4 * math.prod(query) * key[-2]


def _product(left: Sequence[int], right: Sequence[int], *others: Any, out_shape: Any = None, **options: Any) -> int:
    return 2 * math.prod(left) * right[-1]


FORMULAS = {
    CPU_ATTENTION: _attention,
    INT8_PRODUCT: _product,
    FP8_PRODUCT: _product,
}
"""Of operations that PyTorch's counter takes for none: attention on a CPU, and products of int8 and float8 weights."""


def held_bytes(transformer: nn.Module, but: tuple[Tensor, ...] = ()) -> int:
    """Bytes of the tensors that caches hold, each storage once: hooks of diffusers' kind on the transformer and its
    modules, cache-dit, and scalars in its place.

    Weights are not counted, nor the tensors in `but`.
    """
    registries = [registry for module in transformer.modules() if (registry := hook_registry(module)) is not None]
    known = {
        storage_key(tensor.untyped_storage()) for tensor in (*transformer.parameters(), *transformer.buffers(), *but)
    }
    scalars = scalars_on(transformer)
    caches = [*(registry.hooks for registry in registries), kept_by(transformer), scalars and scalars.remembered]
    held = _tensors(caches, set())
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
