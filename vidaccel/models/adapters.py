"""LoRA files on a pipeline: read by its own loader, every weight accounted for, and added to the transformer's.

    lora=["lightx2v_4steps.safetensors:0.8", "style.safetensors"]

Loaders convert the layouts of other programs, and leave out in silence what they have no place for. So a conversion is
traced first, on tensors without memory: a weight whose gradient does not arrive in the result was left out. What runs
is then a plain transformer, W + scale B A, whose blocks can be copied, fused and cached like any.
"""

import logging
import math
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, cast

import torch
from diffusers import DiffusionPipeline
from diffusers.loaders.single_file_utils import convert_hunyuan_video_transformer_to_diffusers
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from vidaccel.artefacts import own_files
from vidaccel.errors import UserError
from vidaccel.families.base import DiTFamily
from vidaccel.families.released import original_name
from vidaccel.models.folder import PICKLES, safetensors_header
from vidaccel.models.weights import reading

log = logging.getLogger(__name__)

ADAPTER = "given"
PARTLY = ":partly"
"""How the name of a file ends of which what has no place in the model is left out."""
NAMED = re.compile(r"transformer(_\w+)?")
"""What a transformer is called that an adapter is for."""
PARTS = (".lora_A.weight", ".lora_B.weight", ".lora_B.bias")
"""How the names of an adapter's weights end, behind that of the layer, in diffusers' layout."""
ENDINGS = {
    ".lora_down.weight": "down",
    ".lora_A.weight": "down",
    ".lora_up.weight": "up",
    ".lora_B.weight": "up",
    ".diff_b": "bias",
    ".alpha": "alpha",
}
"""How they end in other layouts, and what they are."""


@dataclass(frozen=True)
class Adapter:
    """A LoRA file and how much of it is added."""

    file: Path
    scale: float = 1.0
    denoiser: str | None = None
    """Attribute of the transformer that it is for, where there are several."""
    partly: bool = False
    """Whether weights that have no place in the model are left out, in place of a refusal."""

    @classmethod
    def parsed(cls, text: str) -> Self:
        """Of FILE or FILE:SCALE, before `:partly` where some of it may be left out, and behind `transformer_2:` or the
        like where there are several transformers; a folder stands for the one file in it.

        Raises:
            UserError: there is no such file, it is none of safetensors, or the scale is no finite number.
        """
        whole = text.removesuffix(PARTLY)
        partly, text = whole != text, whole
        head, _, rest = text.partition(":")
        denoiser = head if NAMED.fullmatch(head) and rest and _number(rest) is None else None
        text = rest if denoiser else text
        name, colon, tail = text.rpartition(":")
        scale = _number(tail) if colon else None
        path = Path(text if scale is None else name).expanduser()
        scale = 1.0 if scale is None else scale
        if not math.isfinite(scale):
            raise UserError(f"lora={text} has the scale {scale}", "give a finite one, such as :1 or :0.8")
        found = own_files(path, "*.safetensors") if path.is_dir() else [path]
        if len(found) != 1:
            raise UserError(f"{path} holds {len(found)} safetensors files", "name the one that is meant")
        if not found[0].is_file():
            raise UserError(f"there is no LoRA file {path}", "lora= takes FILE.safetensors or FILE.safetensors:SCALE")
        if found[0].suffix in PICKLES:
            raise UserError(f"{path} is a pickle, which can run code when it is loaded", "take a safetensors file")
        return cls(found[0], scale, denoiser, partly)

    @property
    def recorded(self) -> str:
        """How it is added, as the names of hashes say it."""
        return f"{self.scale:g}" if self.denoiser is None else f"{self.denoiser}:{self.scale:g}"

    def __str__(self) -> str:
        named = "" if self.denoiser is None else f"{self.denoiser}:"
        return f"{named}{self.file}:{self.scale:g}{PARTLY if self.partly else ''}"


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def check_denoisers(family: DiTFamily, adapters: Sequence[Adapter]) -> None:
    """`UserError` unless each says which transformer it is for, where there are several, and names one there is."""
    known = [denoiser.attribute for denoiser in family.denoisers]
    for adapter in adapters:
        if adapter.denoiser is None and len(known) > 1:
            ways = " or ".join(f"lora=[{name}:{adapter}]" for name in known)
            raise UserError(
                f"{adapter.file} does not say which of the {len(known)} transformers of {family.title} it is for",
                f"say it: {ways}",
            )
        if adapter.denoiser not in (None, *known):
            raise UserError(
                f"lora={adapter}, and {family.title} has no {adapter.denoiser}", f"it has {', '.join(known)}"
            )


