"""Private parts of PyTorch."""

from collections.abc import Callable, MutableMapping
from types import MethodType
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

# A mode that sees every operation, and what quantised weights are made of: extension points that PyTorch's own
# documentation of subclasses names under these paths, for want of public ones.
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass

__all__ = [
    "CPU_ATTENTION",
    "FP8_PRODUCT",
    "INT8_PRODUCT",
    "KeepsFloat32",
    "KeepsTypes",
    "TorchDispatchMode",
    "add_all",
    "call_of",
    "compiled_call",
    "composite",
    "convolved",
    "convolved_by_onednn",
    "forget_groups",
    "forward_hooks",
    "forward_pre_hooks",
    "has_cpp_compiler",
    "is_sharded",
    "is_traceable_wrapper_subclass",
    "lerp_all",
    "recompile_limit",
    "scale_all",
    "scaled_product",
    "set_compiled_call",
    "set_convolution",
    "set_recompile_limit",
    "storage_key",
    "uncompiled",
]

# What these operations are called where PyTorch counts operations, which knows neither.
CPU_ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
INT8_PRODUCT = torch.ops.aten._int_mm

FP8_PRODUCT = torch.ops.aten._scaled_mm
FAST_ACCUMULATION = True
"""Sums of such products are taken as Hopper's tensor cores hold them, with fewer digits than float32, instead of every
few of them added up in float32: faster, and little beside what rounding to float8 costs each factor."""


def composite(operation: Any) -> bool:
    """Whether an operation that a mode sees is made of others, which `operation.decompose` calls."""
    return operation._can_decompose()


def forward_hooks(module: nn.Module) -> MutableMapping[int, Callable]:
    """The hooks after its forward, by the key that taking one out needs; PyTorch lists them nowhere."""
    return module._forward_hooks


def forward_pre_hooks(module: nn.Module) -> MutableMapping[int, Callable]:
    """As `forward_hooks`, before its forward."""
    return module._forward_pre_hooks


def compiled_call(module: nn.Module) -> Callable | None:
    """What takes the place of calling the module: `module.compile()` sets it, and nothing public tells."""
    return module._compiled_call_impl


def set_compiled_call(module: nn.Module, call: Callable | None) -> None:
    """Let `call` be called in the module's place, its hooks included; None is the module as it was made."""
    vars(module).pop("_compiled_call_impl", None)
    if call is not None:
        module._compiled_call_impl = call


def uncompiled(module: Any) -> Any:
    """What `torch.compile(module)` was made of; anything else is itself."""
    return getattr(module, "_orig_mod", module)


def call_of(module: nn.Module) -> Callable:
    """The module's forward with its hooks, whatever `compiled_call` says; `module(...)` would go there."""
    return module._call_impl


def set_convolution(conv: nn.Conv3d, function: Callable[[nn.Conv3d, Tensor, Tensor, Tensor | None], Tensor]) -> None:
    """Let function(conv, input, weight, bias) convolve, also in classes that pad first; a copy has it too."""
    conv._conv_forward = MethodType(function, conv)


def convolved(conv: nn.Conv3d, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """What a convolution gives as it was made."""
    return type(conv)._conv_forward(conv, input, weight, bias)


def convolved_by_onednn(conv: nn.Conv3d, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The same by oneDNN, whatever PyTorch would choose, for numbers as padding; it has no public name."""
    padding = cast("tuple[int, ...]", conv.padding)
    return torch.mkldnn_convolution(input, weight, bias, padding, conv.stride, conv.dilation, conv.groups)


def scaled_product(
    a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, out_dtype: torch.dtype, bias: Tensor | None = None
) -> Tensor:
    """(a scale_a) (b scale_b) + bias, [M, N] in `out_dtype`, which on a CUDA device is bfloat16.

    From float8 a [M, K] with contiguous rows and b [K, N] with contiguous columns, scales [M, 1] and [1, N] in float32,
    bias [N] in `out_dtype`; K and N are multiples of 16, M need not be one.
    """
    # Not nn.functional.scaled_mm, which later versions have: torch.compile of 2.11 cannot trace it.
    return torch._scaled_mm(a, b, scale_a, scale_b, bias, None, out_dtype, FAST_ACCUMULATION)


class KeepsFloat32(nn.Module):
    """A module whose own tensors go to other devices and to no other type than float32.

    `to`, `half` and `cuda` all end in this one method, and which parts they leave alone cannot be told in another way.
    """

    def _apply(self, fn, recurse=True):
        def kept(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == torch.float32 else tensor.float().to(moved.device)  # unrounded

        return super()._apply(kept, recurse)


class KeepsTypes(nn.Module):
    """A module whose own tensors go to other devices and stay in the types that they are in: a cast, which would round
    them, only says what the results are to be in."""

    results: torch.dtype

    def _apply(self, fn, recurse=True):
        def kept(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        device = next(self.parameters()).device
        self.results = fn(torch.empty(0, dtype=self.results, device=device)).dtype
        return super()._apply(kept, recurse)


def storage_key(storage: torch.UntypedStorage) -> int:
    """The same number for the same memory; addresses are all 0 on the meta device."""
    return storage._cdata


def lerp_all(tensors: list[Tensor], towards: list[Tensor], weight: float) -> None:
    """Move each tensor that share of the way, in place, in one call; the optimizers' own way of many tensors."""
    torch._foreach_lerp_(tensors, towards, weight)


def scale_all(tensors: list[Tensor], by: float | Tensor) -> None:
    """Multiply each tensor by a number, in place, in one call."""
    torch._foreach_mul_(tensors, by)


def add_all(tensors: list[Tensor], others: list[Tensor]) -> None:
    """Add to each tensor its own other one, in place, in one call."""
    torch._foreach_add_(tensors, others)


LOADED_BY_FSDP = "torch._dynamo"
"""What sharding a model imports, for seconds; a server that processes are forked from loads it beforehand."""


def is_sharded(module: nn.Module) -> bool:
    """Whether FSDP2 shards this very module, told by the name of its class, which takes seconds to import."""
    return any(of.__name__ == "FSDPModule" for of in type(module).__mro__)


def recompile_limit() -> int:
    """How many graphs torch.compile makes of one function; public only in later versions than 2.8."""
    return torch._dynamo.config.recompile_limit


def set_recompile_limit(limit: int) -> None:
    torch._dynamo.config.recompile_limit = limit


def has_cpp_compiler() -> bool:
    """Whether torch.compile finds a C++ compiler, which it would only say while it compiles."""
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        return False
    return True


def forget_groups(mesh: DeviceMesh) -> None:
    """Let go of a mesh's process groups, which it keeps beyond `destroy_process_group`; older ones keep only names."""
    vars(mesh).get("_pg_registry", {}).clear()
