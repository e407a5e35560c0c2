"""Whether a transformer still has the weights that its files say: by a few numbers of each matrix of its blocks, those
beside the trunk too, and by the adapters that are active on them.

Files know nothing of a LoRA that was fused into their weights in memory, nor of one that runs beside them; what was
trained for the one model would be taken for the other.

R numbers of a matrix
"""

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from safetensors import safe_open
from torch import Tensor, nn

from vidaccel.families.base import DiTFamily
from vidaccel.families.walk import blocks_of, denoisers_of, side_blocks_of

NUMBERS = 32
"""Of a matrix's first row: B A of a LoRA changes them all."""
ROUNDING = 2**-7
"""Share of a number that casts by way of bfloat16 change at most."""
BASE = ".base_layer"
"""What peft puts into the names of weights that an adapter runs beside."""

PLAIN = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
"""Types of weights that are not quantised."""

Sample = Mapping[str, Tensor]
"""Numbers [R] on the CPU, by the name of their matrix in the transformer's files."""


def trunk_sample(transformer: nn.Module, family: DiTFamily) -> Sample:
    """Of the blocks' matrices in memory, in the type that they are held in; quantised and sharded ones, and those that
    are offloaded layer by layer, are left out."""
    found = {}
    for kind in family.all_lists:
        for name, weight in getattr(transformer, kind.name).named_parameters(prefix=kind.name):
            plain = type(weight) is nn.Parameter and weight.dtype in PLAIN and weight.device.type != "meta"
            if plain and weight.ndim == 2 and ".lora_" not in name:
                found[name.replace(BASE, "")] = weight.detach()[0, :NUMBERS]
    return {name: numbers.to("cpu", copy=True) for name, numbers in found.items()}


def pipeline_sample(pipe: DiffusionPipeline, family: DiTFamily) -> Sample:
    """`trunk_sample` of all denoisers; names of those after the first begin with their attribute."""
    found: dict[str, Tensor] = {}
    for denoiser, transformer in zip(family.denoisers, denoisers_of(pipe, family), strict=True):
        prefix = _prefix(denoiser.attribute, family)
        found |= {prefix + name: numbers for name, numbers in trunk_sample(transformer, family).items()}
    return found


def _prefix(attribute: str, family: DiTFamily) -> str:
    return "" if attribute == family.denoisers[0].attribute else f"{attribute}."


def stored_sample(files: Iterable[tuple[str, Path]], family: DiTFamily) -> Sample:
    """The same of safetensors files, each with the attribute of the denoiser that it is of."""
    lists = tuple(f"{kind.name}." for kind in family.all_lists)
    found = {}
    for attribute, file in files:
        with safe_open(file, framework="pt") as stored:
            for name in stored.keys():  # noqa: SIM118  it is no mapping
                if name.startswith(lists) and len((matrix := stored.get_slice(name)).get_shape()) == 2:
                    found[_prefix(attribute, family) + name] = matrix[0:1, :NUMBERS][0]
    return found


def changed(before: Sample, now: Sample) -> str | None:
    """The name of a matrix that is in both and has other numbers, beyond what casts between types do; None if none."""
    for name in sorted(before.keys() & now.keys()):
        old, new = before[name].float(), now[name].float()
        as_cast = torch.equal(before[name].to(now[name].dtype).float(), new)
        if not as_cast and not torch.allclose(old, new, rtol=ROUNDING, atol=1e-7):
            return name
    return None


def active_adapters(transformer: nn.Module, family: DiTFamily) -> str | None:
    """One hash of the adapters that run beside the blocks' weights, with their scales; None where none does."""
    digest = hashlib.sha256()
    found = False
    blocks = [*blocks_of(transformer, family), *side_blocks_of(transformer, family)]
    for index, (_, block) in enumerate(blocks):
        layers: dict[str, Any] = dict(block.named_modules())
        for name, layer in layers.items():
            merged = set(getattr(layer, "merged_adapters", ()))
            if not hasattr(layer, "active_adapters") or layer.disable_adapters:
                continue
            for adapter in sorted(set(layer.active_adapters) - merged):
                if adapter not in getattr(layer, "scaling", {}) or not layer.scaling[adapter]:
                    continue
                found = True
                digest.update(f"{index}.{name}:{float(layer.scaling[adapter]):.6g}".encode())
                for parts in (getattr(layer, "lora_A", {}), getattr(layer, "lora_B", {})):
                    if adapter not in parts:  # an adapter of another kind is known by its place and scale
                        continue
                    numbers = parts[adapter].weight.detach().flatten()[:NUMBERS].to("cpu", torch.bfloat16)
                    digest.update(numbers.view(torch.int16).numpy().tobytes())
    return digest.hexdigest() if found else None
