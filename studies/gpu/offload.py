"""Passes of HunyuanVideo with its weights on the card, and with its trunk offloaded by group (runtime/offload.py).

Seconds of a full and of a predicted one, and the bytes that each brings to the card. Offloaded, they give the same.
"""

import functools
from unittest.mock import patch

import torch
from diffusers.hooks.group_offloading import ModuleGroup
from torch import Tensor

from studies.gpu.measure import CUDA, DEVICE, Rows
from studies.gpu.model import FAMILY, Shape, build, inputs, quantized
from studies.gpu.passes import new_predictor_of
from vidaccel.cache.trunk import Trunk
from vidaccel.forecasters.learned import Predictor
from vidaccel.models.live_bytes import weight_bytes
from vidaccel.runtime.offload import offload_trunk

PASSES = ("full pass", "predicted pass")


def run_offload(rows: Rows, shapes: list[Shape]) -> None:
    """At each size as it is, then offloaded, then offloaded in fp8."""
    for kind in ("", "fp8"):
        model = build(shapes[0])
        predictor = new_predictor_of(model, shapes[0])
        if kind and not quantized(rows, shapes[0], model, kind):
            return
        predictor = predictor.run_like(model)
        expected = {shape: _passes(rows, model, predictor, shape, kind or "whole", {}) for shape in shapes}
        model.to("cpu")
        offload_trunk(model, FAMILY, DEVICE)
        for shape in shapes:
            _passes(rows, model, predictor, shape, f"group, {kind}" if kind else "group", expected[shape])


@torch.no_grad()
def _passes(
    rows: Rows, model: torch.nn.Module, predictor: Predictor, shape: Shape, variant: str, expected: dict[str, Tensor]
) -> dict[str, Tensor]:
    """Measures both kinds of pass, against those `expected`; what they gave."""
    given, made, moved = inputs(shape), {}, []
    onload = ModuleGroup.onload_

    def counted(group: ModuleGroup) -> None:
        moved.append(weight_bytes(group.modules))
        onload(group)

    call = functools.partial(model, **given, return_dict=False)
    few = {"budget": 0.0, "most": 3 if shape.tokens < 20_000 else 1, "warmup": 1}
    with rows.attempt("offload", variant, shape.row()), Trunk(model, FAMILY) as trunk:
        for name, way in zip(PASSES, (trunk.full(0.5), trunk.predicted(predictor, 0.5)), strict=True):
            with way, patch.object(ModuleGroup, "onload_", counted):
                made[name] = call()[0]
                figures = {"moved_bytes": sum(moved), "held_bytes": torch.cuda.memory_allocated() if CUDA else None}
                rows.add(f"memory of a {name}", variant, shape.row(), **figures)
                rows.measure(name, variant, shape.row(), call, exact=expected.get(name), **few)
                moved.clear()
    return made
