"""Linear layers of the trunk in int8 or fp8, weights and activations, by torchao.

Activations are scaled token by token as they come, weights row by row once. What stays as it is: the layers that make
modulation of the timestep embedding (one row a sample: nothing to gain, and every token depends on them), everything
outside the blocks, and layers whose sides such products cannot take. A quantised model cannot be trained or saved, and
is fast only when it is compiled.
"""

import importlib.util
import logging

import torch
from torch import nn

from vidaccel.errors import UserError
from vidaccel.families.base import DiTFamily

logger = logging.getLogger(__name__)

LEAST_CAPABILITY = {"int8": (8, 0), "fp8": (8, 9)}
"""CUDA compute capability that has products of such numbers."""
SIDES = {"int8": 8, "fp8": 16}
"""Widths of a layer are multiples of this."""


def check_quantization(kind: str, device: torch.device) -> None:
    """Raises `UserError` if torchao or the hardware for `kind` is missing."""
    if kind == "none":
        return
    if importlib.util.find_spec("torchao") is None:
        raise UserError(f"quantize={kind}, and torchao is not installed", "pip install vidaccel[quant]")
    if device.type != "cuda":
        if kind == "fp8":
            raise UserError("quantize=fp8 needs a CUDA device", "set quantize=int8, or take --device cuda")
        return
    least, there = LEAST_CAPABILITY[kind], torch.cuda.get_device_capability(device)
    if there < least:
        raise UserError(
            f"quantize={kind} needs compute capability {least[0]}.{least[1]}, and this GPU has {there[0]}.{there[1]}",
            "set quantize=none" if kind == "int8" else "set quantize=int8",
        )


def quantize_blocks(transformer: nn.Module, family: DiTFamily, kind: str) -> list[str]:
    """Quantise the trunk in place; the names of the layers that were, in the order of the trunk.

    Raises:
        UserError: there is none that could be.
    """
    from torchao.quantization import (
        Float8DynamicActivationFloat8WeightConfig,
        Int8DynamicActivationInt8WeightConfig,
        PerRow,
        quantize_,
    )

    config = (
        Int8DynamicActivationInt8WeightConfig()
        if kind == "int8"
        else Float8DynamicActivationFloat8WeightConfig(granularity=PerRow())
    )
    taken, linear = [], 0
    for kind_of_block in family.all_lists:
        blocks = getattr(transformer, kind_of_block.name)
        names = [name for name, module in blocks.named_modules() if isinstance(module, nn.Linear)]
        chosen = quantizable(blocks, kind)
        quantize_(blocks, config, filter_fn=lambda _, name, chosen=frozenset(chosen): name in chosen)
        taken += [f"{kind_of_block.name}.{name}" for name in chosen]
        linear += len(names)
    if not taken:
        raise UserError(
            f"quantize={kind}, and no layer of the trunk has sides that are multiples of {SIDES[kind]}",
            "set quantize=none",
        )
    logger.info("quantize: %s in %d of %d linear layers of the trunk", kind, len(taken), linear)
    return taken


def quantizable(blocks: nn.Module, kind: str) -> list[str]:
    """Names of the linear layers of a block list that are quantised."""
    layers = {name: module for name, module in blocks.named_modules() if isinstance(module, nn.Linear)}
    return [name for name, layer in layers.items() if _takes(kind, name, layer)]


def _takes(kind: str, name: str, layer: nn.Linear) -> bool:
    """Whether to quantise a layer, `name` within its block list; diffusers calls whatever makes modulation a norm."""
    return "norm" not in name and not layer.in_features % SIDES[kind] and not layer.out_features % SIDES[kind]
