"""The rotations of queries and keys, which CogVideoX's pipeline makes and its transformer is given.

N video tokens, d width of a head
"""

from typing import Any, cast

import torch
from diffusers.models.embeddings import get_3d_rotary_pos_embed
from diffusers.pipelines.cogvideo.pipeline_cogvideox import get_resize_crop_region_for_grid
from torch import Tensor, nn


def rotations(transformer: nn.Module, size: tuple[int, int, int], device: torch.device) -> tuple[Tensor, Tensor] | None:
    """Cosines and sines [N, d] for latents of `size` (T, H, W), as `_prepare_rotary_positional_embeddings` of the
    pipeline makes them; None for a model that has none."""
    config = cast(Any, transformer.config)
    if not config.use_rotary_positional_embeddings:
        return None
    frames, *sides = size
    grid, base = (tuple(side // config.patch_size for side in pair) for pair in (sides, _base(config)))
    if config.patch_size_t is None:
        height, width = base
        crop: dict[str, Any] = {"crops_coords": get_resize_crop_region_for_grid(grid, width, height)}
    else:  # CogVideoX 1.5
        frames = -(-frames // config.patch_size_t)
        crop = {"crops_coords": None, "grid_type": "slice", "max_size": base}
    made = get_3d_rotary_pos_embed(
        embed_dim=config.attention_head_dim, grid_size=grid, temporal_size=frames, device=device, **crop
    )
    return cast("tuple[Tensor, Tensor]", made)


def _base(config: Any) -> tuple[int, int]:
    """(H, W) of the latents that the model was trained on."""
    return config.sample_height, config.sample_width
