"""Low-rank adapters (LoRA) in place of full weights: W x + B A x, where only A [r, in] and B [out, r] are trained.

They sit on every linear layer of the trunk's blocks but those that modulate the norms. B starts at zero, so that a
model with fresh adapters computes what it did without. peft holds them; models/saving.py saves them, and
models/weights.py loads them.
"""

from collections.abc import Iterable

import torch
from diffusers import ModelMixin
from diffusers.training_utils import cast_training_params
from torch import nn

from vidaccel.errors import UserError

try:
    from peft import LoraConfig
except ImportError as error:
    raise UserError("adapters need peft, which is not installed", 'pip install "vidaccel[train]"') from error


def add_lora(model: ModelMixin, blocks: Iterable[nn.Module], rank: int, seed: int) -> None:
    """Freezes `model` and adds adapters of `rank` to its `blocks`: float32, trainable, the same for the same seed."""
    linears = {
        id(part)
        for block in blocks
        for name, part in block.named_modules()
        if isinstance(part, nn.Linear) and not name.startswith("norm")
    }
    names = [name for name, part in model.named_modules() if id(part) in linears]
    model.requires_grad_(False)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=names))
    cast_training_params(model, torch.float32)


def merge_lora(model: ModelMixin) -> None:
    """Adds B A to the weights and takes the adapters away: a plain model, still frozen. Of whole weights only."""
    model.fuse_lora(safe_fusing=True)
    model.unload_lora()