def add_adapters(pipe: DiffusionPipeline, family: DiTFamily, adapters: Sequence[Adapter]) -> None:
    """Add them to the weights of the pipeline's transformers that they are for, one after another.

    Raises:
        UserError: peft is not installed, or a file is not of this transformer, or not wholly.
    """
    for adapter in adapters:
        _add(pipe, family, adapter)


def _add(pipe: DiffusionPipeline, family: DiTFamily, adapter: Adapter) -> None:
    try:
        from peft import get_peft_model_state_dict
    except ImportError as error:
        raise UserError(f"{adapter.file} is a LoRA, which needs peft", 'pip install "vidaccel[train]"') from error
    transformer: Any = getattr(pipe, adapter.denoiser or family.denoisers[0].attribute)
    hint = f"take a LoRA that was made for this {type(transformer).__name__}"
    _refuse_halves(adapter.file, safetensors_header(adapter.file), hint)
    with reading(adapter.file, hint):
        _check_left_out(pipe, family, adapter)
        weights, metadata = _converted(pipe, family, str(adapter.file.parent), weight_name=adapter.file.name)
    prefix = f"{family.denoisers[0].attribute}."  # also of what is for another, as the pipeline's own loader has it
    weights = {name.removeprefix(prefix): weight for name, weight in weights.items()}
    weights = _matched(adapter, weights, transformer, hint)
    with reading(adapter.file, hint):
        transformer.load_lora_adapter(weights, prefix=None, adapter_name=ADAPTER, metadata=_bare(metadata, prefix))
        with warnings.catch_warnings():  # PEFT takes the bias of a matrix for a shard of DeepSpeed's
            warnings.filterwarnings("ignore", "Adapter .* invalid shape")
            loaded = set(get_peft_model_state_dict(transformer, adapter_name=ADAPTER))
        _refuse(adapter.file, weights.keys() - loaded, "no place for", hint)
        transformer.fuse_lora(lora_scale=adapter.scale, safe_fusing=True)  # that is, refuse what is not finite
        transformer.unload_lora()


def _converted(
    pipe: DiffusionPipeline, family: DiTFamily, source: Any, **more: Any
) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
    """Weights in diffusers' layout, and what the file says of ranks and scales: by the pipeline's loader, if it has
    one; else they have to be in that layout already, or in one of the base model's names that are known here."""
    convert: Any = getattr(type(pipe), "lora_state_dict", None)
    if convert is None:
        from diffusers.loaders import SD3LoraLoaderMixin  # which takes that layout as it is

        convert = cast(Any, SD3LoraLoaderMixin).lora_state_dict
        names = source if isinstance(source, Mapping) else safetensors_header(Path(source) / more["weight_name"])
        foreign = [name for name in names if not name.endswith(PARTS) or name.startswith("diffusion_model.")]
        if foreign and original_name("", family.name) is not None:
            given = source if isinstance(source, Mapping) else load_file(Path(source) / more["weight_name"])
            return _from_original(given, family), None
        if foreign:
            raise UserError(
                f"a LoRA of {type(pipe).__name__} in a layout that is not known: {foreign[0]}",
                "diffusers has no loader for it: bring it in diffusers' own layout (save_lora_adapter)",
            )
    return convert(source, return_lora_metadata=True, local_files_only=True, use_safetensors=True, **more)


def _from_original(given: Mapping[str, Tensor], family: DiTFamily) -> dict[str, Tensor]:
    """A LoRA in the base model's names, or ComfyUI's, in diffusers' layout: `alpha` goes into the weights, and what
    belongs to no pair of matrices, such as the `.diff` of norms, is left out."""
    layers: dict[str, dict[str, Tensor]] = {}
    for name, weight in given.items():
        part = next((part for part in ENDINGS if name.endswith(part)), "")
        layers.setdefault(name.removesuffix(part).removeprefix("diffusion_model."), {})[ENDINGS.get(part, part)] = (
            weight
        )
    found: dict[str, Tensor] = {}
    for layer, parts in layers.items():
        if "down" not in parts and "up" not in parts:
            continue
        down, up = parts["down"], parts["up"]
        scale = float(parts["alpha"]) / down.shape[0] if "alpha" in parts else 1.0
        for name, rows in _named(f"{layer}.weight", scale * up, family).items():
            pair = {PARTS[0]: down, PARTS[1]: rows}
            found |= {name.removesuffix(".weight") + part: weight for part, weight in pair.items()}
        if "bias" in parts:
            biases = _named(f"{layer}.bias", parts["bias"], family)
            found |= {name.removesuffix(".bias") + PARTS[2]: bias for name, bias in biases.items()}
    return found


