"""fp8 beside bf16, uncompiled and compiled: a linear layer, full passes, a block of each kind.

A layer in fp8 has its input quantised in its time, by the fused kernel on a GPU; beside it stands the product alone.
The largest passes are not compiled: that gains where launches cost.
"""

import functools
from dataclasses import replace

import torch
from diffusers import HunyuanVideoTransformer3DModel
from torch import nn

from studies.gpu.measure import DEVICE, Rows, compiled
from studies.gpu.model import Shape, build, inputs, quantized, running
from studies.gpu.ops import Size
from studies.gpu.passes import EVERYTHING, measure_blocks
from vidaccel.runtime.fp8 import Fp8Linear

FUSED = "trimmed, fused"


@torch.no_grad()
def run_fp8(rows: Rows, shapes: list[Shape]) -> None:
    """At each size, the smallest first in `shapes`."""
    small, large = shapes[0], shapes[-1]
    for shape in shapes:
        with rows.attempt("linear", "preparation", shape.row()):
            _layer(rows, shape)
    passes = [(large, FUSED), (small, FUSED), (small, EVERYTHING)]
    model = build(small)
    for shape, variant in passes:
        _full(rows, model, shape, variant)
    if quantized(rows, small, model, "fp8"):
        for shape, variant in passes:
            _full(rows, model, shape, f"{variant}, fp8")
    torch.compiler.reset()
    model = build(replace(small, double_blocks=1, single_blocks=1))
    for variant in (FUSED, EVERYTHING):
        measure_blocks(rows, model, small, variant)
    if quantized(rows, small, model, "fp8"):
        for variant in (FUSED, EVERYTHING):
            measure_blocks(rows, model, small, f"{variant}, fp8")


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
        "bf16, compiled": functools.partial(compiled(plain), x),
        "fp8, compiled": functools.partial(compiled(ours), x),
    }
    for variant, call in calls.items():
        rows.measure("linear", variant, shape.row(), call, flops=8 * shape.tokens * width**2)


def _full(rows: Rows, model: HunyuanVideoTransformer3DModel, shape: Shape, variant: str) -> None:
    with rows.attempt("full pass", variant, shape.row()), running(model, variant):
        call = functools.partial(model, **inputs(shape))
        few = {"budget": 1.0, "most": 5} if shape.tokens < 20_000 else {"budget": 0.0, "most": 2}
        warmup = 2 if "compiled" in variant else 1
        rows.measure("full pass", variant, shape.row(), call, flops=shape.flops(variant), warmup=warmup, **few)
