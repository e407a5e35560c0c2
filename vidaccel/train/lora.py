"""Low-rank adapters (LoRA) in place of full weights: W x + B A x, where only A [r, in] and B [out, r] are trained.

They sit on every linear layer of the trunk's blocks but those that modulate the norms. B starts at zero, so that a
model with fresh adapters computes what it did without. peft holds them, diffusers files them.
"""

from collections.abc import Iterable
from pathlib import Path

import torch
from diffusers import ModelMixin
from diffusers.loaders.lora_base import LORA_WEIGHT_NAME_SAFE, LoraBaseMixin
from diffusers.training_utils import cast_training_params
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from torch.distributed.tensor import DTensor

from vidaccel.errors import UserError
from vidaccel.train.parallel import on_first

try:
    from peft import LoraConfig, get_peft_model_state_dict
except ImportError as error:
    raise UserError("adapters need peft, which is not installed", 'pip install "vidaccel[train]"') from error

PREFIX = "transformer"
"""Before every key of the file, as diffusers' pipelines expect it."""


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


def save_lora(model: ModelMixin, folder: Path) -> None:
    """Writes the adapters alone, as `load_lora` and diffusers' pipelines (`load_lora_weights`) read them.

    Every process of a sharded training has to call it.
    """
    whole = {name: _whole(p) for name, p in model.named_parameters() if "lora_" in name}
    layers = get_peft_model_state_dict(model, whole)
    adapter = model.peft_config["default"].to_dict()
    on_first(
        lambda: LoraBaseMixin.write_lora_layers(
            LoraBaseMixin.pack_weights(layers, PREFIX),
            str(folder),
            is_main_process=True,
            weight_name=LORA_WEIGHT_NAME_SAFE,
            save_function=None,
            safe_serialization=True,
            lora_adapter_metadata={f"{PREFIX}.{key}": value for key, value in adapter.items()},
        )
    )


def load_lora(model: ModelMixin, folder: Path) -> None:
    """Adds the adapters that `save_lora` wrote to a model without any.

    Raises:
        UserError: there are none in `folder`, the file is damaged, or they belong to another model.
    """
    path = folder / LORA_WEIGHT_NAME_SAFE
    try:
        names = {name.removeprefix(f"{PREFIX}.") for name in load_file(path)}
        model.load_lora_adapter(
            folder, prefix=PREFIX, weight_name=path.name, adapter_name="default", local_files_only=True
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"cannot load {path}: {reason}", "give the model that these adapters were trained on"
        ) from error
    if unknown := names ^ get_peft_model_state_dict(model).keys():  # diffusers only warns of them
        raise UserError(
            f"{path} does not fit {type(model).__name__}: {min(unknown)} is in one of them only",
            "give the model that these adapters were trained on",
        )


def _whole(parameter: nn.Parameter) -> torch.Tensor:
    tensor = parameter.detach()
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).cpu()
