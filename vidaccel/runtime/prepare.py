"""How a loaded model is run: kernels, attention backend, text padding, quantised weights, compiled blocks.

    loaded = load_pipeline("path/to/model", device="cuda")
    chosen = prepare(loaded, config)

One call after loading, before anything is attached to the blocks. What it does it does in the one order in which these
go together: a fused block has to be there before its attention is told its backend, before its weights are quantised,
and all of that before it is compiled. By default it does nothing: the stock model, bit for bit. A predictor takes
over all but the quantised weights from the trunk that it stands in for (`Predictor.run_like`).

`check` alone refuses what this machine cannot do, before minutes are spent on loading.
"""

import logging
import math
from dataclasses import replace
from typing import Any

import torch
from diffusers.models.attention_dispatch import AttentionBackendName
from torch import nn

from vidaccel.compat.diffusers import (
    attention_constraints,
    check_attention_backend,
    process_attention,
    set_process_attention,
)
from vidaccel.config.checks import SIZE
from vidaccel.config.runtime import RuntimeConfig
from vidaccel.errors import UserError, nearest
from vidaccel.families.base import DiTFamily
from vidaccel.families.walk import blocks_of, denoisers_of, patch_of
from vidaccel.kernels import select
from vidaccel.models.calling import latent_size
from vidaccel.models.loading import LoadedPipeline
from vidaccel.runtime.attention import Attention, fastest
from vidaccel.runtime.compiled import check_compiler, compile_blocks
from vidaccel.runtime.fuse import fuse
from vidaccel.runtime.quantized import check_quantization, quantize_blocks
from vidaccel.runtime.text_padding import masks_text, trim_text

logger = logging.getLogger(__name__)

AUTO = "auto"
"""The attention backend that is measured to be the fastest."""

CPU_ATTENTION = {"native", "_native_math", "_native_flash", "flex"}
"""Backends that run on a CPU."""
MASKED_ATTENTION = {
    *("native", "_native_math", "_native_efficient", "_native_cudnn", "_native_npu", "flex", "xformers"),
    *("flash_varlen", "flash_varlen_hub", "_flash_varlen_3", "_flash_3_varlen_hub", "sage_varlen"),
}
"""Backends that take a mask."""


def check(config: RuntimeConfig, device: torch.device) -> None:
    """Raises `UserError` for settings that nothing on this machine could follow, whichever the model."""
    select.choose(config.kernels, device)
    _check_attention(config.attention, device)
    check_quantization(config.quantize, device)
    if config.compile:
        check_compiler(device)


def prepare(loaded: LoadedPipeline, config: RuntimeConfig, device: torch.device | None = None) -> dict[str, Any]:
    """Make the pipeline's transformers run as `config` says; what was chosen, by the names of the settings. `device` is
    where they will compute, if their weights are elsewhere.

    Raises:
        UserError: this machine or this model cannot follow a setting, or the blocks are hooked already.
    """
    loaded.decode = config.decode
    transformers = denoisers_of(loaded.pipe, loaded.family)
    device = device or next(transformers[0].parameters()).device
    check(config, device)
    if config.attention == AUTO:
        config = replace(config, attention=_fastest_attention(loaded, config, transformers[0], device))
    kernels = select.choose(config.kernels, device)
    if config.kernels == "auto" and loaded.family.fused is None:
        kernels = "reference"
    if config.trim_text and not masks_text(loaded.family):
        logger.info("trim_text: %s masks no text, so there is nothing to cut", loaded.family.title)
    for transformer in transformers:
        _check_fits(transformer, loaded.family, config, device)
        if kernels == "fused":
            fuse(transformer, config.kernels, device)
        if config.attention != process_attention():
            _set_attention(transformer, config.attention)
        if config.trim_text and masks_text(loaded.family):
            _trim(transformer, loaded.family, config.attention)
        if config.quantize != "none":
            # What brings activations to fp8 is no part of the stock model: by default it is what is fastest.
            ours = "fused" if config.kernels == "fused" else "auto"
            quantize_blocks(transformer, loaded.family, config.quantize, ours)
        if config.compile:
            transformer.to(device)  # where its graphs are to be recorded
            # Texts cut to their length differ in it; everything else keeps its shape.
            compile_blocks(transformer, loaded.family, dynamic=None if config.trim_text else False)
    return {
        "kernels": kernels,
        "attention": config.attention,
        "trim_text": config.trim_text and masks_text(loaded.family),
        "quantize": config.quantize,
        "compile": config.compile,
        "decode": config.decode,
    }


