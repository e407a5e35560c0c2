"""fp8 beside bf16, uncompiled: a linear layer and full passes; blocks and what is compiled are in passes.py.

A layer in fp8 has its input quantised in its time, by the fused kernel on a GPU; beside it stands the product alone.
"""

import functools

import torch
from diffusers import HunyuanVideoTransformer3DModel
from torch import nn

from studies.gpu.measure import DEVICE, Rows
from studies.gpu.model import Shape, build, inputs, quantized, running
from studies.gpu.ops import Size
from studies.gpu.passes import FUSED
from vidaccel.runtime.fp8 import Fp8Linear


@torch.no_grad()
def run_fp8(rows: Rows, shapes: list[Shape]) -> None:
    """At each size, the smallest first in `shapes`."""
    small, large = shapes[0], shapes[-1]
    for shape in shapes:
        with rows.attempt("linear", "preparation", shape.row()):
            _layer(rows, shape)
    model = build(small)
    for shape in (large, small):
        _full(rows, model, shape, FUSED)
    if quantized(rows, small, model, "fp8"):
        for shape in (large, small):
            _full(rows, model, shape, f"{FUSED}, fp8")


def _layer(rows: Rows, shape: Shape) -> None:
    """The first layer of a feed-forward, [N, D] to [N, 4 D]."""
    width = shape.heads * shape.head_dim
    size = Size(shape.tokens, shape.heads, shape.head_dim)
    plain = nn.Linear(width, 4 * width, device=DEVICE, dtype=size.dtype)
    ours = Fp8Linear(plain)
    x = size.normal(1, shape.tokens, width)
    product = functools.partial(ours, ours.rows(x))
    calls = {
        "bf16": functools.partial(plain, x),
        "fp8": functools.partial(ours, x),
        "fp8, product alone": product,
    }
    for variant, call in calls.items():
        rows.measure("linear", variant, shape.row(), call, flops=8 * shape.tokens * width**2)


def _full(rows: Rows, model: HunyuanVideoTransformer3DModel, shape: Shape, variant: str) -> None:
    with rows.attempt("full pass", variant, shape.row()), running(model, variant):
        call = functools.partial(model, **inputs(shape))
        few = {"budget": 1.0, "most": 5} if shape.tokens < 20_000 else {"budget": 0.0, "most": 2}
        rows.measure("full pass", variant, shape.row(), call, flops=shape.flops(variant), warmup=1, **few)
