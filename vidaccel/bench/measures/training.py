"""What a pass costs that is trained: FLOPs of its gradients, and the bytes that are held for them.

A product of a layer takes one more of its size for the gradient of its input and one for that of its weights. Attention
as fused kernels have it takes five in place of two, because they compute the scores again. Activations are those of the
blocks, followed on the meta device through one of each kind, forward and backward, in one type throughout: what
autocast keeps in float32 (norms) beside it is not in them, nor is an allocator's rounding.
"""

from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from vidaccel.bench.measures.flops import PassFlops
from vidaccel.bench.measures.memory import block_arguments
from vidaccel.families.base import BlockList, DiTFamily
from vidaccel.families.walk import call_block, named_outputs
from vidaccel.models.live_bytes import FusedAttention, LiveBytes, NothingMasked

FORWARD, TO_INPUTS, TO_WEIGHTS = 1.0, 1.0, 1.0
ATTENTION_BACKWARD = 2.5
"""Of an attention's gradients, over its own FLOPs."""


@dataclass(frozen=True)
class Gradients:
    """How a pass with gradients is run."""

    weights: bool
    """Whether the weights of blocks, embedders and head are trained; otherwise gradients only go through them."""
    recomputed: bool
    """Whether activations of the blocks are computed again (checkpointing)."""

    def flops(self, full: PassFlops) -> float:
        """Of such a pass, the one forward included."""
        trained = TO_WEIGHTS if self.weights else 0.0
        blocks = full.blocks * (FORWARD + TO_INPUTS + trained) + full.attention * (FORWARD + ATTENTION_BACKWARD)
        outside = full.embedders * (FORWARD + (TO_INPUTS + trained if self.weights else 0.0))
        return blocks + outside + (full.blocks + full.attention if self.recomputed else 0)


def tangent_flops(full: PassFlops) -> float:
    """Of a pass with its derivative along one direction: each layer once more, each product of attention twice."""
    return 2 * (full.embedders + full.blocks) + 3 * full.attention


@dataclass(frozen=True)
class Adapters:
    """Low-rank ones, as train/lora.py puts them on a model."""

    parameters: int
    flops: int
    """Of one pass of one video, forward alone."""


def adapters(model: nn.Module, family: DiTFamily, rows: dict[str, int], rank: int) -> Adapters:
    """On each linear layer of the blocks but those of their norms."""
    parameters = flops = 0
    for name, costs in family.costs.blocks.items():
        blocks: Any = model.get_submodule(name)
        for layer, module in blocks[0].named_modules():
            if isinstance(module, nn.Linear) and not layer.startswith("norm"):
                added = len(blocks) * rank * (module.in_features + module.out_features)
                stream = next(stream for pattern, stream in costs.layers if fnmatchcase(layer, pattern))
                parameters += added
                flops += 2 * added * rows[stream]
    return Adapters(parameters, flops)


@dataclass(frozen=True)
class BlockBytes:
    """Of one block of a list, one video."""

    count: int
    """Blocks of the list."""
    entering: int
    """Tokens that enter it."""
    kept: int
    """What its forward leaves for the backward pass, tokens that leave it included."""
    peak: int
    """Most that is alive within both."""


def training_blocks(model: nn.Module, family: DiTFamily, rows: dict[str, int]) -> list[BlockBytes]:
    """By list of blocks, of a `model` on the meta device whose weights require gradients or not."""
    return [_block(model, family, block_list, rows) for block_list in family.block_lists]


def _block(model: nn.Module, family: DiTFamily, block_list: BlockList, rows: dict[str, int]) -> BlockBytes:
    blocks: Any = model.get_submodule(block_list.name)
    arguments = block_arguments(model, family, block_list, rows)
    tokens = [arguments[name] for name in block_list.arguments[:2]]
    entering = [each.requires_grad_(True) for each in tokens if isinstance(each, Tensor)]
    hooks = [p.register_post_accumulate_grad_hook(_dropped) for p in blocks[0].parameters() if p.requires_grad]
    with torch.enable_grad(), LiveBytes() as live, FusedAttention(), NothingMasked():
        left = named_outputs(block_list, call_block(block_list, blocks[0], arguments))
        kept = live.now
        outputs = [each for each in left.values() if each.requires_grad]
        torch.autograd.backward(outputs, [torch.empty_like(each) for each in outputs])
    for hook in hooks:
        hook.remove()
    returned = [arguments[name] for name in ("hidden_states", "encoder_hidden_states") if name in block_list.returns]
    own = [each for each in returned if isinstance(each, Tensor)] or entering
    return BlockBytes(len(blocks), sum(each.nbytes for each in own), kept, live.peak)


def _dropped(parameter: Tensor) -> None:
    """Gradients of weights are counted with them."""
    parameter.grad = None


def kept_bytes(blocks: list[BlockBytes], recomputed: bool, share: float = 1.0) -> int:
    """Of one video's pass with gradients, through the first `share` of the blocks."""
    each = (block.entering if recomputed else block.kept for block in blocks)
    kept = sum(round(share * block.count) * size for block, size in zip(blocks, each, strict=True))
    return kept + max(block.peak if recomputed else block.peak - block.kept for block in blocks)
