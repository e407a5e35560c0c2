"""A transformer, text encoder or autoencoder from its files, every weight accounted for, and adapters merged in."""

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from textwrap import shorten

import torch
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from diffusers.loaders.lora_base import LORA_WEIGHT_NAME_SAFE as LORA_WEIGHTS
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from vidaccel.errors import UserError
from vidaccel.models.folder import COPY_AGAIN, Component

ADAPTER = "student"


def load_module(component: Component, dtype: torch.dtype) -> nn.Module:
    """The module with every weight from its files; `UserError` if one is missing, left over or of another shape."""
    hint = f"weights and config.json have to be of the same {component.cls.__name__}"
    with reading(component.folder, hint):
        module, info = component.cls.from_pretrained(
            component.folder,
            dtype=dtype,
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # that is, list them in `info`; they are refused below
        )
    files = component.weight_files
    where = files[0] if len(files) == 1 else component.folder
    for problem in ("missing", "unexpected", "mismatched"):
        _refuse(where, problem, (key if isinstance(key, str) else key[0] for key in info[f"{problem}_keys"]), hint)
    return module


def merge_adapter(transformer: nn.Module, folder: Path) -> None:
    """Add the adapter that diffusers' `save_lora_adapter` wrote to `folder` to the weights, W + scale B A.

    What runs is then a plain transformer, as fast as its base, whose blocks can be copied, fused and cached like any.

    Raises:
        UserError: peft is not installed, or the adapter is not of this transformer.
    """
    try:
        from peft import get_peft_model_state_dict
    except ImportError as error:
        raise UserError(f"{folder} is a LoRA adapter, which needs peft", 'pip install "vidaccel[train]"') from error
    file, hint = folder / LORA_WEIGHTS, "take the adapter that was trained on this pipeline's transformer"
    with reading(file, hint):
        with safe_open(file, framework="pt") as stored:
            names, described = set(stored.keys()), LORA_ADAPTER_METADATA_KEY in (stored.metadata() or {})
        if not described:
            raise UserError(f"{file} does not say its scale", "save the adapter with diffusers' save_lora_adapter")
        transformer.load_lora_adapter(
            str(folder), prefix=None, weight_name=LORA_WEIGHTS, local_files_only=True, adapter_name=ADAPTER
        )
        loaded = set(get_peft_model_state_dict(transformer, adapter_name=ADAPTER))
        _refuse(file, "missing", loaded - names, hint)
        _refuse(file, "unexpected", names - loaded, hint)
        transformer.fuse_lora(safe_fusing=True)  # that is, refuse what is not finite
        transformer.unload_lora()


def adapter_weights(folder: Path) -> dict[str, Tensor]:
    """Those of an adapter as `merge_adapter` takes them, its scale in them: A and scale B, by layer; `UserError` where
    layers have scales of their own."""
    file = folder / LORA_WEIGHTS
    with reading(file, COPY_AGAIN), safe_open(file, framework="pt") as stored:
        said = json.loads((stored.metadata() or {})[LORA_ADAPTER_METADATA_KEY])
    weights = load_file(file)
    if any(said.get(key) for key in ("rank_pattern", "alpha_pattern", "use_rslora", "use_dora")):
        raise UserError(f"{file} scales its layers one by one", "export a folder, which diffusers loads: -o FOLDER")
    scale = said["lora_alpha"] / said["r"]
    return {name: weight * scale if ".lora_B." in name else weight for name, weight in weights.items()}


def _refuse(where: Path, problem: str, names: Iterable[str], hint: str) -> None:
    if names := sorted(names):
        raise UserError(f"{where} has {len(names)} {problem} weights, such as {names[0]}", hint)


@contextmanager
def reading(place: Path, hint: str) -> Iterator[None]:
    """Turn what diffusers, transformers, peft and tokenizers raise about a place into a `UserError`.

    That can be anything: a wrong value in a config surfaces as TypeError, KeyError, a dataclass error or, from the
    Rust of tokenizers, a plain Exception. The original is chained.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{place} does not load: {one_line(error)}", hint) from error


def one_line(error: Exception) -> str:
    return shorten(f"{type(error).__name__}: {error}", 300)
