"""HunyuanVideo's autoencoder, with random weights, as its latents become frames: in diffusers' own tiles and as
vidaccel/runtime/decode.py has it; and attention, as vidaccel/runtime/attention.py measures it."""

import torch
from diffusers import AutoencoderKLHunyuanVideo, HunyuanVideoPipeline
from torch import Tensor

from studies.gpu.measure import CUDA, DEVICE, Rows
from studies.gpu.model import FAMILY, Shape
from vidaccel.models.loading import LoadedPipeline
from vidaccel.runtime import attention
from vidaccel.runtime.decode import decoding

STOCK = "stock tiles"
"""What users of diffusers enable for videos of this size; its own chunks in time."""
WAYS = (STOCK, "auto", "once", "whole", "once, channels last", "tiled")
"""The first word of the others is the setting of `decode`."""


def autoencoder(shape: Shape) -> LoadedPipeline:
    """A pipeline that has nothing else: of the full size for one of a transformer's full width."""
    small = {} if shape.heads > 2 else {"block_out_channels": (8, 8, 8, 8), "layers_per_block": 1, "norm_num_groups": 4}
    with torch.device(DEVICE):
        vae = AutoencoderKLHunyuanVideo(**small).eval().requires_grad_(False)
    vae = vae.to(torch.bfloat16 if CUDA else torch.float32)
    others = dict.fromkeys(("text_encoder", "tokenizer", "transformer", "scheduler", "text_encoder_2", "tokenizer_2"))
    return LoadedPipeline(HunyuanVideoPipeline(vae=vae, **others), FAMILY, "random weights", {}, {})


@torch.no_grad()
def decode(loaded: LoadedPipeline, latents: Tensor, way: str) -> Tensor:
    """Frames [B, 3, F, H, W] of latents [B, 16, T, H / 8, W / 8], which are put into the autoencoder's type."""
    vae = loaded.pipe.vae  # type: ignore[attr-defined]
    z = latents.to(vae.dtype)
    if "channels last" in way:
        z = z.contiguous(memory_format=torch.channels_last_3d)
    if way == STOCK:
        vae.enable_tiling()
        try:
            return vae.decode(z).sample
        finally:
            vae.disable_tiling()
    T, height, width = latents.shape[2:]
    loaded.decode = way.split(",")[0]
    with decoding(loaded, len(z), num_frames=4 * (T - 1) + 1, height=8 * height, width=8 * width):
        return vae.decode(z).sample


def run_decoding(rows: Rows, shapes: list[Shape]) -> None:
    """At each size, in each way, the largest size last."""
    loaded = autoencoder(shapes[-1])
    vae = loaded.pipe.vae  # type: ignore[attr-defined]
    for shape in shapes:
        latents = torch.randn(1, 16, *shape.latent, device=DEVICE)
        for way in WAYS:
            if "channels last" in way:
                vae.to(memory_format=torch.channels_last_3d)
            few = {"most": 3, "warmup": 1} if shape.tokens < 20_000 else {"most": 2, "budget": 12.0, "warmup": 0}
            rows.measure("decode", way, shape.row(), lambda z=latents, way=way: decode(loaded, z, way), **few)
            vae.to(memory_format=torch.contiguous_format)
            if CUDA:
                torch.cuda.empty_cache()  # which `decoding` takes for free, and a tile of another size cannot use


def run_attention(rows: Rows, shapes: list[Shape]) -> None:
    """Every backend that is here, in bf16, with texts' padding masked and without."""
    for shape in shapes:
        for masked in (False, True):
            with rows.attempt("attention", "preparation", shape.row()):
                given = attention.Attention(
                    shape.tokens, shape.heads, shape.head_dim, torch.bfloat16 if CUDA else torch.float32, masked
                )
                flops = 4 * shape.tokens**2 * shape.heads * shape.head_dim
                for name, (seconds, distance) in attention.measured(given, DEVICE).items():
                    variant = f"{name}, masked" if masked else name
                    figures = {"seconds": seconds, "relative_error": distance, "flops": flops}
                    rows.add("attention", variant, shape.row(), **figures)