def _fastest_attention(loaded: LoadedPipeline, config: RuntimeConfig, transformer: Any, device: torch.device) -> str:
    """For a video of the size that `config` names, the largest of several, or the model's own."""
    size = [getattr(config, name, None) or loaded.default(name) for name in SIZE]
    if several := getattr(config, "sizes", None):
        size = max(several, key=math.prod)
    latent = latent_size(loaded, **dict(zip(SIZE, size, strict=True)))
    sides = zip(latent, patch_of(transformer), strict=True)
    heads, width = transformer.config.num_attention_heads, transformer.config.attention_head_dim
    masked = masks_text(loaded.family) and not config.trim_text
    tokens = math.prod(side // patch for side, patch in sides)
    return fastest(Attention(tokens, heads, width, _dtype(transformer, loaded.family), masked), device)


def _check_attention(name: str, device: torch.device) -> None:
    if name == AUTO:
        return
    names = [AUTO, *(backend.value for backend in AttentionBackendName)]
    if name not in names:
        raise UserError(f"no attention backend is called {name}", nearest(name, names))
    try:
        check_attention_backend(name)
    except RuntimeError as error:
        raise UserError(f"attention={name} is not possible here: {error}", "or set attention=native") from error
    if device.type != "cuda" and name not in CPU_ATTENTION:
        raise UserError(f"attention={name} needs a CUDA device", "set attention=native, or take --device cuda")


def _check_fits(transformer: nn.Module, family: DiTFamily, config: RuntimeConfig, device: torch.device) -> None:
    """Whether the model's types, head width and masks are what the attention backend and the quantiser take."""
    probe = torch.empty(
        1, 1, 1, transformer.config.attention_head_dim, dtype=_dtype(transformer, family), device=device
    )
    try:
        for fits in attention_constraints(config.attention):
            fits(query=probe, key=probe, value=probe, attn_mask=None, is_causal=False)
    except ValueError as error:
        raise UserError(
            f"attention={config.attention} cannot run this model in {probe.dtype}: {error}",
            "set dtype=bfloat16, or attention=native",
        ) from error
    if config.attention not in MASKED_ATTENTION and masks_text(family) and not config.trim_text:
        raise UserError(
            f"attention={config.attention} takes no mask, and {family.title} masks the padding of its texts",
            "set trim_text=true as well: it cuts the padding off",
        )
    if config.quantize == "fp8" and probe.dtype != torch.bfloat16:
        raise UserError(f"quantize=fp8 goes with bfloat16 and the model is in {probe.dtype}", "set dtype=bfloat16")


def _set_attention(transformer: nn.Module, name: str) -> None:
    """diffusers' dispatcher, told for this transformer alone; a backend of the hub is downloaded now."""
    before = process_attention()
    try:
        transformer.set_attention_backend(name)
    except (OSError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        hint = "check the network, or set attention=native"
        raise UserError(f"attention={name} does not load: {reason}", hint) from error
    finally:
        # diffusers makes it that of the whole process as well, and other models were asked for others.
        set_process_attention(before)


def _trim(transformer: nn.Module, family: DiTFamily, attention: str) -> None:
    trim_text(transformer, family, None if attention in MASKED_ATTENTION else f"attention={attention}")


def _dtype(transformer: nn.Module, family: DiTFamily) -> torch.dtype:
    """What its blocks compute in: some families keep other parts in float32."""
    block = blocks_of(transformer, family)[0][1]
    return next(part.weight.dtype for part in block.modules() if isinstance(part, nn.Linear))
