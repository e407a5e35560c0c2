"""What each latent token shows, told to the transformer while it trains.

The flow matching loss hardly notices which colour, shape and motion a sprite has: a few of many values, most of them
decided by noise. As in representation alignment (REPA, arXiv 2410.06940), a head on the tokens that leave the
double-stream blocks therefore learns to name what a token shows, and the blocks with it. There the targets are the
features of a pretrained encoder; here the scene itself is known. The head is thrown away. B clips, N latent tokens, in
the order frames, rows, columns; D width.
"""

from collections.abc import Sequence
from functools import partial

import torch
from diffusers import HunyuanVideoTransformer3DModel
from torch import nn
from torch.nn import functional as F

from vidaccel.worlds.sprites.render import coverage
from vidaccel.worlds.sprites.text import ATTRIBUTES
from vidaccel.worlds.sprites.world import NUM_FRAMES, SHAPES, SIZE, Scene

FRAMES, PIXELS = 4, 16
"""What a token spans: four frames (the first token of a clip one) and 16 x 16 pixels."""
SHARE = 0.04
"""A token shows the sprite that covers at least this share of it."""


def shown(scenes: Sequence[Scene], device: torch.device | str | None = None) -> torch.Tensor:
    """Shape, colour and motion of the sprite that each token shows, uint8 [B, N, 3]; no sprite is one class more.

    Computed on the device, and there."""
    tensor = partial(torch.tensor, device=device)  # none lies elsewhere
    progress = [f / (NUM_FRAMES - 1) for f in range(NUM_FRAMES)]
    best = torch.full((len(scenes), _tokens()), SHARE, device=device)
    labels = tensor([len(values) for _, values in ATTRIBUTES]).repeat(len(scenes), _tokens(), 1)
    for layer in range(max(len(scene.sprites) for scene in scenes)):
        members = [i for i, scene in enumerate(scenes) if len(scene.sprites) > layer]
        sprites = [scenes[i].sprites[layer] for i in members]
        shapes = tensor([SHAPES.index(sprite.shape) for sprite in sprites])
        states = tensor([[s.state(at) for at in progress] for s in sprites])
        share = by_token(coverage(shapes, states))
        own = tensor([[values.index(getattr(s, name)) for name, values in ATTRIBUTES] for s in sprites])
        rows = tensor(members)
        more = share > best[rows]
        labels[rows] = torch.where(more[..., None], own[:, None], labels[rows])
        best[rows] = torch.where(more, share, best[rows])
    return labels.to(torch.uint8)


def by_token(pixels: torch.Tensor) -> torch.Tensor:
    """Mean over what each token spans: [B, T, H, W] to [B, N]."""
    first, rest = pixels[:, None, :1], pixels[:, None, 1:]
    patches = [F.avg_pool3d(first, (1, PIXELS, PIXELS)), F.avg_pool3d(rest, (FRAMES, PIXELS, PIXELS))]
    return torch.cat(patches, dim=2).flatten(1)


def _tokens() -> int:
    return (1 + (NUM_FRAMES - 1) // FRAMES) * (SIZE // PIXELS) ** 2


class Aligned(nn.Module):
    """The transformer with the head it is trained with."""

    def __init__(self, transformer: HunyuanVideoTransformer3DModel):
        super().__init__()
        self.transformer = transformer
        width = transformer.config.num_attention_heads * transformer.config.attention_head_dim
        self.into = nn.Linear(width, 2 * width)
        self.out = nn.Linear(2 * width, sum(len(values) + 1 for _, values in ATTRIBUTES))

    def forward(self, *args: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Velocity, and what the tokens show [B, N, classes of shape, colour and motion]."""
        kept = []
        last = self.transformer.transformer_blocks[-1]
        with last.register_forward_hook(lambda block, inputs, outputs: kept.append(outputs[0])):
            velocity = self.transformer(*args, return_dict=False)[0]
        return velocity, self.out(F.silu(self.into(kept[0])))


def alignment_loss(scores: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy of `scores` [B, N, classes] to `shown`'s labels [B, N, 3]."""
    parts = scores.split([len(values) + 1 for _, values in ATTRIBUTES], dim=-1)
    pairs = zip(parts, labels.long().unbind(-1), strict=True)
    losses = [F.cross_entropy(part.flatten(0, 1), label.flatten()) for part, label in pairs]
    return torch.stack(losses).mean()
