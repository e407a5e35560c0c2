"""Linear layers of the trunk in int8 or fp8, weights and activations: fp8 by our own layers (fp8.py), int8 by torchao.

Activations are scaled token by token as they come, weights row by row once. What stays as it is: the layers that make
modulation of the timestep embedding (one row a sample: nothing to gain, and every token depends on them), everything
outside the blocks, and layers whose sides such products cannot take. A quantised model cannot be trained or saved; one
in int8 is fast only when it is compiled.
"""

import importlib.util
import logging

import torch
from torch import nn

from vidaccel.errors import UserError
from vidaccel.families.base import DiTFamily
from vidaccel.runtime.fp8 import quantize_layers

logger = logging.getLogger(__name__)

LEAST_CAPABILITY = {"int8": (8, 0), "fp8": (8, 9)}
"""CUDA compute capability that has products of such numbers."""
SIDES = {"int8": 8, "fp8": 16}
"""Widths of a layer are multiples of this."""


def check_quantization(kind: str, device: torch.device) -> None:
    """Raises `UserError` if the package or the hardware for `kind` is missing."""
    if kind == "none":
        return
    if kind == "int8" and importlib.util.find_spec("torchao") is None:
        raise UserError("quantize=int8, and torchao is not installed", "pip install vidaccel[quant]")
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


def quantize_blocks(transformer: nn.Module, family: DiTFamily, kind: str, kernels: str = "auto") -> list[str]:
    """Quantise the trunk in place; the names of the layers that were, in the order of the trunk.

    Args:
        transformer: of `family`.
        family: its record.
        kind: `int8` or `fp8`.
        kernels: what brings activations to fp8.

    Raises:
        UserError: there is none that could be.
    """
    lists = {block_list.name: transformer.get_submodule(block_list.name) for block_list in family.all_lists}
    taken = {name: quantizable(blocks, kind) for name, blocks in lists.items()}
    if not any(taken.values()):
        raise UserError(
            f"quantize={kind}, and no layer of the trunk has sides that are multiples of {SIDES[kind]}",
            "set quantize=none",
        )
    linear = sum(isinstance(module, nn.Linear) for blocks in lists.values() for module in blocks.modules())
    for name, blocks in lists.items():
        if kind == "fp8":
            quantize_layers(blocks, taken[name], kernels)
        else:
            _by_torchao(blocks, taken[name])
    found = [f"{name}.{layer}" for name, layers in taken.items() for layer in layers]
    logger.info("quantize: %s in %d of %d linear layers of the trunk", kind, len(found), linear)
    return found


def _by_torchao(blocks: nn.Module, names: list[str]) -> None:
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    quantize_(blocks, Int8DynamicActivationInt8WeightConfig(), filter_fn=lambda _, name: name in frozenset(names))


def quantizable(blocks: nn.Module, kind: str) -> list[str]:
    """Names of the linear layers of a block list that are quantised."""
    layers = {name: module for name, module in blocks.named_modules() if isinstance(module, nn.Linear)}
    return [name for name, layer in layers.items() if _takes(kind, name, layer)]


def _takes(kind: str, name: str, layer: nn.Linear) -> bool:
    """Whether to quantise a layer, `name` within its block list; diffusers calls whatever makes modulation a norm.

    In fp8 an adapter's own layers stay as they are: they are too narrow to gain.
    """
    if kind == "fp8" and ".lora_" in name:
        return False
    return "norm" not in name and not layer.in_features % SIDES[kind] and not layer.out_features % SIDES[kind]
