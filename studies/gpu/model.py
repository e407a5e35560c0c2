"""HunyuanVideo at its real size with random weights, and the ways in which it is run.

A variant is named in words, "trimmed, fused, compiled": settings of vidaccel/runtime/prepare.py. "eager" is none.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from diffusers import HunyuanVideoTransformer3DModel
from torch import Tensor

from studies.gpu.measure import BACKEND, CUDA, DEVICE, Rows
from studies.gpu.ops import KERNELS
from vidaccel.compat.diffusers import process_attention, set_process_attention
from vidaccel.families.hunyuan_video import HUNYUAN_VIDEO as FAMILY
from vidaccel.runtime import compiled
from vidaccel.runtime.fuse import fuse
from vidaccel.runtime.quantized import check_quantization, quantize_blocks
from vidaccel.runtime.text_padding import trim_text

compiled.BACKEND = BACKEND
ATTENTION = {"cudnn": "_native_cudnn" if CUDA else "_native_math"}
"""Word -> backend of diffusers' dispatcher: those that need no package beside torch."""


@dataclass(frozen=True)
class Shape:
    """A transformer and the video it denoises."""

    heads: int = 24
    head_dim: int = 128
    double_blocks: int = 20
    single_blocks: int = 40
    text_dim: int = 4096
    pooled_dim: int = 768
    text_tokens: int = 256
    text_used: int = 60
    rope: tuple[int, int, int] = (16, 56, 56)
    latent: tuple[int, int, int] = (13, 44, 44)
    """Latent frames, height, width. 33 x 88 x 88 is 129 frames of 704 x 704, 63,888 tokens; 13 x 44 x 44 a tenth."""

    @property
    def tokens(self) -> int:
        return self.latent[0] * (self.latent[1] // 2) * (self.latent[2] // 2)

    def row(self) -> dict:
        return {"tokens": self.tokens, "blocks": [self.double_blocks, self.single_blocks], "heads": self.heads}

    def flops(self, variant: str, blocks: int | None = None) -> int:
        """Of `blocks` (all of a full pass): 2 a weight and token, and two attention products. Text included."""
        texts = self.text_used if "trimmed" in variant else self.text_tokens
        N, D = self.tokens + texts, self.heads * self.head_dim
        return (blocks or self.double_blocks + self.single_blocks) * (2 * 12 * D**2 * N + 4 * N**2 * D)


def build(shape: Shape, dtype: torch.dtype = torch.bfloat16) -> HunyuanVideoTransformer3DModel:
    """Weights drawn at a size that keeps activations finite; the time a pass takes does not depend on them."""
    with torch.device("meta"):
        model = HunyuanVideoTransformer3DModel(
            num_attention_heads=shape.heads,
            attention_head_dim=shape.head_dim,
            num_layers=shape.double_blocks,
            num_single_layers=shape.single_blocks,
            text_embed_dim=shape.text_dim,
            pooled_projection_dim=shape.pooled_dim,
            rope_axes_dim=shape.rope,
        )
    model = model.to(dtype).to_empty(device=DEVICE).eval().requires_grad_(False)
    generator = torch.Generator(DEVICE).manual_seed(0)
    for name, weight in model.named_parameters():
        if weight.ndim > 1:
            weight.normal_(std=weight.shape[1] ** -0.5, generator=generator)
        else:
            weight.fill_(1.0 if name.endswith("weight") else 0.0)
    return model


def inputs(shape: Shape, dtype: torch.dtype = torch.bfloat16) -> dict[str, Tensor]:
    generator = torch.Generator(DEVICE).manual_seed(1)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, device=DEVICE, dtype=dtype)

    return {
        "hidden_states": normal(1, 16, *shape.latent),
        "timestep": torch.full((1,), 500.0, device=DEVICE),
        "encoder_hidden_states": normal(1, shape.text_tokens, shape.text_dim),
        "encoder_attention_mask": torch.arange(shape.text_tokens, device=DEVICE)[None] < shape.text_used,
        "pooled_projections": normal(1, shape.pooled_dim),
        "guidance": torch.full((1,), 6000.0, device=DEVICE),
    }


@contextlib.contextmanager
def running(model: HunyuanVideoTransformer3DModel, variant: str) -> Iterator[None]:
    """Passes inside run as `variant` says."""
    words = set(variant.split(", "))
    with contextlib.ExitStack() as undo:
        if "fused" in words:
            undo.enter_context(fuse(model, KERNELS))
        for word in words & ATTENTION.keys():
            before = process_attention()
            model.set_attention_backend(ATTENTION[word])
            undo.callback(model.reset_attention_backend)
            undo.callback(set_process_attention, before)  # diffusers makes it that of the whole process as well
        if "trimmed" in words:
            undo.callback(trim_text(model, FAMILY).remove)
        if "compiled" in words:
            undo.callback(compiled.compile_blocks(model, FAMILY))
        yield


def quantized(rows: Rows, shape: Shape, model: HunyuanVideoTransformer3DModel, kind: str) -> bool:
    """The blocks in int8 or fp8 for good; False and an error row if that is not possible here."""
    try:
        if CUDA or kind != "fp8":  # a CPU has its products too, which nobody would use
            check_quantization(kind, DEVICE)
        quantize_blocks(model, FAMILY, kind)
    except Exception as error:  # noqa: BLE001
        rows.add("quantisation", kind, shape.row(), error=f"{type(error).__name__}: {error}"[:500])
        return False
    return True
