"""What tells the predictor's steps from the student's: small heads on the frozen student's own features.

The features F of a latent are the video tokens that leave a few blocks of the trunk when the student is given it. The
discriminator D has a head for each of them at each of several scales: a mean of s x s neighbouring tokens, and three
linear layers of spectral norm 1 with leaky ReLUs between, so that no head changes faster than its tokens do.

The spectral norm is computed in each pass. torch.nn.utils.parametrizations.spectral_norm approximates it by power
iteration in a buffer, which would differ in a resumed run and between processes.

B batch, N = T H W video tokens, D width
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vidaccel.config.predictor import DiscriminatorConfig
from vidaccel.families.base import BlockList
from vidaccel.families.walk import blocks_of, named_outputs, patch_of
from vidaccel.models.velocity import SwitchedVelocity, Text, Velocity

Logits = list[Tensor]
"""[B, T, H / s, W / s] of each head."""
LEAK = 0.2


class SpectralLinear(nn.Linear):
    """A linear layer whose weight is divided by its largest singular value."""

    def forward(self, x: Tensor, frozen: bool = False) -> Tensor:
        """`frozen` lets gradients through to x only."""
        weight, bias = self.weight / torch.linalg.matrix_norm(self.weight, 2), self.bias
        if frozen:
            weight, bias = weight.detach(), bias.detach()
        return F.linear(x, weight, bias)


class Head(nn.Module):
    """One logit a place, from tokens averaged over `scale` x `scale` places of a frame."""

    def __init__(self, width: int, hidden: int, scale: int):
        super().__init__()
        self.scale = scale
        sizes = ((width, hidden), (hidden, hidden), (hidden, 1))
        self.layers = nn.ModuleList(SpectralLinear(*size) for size in sizes)

    def forward(self, tokens: Tensor, frozen: bool) -> Tensor:
        """[B, T, H, W, D] -> [B, T, H / s, W / s]; a grid smaller than s is one place."""
        height, width = tokens.shape[2:4]
        size = min(self.scale, height), min(self.scale, width)
        x = F.avg_pool2d(tokens.flatten(0, 1).movedim(-1, 1), size).movedim(1, -1).unflatten(0, tokens.shape[:2])
        for layer in self.layers[:-1]:
            x = F.leaky_relu(layer(x, frozen), LEAK)
        return self.layers[-1](x, frozen).sum(-1)  # over one; sharding wants no view


class Discriminator(nn.Module):
    """D, of trunks of one width: a set of heads for each of `transformers`."""

    def __init__(self, width: int, config: DiscriminatorConfig, transformers: int = 1):
        super().__init__()
        first, *further = (
            nn.ModuleList(
                nn.ModuleList(Head(width, config.width, scale) for scale in config.scales) for _ in config.depths
            )
            for _ in range(transformers)
        )
        self.heads, self.further = first, nn.ModuleList(further)

    def forward(
        self, features: Sequence[Tensor], grid: tuple[int, int, int], frozen: bool = False, which: int = 0
    ) -> Logits:
        """Features [B, N, D] at each depth, of (T, H, W) tokens -> logits; `frozen` as in `SpectralLinear`, and `which`
        transformer they are of."""
        logits = []
        for tokens, heads in zip(features, [self.heads, *self.further][which], strict=True):
            # Tokens grow from block to block by orders of magnitude.
            placed = F.layer_norm(tokens.float(), tokens.shape[-1:]).unflatten(1, grid)
            logits += [head(placed, frozen) for head in heads]
        return logits


def discriminator_hinge(real: Logits, fake: Logits) -> Tensor:
    """L_D = max(0, 1 - D(real)) + max(0, 1 + D(fake)), averaged within heads and then over them."""
    return _over_heads(F.relu(1 - a).mean() + F.relu(1 + b).mean() for a, b in zip(real, fake, strict=True))


def predictor_hinge(fake: Logits) -> Tensor:
    """max(0, 1 - D(fake)), averaged in the same way."""
    return _over_heads(F.relu(1 - logits).mean() for logits in fake)


def trunk_features(
    student: Velocity, depths: Sequence[float], x: Tensor, t: Tensor, text: Text, g: Tensor | None, which: int = 0
) -> list[Tensor]:
    """Video tokens [B, N, D] after the blocks at `depths` (1 is the last), of a pass with r = t; of several
    transformers `which` one's, which is told no time below its own."""
    transformer = student.transformer
    if isinstance(student, SwitchedVelocity):
        transformer = [student, *student.further][which].transformer
        t = t.clamp(min=[*student.boundaries, 0.0][which])
    blocks = blocks_of(transformer, student.family)
    found: list[Tensor] = []
    hooks = []
    for depth in depths:
        kind, block = blocks[max(0, round(depth * len(blocks)) - 1)]
        hooks.append(block.register_forward_hook(_noting(kind, found)))
    try:
        student(x, t, text, r=t, g=g)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def token_grid(transformer: nn.Module, x: Tensor) -> tuple[int, int, int]:
    """(T, H, W) video tokens of latents [B, C, T, H, W]."""
    return tuple(size // step for size, step in zip(x.shape[2:], patch_of(transformer), strict=True))


def _noting(kind: BlockList, found: list[Tensor]):
    """A forward hook that adds the block's video tokens to `found`."""

    def note(block: nn.Module, inputs: tuple, output: Tensor | tuple[Tensor, ...]) -> None:
        found.append(named_outputs(kind, output)["hidden_states"])

    return note


def _over_heads(losses: Iterable[Tensor]) -> Tensor:
    return torch.stack(list(losses)).mean()
