"""What every fused op asks of its tensors, in one wording."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

FUSED_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
WIDEST = 8192
"""Numbers in a row, of which the norms hold several in registers; the widest supported model has 5120."""


def check_tensors(op: str, *tensors: Tensor) -> None:
    """Raises unless every tensor has a type that the fused kernels compute in, and all are on one device."""
    for tensor in tensors:
        if tensor.device != tensors[0].device:
            raise ValueError(f"{op}: all tensors must be on one device, not on {tensors[0].device} and {tensor.device}")
        if tensor.dtype not in FUSED_DTYPES:
            supported = ", ".join(str(dtype).removeprefix("torch.") for dtype in FUSED_DTYPES)
            raise ValueError(f"{op}: the fused kernel takes {supported}, not {tensor.dtype}; use kernels=reference")


def check_width(op: str, width: int, widest: int = WIDEST) -> None:
    """Raises for a row that registers cannot hold: the kernel would run, from memory, and slowly."""
    if width > widest:
        raise ValueError(f"{op}: the fused kernel takes rows of up to {widest}, not {width}; use kernels=reference")


def check_shape(op: str, name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    """Raises unless `tensor` has exactly this shape: the kernels do not broadcast."""
    if tuple(tensor.shape) != tuple(shape):
        raise ValueError(f"{op}: {name} has shape {tuple(tensor.shape)}, expected {tuple(shape)}")


def dense_rows(tensor: Tensor) -> Tensor:
    """`tensor` itself, or a copy if its last dimension is strided: the kernels read rows with wide loads."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def on_its_device(body: Callable[..., Any]) -> Callable[..., Any]:
    """An op's body run with its tensors' device as the current one: Triton launches there, wherever they are."""

    @functools.wraps(body)
    def run(first: Tensor | list[Tensor], *others):
        with torch.cuda.device_of(first[0] if isinstance(first, list) else first):
            return body(first, *others)

    return run
