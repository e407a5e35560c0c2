"""Weights that wait on the CPU while nothing needs them, by diffusers' ways of offload.

    offload(pipe, family, "group", device)      # of a pipeline on the CPU, after `prepare` and before `attach`

`group` moves each block of the trunk to the device for its own call. Embedders, output head and autoencoders stay
there, as do the predictor and what is cached, so that a predicted step moves no weights at all; text encoders and what
else there is move layer by layer, once a video. `model` has one model of the pipeline on the device at a time, and
`sequential` one layer. Quantised weights move as they are, in half the bytes.
"""

import torch
from diffusers import DiffusionPipeline
from diffusers.hooks import apply_group_offloading
from torch import nn

from vidaccel.errors import UserError
from vidaccel.families.base import DiTFamily
from vidaccel.families.walk import denoisers_of

CPU = torch.device("cpu")


def check_offload(how: str, device: torch.device, compiled: bool) -> None:
    """`UserError` where offload makes no sense, or does not go with compiled blocks."""
    if how == "none":
        return
    if device.type == "cpu":
        raise UserError(
            f"offload={how} moves weights between the CPU and a device, and the model runs on the CPU",
            "leave it out, or take --device cuda",
        )
    if compiled:
        raise UserError(
            f"offload={how} came with compile=true, whose CUDA graphs keep weights where they were", "set compile=false"
        )


def offload(pipe: DiffusionPipeline, family: DiTFamily, how: str, device: torch.device) -> None:
    """Let a pipeline whose weights are on the CPU run on `device`.

    Args:
        pipe: of `family`, prepared, with nothing attached.
        family: its record.
        how: `group`, `model` or `sequential`.
        device: that it computes on.
    """
    if device.type == "cuda" and device.index is None:  # which accelerate takes for the first
        device = torch.device("cuda", torch.cuda.current_device())
    if how == "model":
        pipe.enable_model_cpu_offload(device=device)
    elif how == "sequential":
        pipe.enable_sequential_cpu_offload(device=device)
    else:
        denoisers = denoisers_of(pipe, family)
        for part in pipe.components.values():
            if any(part is denoiser for denoiser in denoisers):
                offload_trunk(part, family, device)
            elif isinstance(part, nn.Module) and hasattr(part, "decode"):  # not called, which is what a group waits for
                part.to(device)
            elif isinstance(part, nn.Module):
                _offload_beside(part, device)


def _offload_beside(part: nn.Module, device: torch.device) -> None:
    """By layer: blocks may lie deeper than diffusers looks for them. But one attention of PyTorch's reads the weights
    of a layer that it never calls."""
    if any(isinstance(module, nn.MultiheadAttention) for module in part.modules()):
        apply_group_offloading(part, device, CPU, offload_type="block_level", num_blocks_per_group=1)
    else:
        apply_group_offloading(part, device, CPU, offload_type="leaf_level")


def offload_trunk(transformer: nn.Module, family: DiTFamily, device: torch.device) -> None:
    """Each block of the trunk is on the device for its own call and on the CPU otherwise; the rest stays there."""
    trunk, lists = nn.Module(), {kind.name for kind in family.all_lists}
    for name, part in transformer.named_children():
        if name in lists:
            trunk.add_module(name, part)
        else:
            part.to(device)
    for own in (*transformer.parameters(recurse=False), *transformer.buffers(recurse=False)):
        own.data = own.data.to(device)
    apply_group_offloading(trunk, device, CPU, offload_type="block_level", num_blocks_per_group=1)