def _named(name: str, rows: Tensor, family: DiTFamily) -> dict[str, Tensor]:
    """What a layer adds to its output, by the names of diffusers, whose layers may be parts of it."""
    return convert_hunyuan_video_transformer_to_diffusers({original_name(name, family.name): rows})


def _refuse_halves(file: Path, names: Iterable[str], hint: str) -> None:
    """`UserError` if one of a layer's two matrices is there without the other."""
    pairs: dict[str, dict[str, str]] = {"down": {}, "up": {}}
    for name in names:
        part = next((part for part in ENDINGS if name.endswith(part)), "")
        if ENDINGS.get(part) in pairs:
            pairs[ENDINGS[part]][name.removesuffix(part)] = name
    halves = pairs["down"].keys() ^ pairs["up"].keys()
    alone = [name for names in pairs.values() for layer, name in names.items() if layer in halves]
    _refuse(file, alone, "are half of a pair, whose other matrix is missing", hint)


def _check_left_out(pipe: DiffusionPipeline, family: DiTFamily, adapter: Adapter) -> None:
    """`UserError`, or a warning, if the conversion leaves out weights that are not zero."""
    with safe_open(adapter.file, framework="pt") as stored:
        names = list(stored.keys())
        shapes = {name: stored.get_slice(name).get_shape() for name in names}
        scalars = {name for name in names if math.prod(shapes[name]) == 1}  # alphas, which conversions read
        leaves = {name: torch.ones(shapes[name], device="meta", requires_grad=True) for name in names}
        traced = {name: stored.get_tensor(name) if name in scalars else leaves[name] * 1 for name in names}
        with torch.enable_grad():
            found, _ = _converted(pipe, family, traced)
            reached = [weight.sum() for weight in found.values() if weight.requires_grad]
            arrived = torch.autograd.grad(reached, list(leaves.values()), allow_unused=True) if reached else ()
        used = {name for name, gradient in zip(leaves, arrived, strict=bool(reached)) if gradient is not None}
        left = [name for name in names if name not in scalars | used and stored.get_tensor(name).count_nonzero()]
    hint = "it would not be the model that its authors made: look for a LoRA in diffusers' layout, or for full weights"
    _leave_out(adapter, left, "diffusers leaves out, and which are not zero", hint)


def _matched(adapter: Adapter, weights: Mapping[str, Tensor], transformer: nn.Module, hint: str) -> dict[str, Tensor]:
    """The weights that belong to a layer of the transformer; `UserError` unless all of them fit it, and all do or the
    others are to be left out."""
    file = adapter.file
    layers, wrong, misfits = dict(transformer.named_modules()), [], []
    for name, weight in weights.items():
        ending = next((part for part in PARTS if name.endswith(part)), "")
        layer: Any = layers.get(name.removesuffix(ending)) if ending else None
        if not isinstance(layer, nn.Linear | nn.Conv2d | nn.Conv3d):
            wrong.append(name)
        elif isinstance(layer, nn.Linear):
            takes, gives = layer.in_features, layer.out_features
            size, expected = (weight.shape[1], takes) if ending == PARTS[0] else (weight.shape[0], gives)
            if size != expected:
                misfits.append(name)
    _leave_out(adapter, wrong, f"this {type(transformer).__name__} has no layer for", hint)
    _refuse(file, misfits, "do not have the size of their layer", hint)
    kept = {name: weight for name, weight in weights.items() if name not in wrong}
    if not kept:
        raise UserError(f"{file} holds no weights{f' for this {type(transformer).__name__}' if wrong else ''}", hint)
    return kept


def _leave_out(adapter: Adapter, names: Sequence[str], why: str, hint: str) -> None:
    """A warning where the adapter may be added partly, else `_refuse`."""
    if adapter.partly and names:
        log.warning("%s is added without %d weights that %s, such as %s", adapter.file, len(names), why, min(names))
    elif names:
        _refuse(adapter.file, names, why, f"{hint}; or add the rest alone: lora=[{adapter}{PARTLY}]")


def _refuse(file: Path, names: Iterable[str], why: str, hint: str) -> None:
    if names := sorted(names):
        raise UserError(f"{file} has {len(names)} weights that {why}, such as {names[0]}", hint)


def _bare(metadata: dict[str, Any] | None, prefix: str) -> dict[str, Any] | None:
    """With names as `load_lora_adapter` takes them."""
    return metadata and {name.removeprefix(prefix): value for name, value in metadata.items()}
