"""A model as a folder that diffusers loads alone, its transformer as one file in the original layout, or its adapter as
a LoRA file: nothing is told the transformer any more, so its scale is fixed.

The embedding of g adds one vector to the timestep's at a given scale, which a bias of the model's own takes in. That of
r is another at every step: a student of mean velocities stays a folder of vidaccel's.
"""

import inspect
import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler
from safetensors.torch import save_file

from vidaccel import __version__
from vidaccel.artefacts import (
    RUN_FILE,
    atomic_folder,
    atomic_path,
    check_writable,
    sha256_file,
    write_run,
)
from vidaccel.config.generate import GenerateConfig
from vidaccel.errors import UserError
from vidaccel.families.base import DiTFamily
from vidaccel.families.walk import denoisers_of
from vidaccel.models.calling import call_arguments, guidance_in_force, require_whole, second_guidance
from vidaccel.models.cards import README, exported_card
from vidaccel.models.files import ADAPTERS, local_path
from vidaccel.models.folder import FORMAT
from vidaccel.models.grid import ListedScheduler, fixed_shift
from vidaccel.models.loading import LoadedPipeline
from vidaccel.models.original import as_original, require_original
from vidaccel.models.weights import adapter_weights

log = logging.getLogger(__name__)
COMMAND = "vidaccel generate --export"
TAKEN = ("model", "student", "lora", "guidance", "guidance_2", "dtype")
"""Settings of `vidaccel generate` that an export follows."""
FIXED = ("two_pass", "guidance", "guidance_2", "negative_prompt")
"""Settings of a student's call that its weights hold in the end."""


def check_export(target: str | Path, settings: GenerateConfig) -> dict[str, Any]:
    """Those of the settings that an export takes; `UserError` for any other that is said, and for a place that cannot
    be written, before a weight is read."""
    for each in fields(settings):
        value = getattr(settings, each.name)
        if each.name not in TAKEN and value != getattr(GenerateConfig(), each.name):
            raise UserError(
                f"{each.name}={value} is of making videos, and an export makes none",
                f"leave it out; an export takes {', '.join(TAKEN)}",
            )
    _check_target(Path(target))
    return {name: getattr(settings, name) for name in TAKEN}


def is_file(target: str | Path) -> bool:
    """Whether an export to that place is one file, in place of a folder."""
    return Path(target).suffix == ".safetensors"


def is_lora(target: str | Path) -> bool:
    """Whether that file is a LoRA."""
    return Path(target).suffixes[-2:] == [".lora", ".safetensors"]


def _check_target(target: Path) -> None:
    if is_file(target):
        check_writable(target)
        return
    check_writable(target / RUN_FILE)
    if target.is_dir() and any(target.iterdir()):  # all of which would go
        raise UserError(f"{target} is there already", "remove it, or choose another folder with -o")


def files_of(target: str | Path, family: DiTFamily) -> dict[str, Path]:
    """The file of each transformer, by its attribute, of an export to one file.

    Raises:
        UserError: one is there already, or the original names of the family, which a LoRA has none of, are not known.
    """
    target, names = Path(target), [denoiser.attribute for denoiser in family.denoisers]
    if is_lora(target):
        names = names[:1]
    else:
        require_original(family)
    files = {name: target.with_name(f"{target.stem}.{name}{target.suffix}") for name in names}
    files = files if len(names) > 1 else {names[0]: target}
    for file in files.values():
        if file.exists():
            raise UserError(f"{file} is there already", "remove it, or choose another name with -o")
    return files


def export_model(
    target: str | Path,
    loaded: LoadedPipeline,
    *,
    guidance: float | None = None,
    guidance_2: float | None = None,
    config: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Write the model, LoRA files that were loaded with it in its weights, for plain diffusers.

    Args:
        target: a folder that is not there yet, or is empty; or a file NAME.safetensors for the transformer alone by its
            original names (families/original.py), of two transformers NAME.transformer.safetensors and
            NAME.transformer_2.safetensors, which are not there yet either; or a file NAME.lora.safetensors for a
            student's own adapter, as the pipeline that it was trained on loads LoRAs.
        loaded: a plain model, or a student that embeds g alone.
        guidance: the scale that a student is fixed at; None is its own.
        guidance_2: that of the second of two transformers.
        config: settings for run.json, or for the file's header.

    Returns:
        What the pipeline is to be called with beside its prompt.

    Raises:
        UserError: the model embeds r, half of it is distilled, its grid is one that no scheduler of diffusers' own
            makes, its original names are not known, it has no adapter of its own, or the place is taken or cannot be
            written.
    """
    target = Path(target)
    _check_target(target)
    require_whole(loaded)
    _require_exportable(loaded, is_file(target))
    files = files_of(target, loaded.family) if is_file(target) else {}
    scale, _ = guidance_in_force(loaded, guidance, None)
    second = second_guidance(loaded, guidance, guidance_2, None)
    scales = [scale, second or scale]
    distilled = loaded.conditioning is not None
    call = {name: value for name, value in loaded.call.items() if not (distilled and name in FIXED)}
    own = {"guidance": scale} | ({} if second is None else {"guidance_2": second})
    call |= {"guidance": 1.0} if distilled else own
    if distilled and loaded.family.times:
        call.pop("shift", None)
    arguments = call_arguments(loaded, guidance=guidance, guidance_2=guidance_2)
    started = datetime.now(UTC)
    if files:
        said = {"command": COMMAND, "config": dict(config or {}), "parents": _parents(loaded), "call": call}
        if is_lora(target):
            _write_lora(target, loaded, said, scale)
            return arguments
        with _without_conditioning(loaded, scales):
            _write_files(files, loaded, said)
        return arguments
    with atomic_folder(target) as draft:
        with _without_conditioning(loaded, scales), _with_scheduler(loaded):
            DiffusionPipeline.save_pretrained(loaded.pipe, draft)  # which a student's own class refuses
        fixed = " and ".join(f"{each:g}" for each in own.values()) if distilled else None
        card = exported_card(loaded.family, loaded.source, type(loaded.pipe).__name__, arguments, fixed)
        (draft / README).write_text(card, encoding="utf-8")
        write_run(
            draft,
            format=FORMAT,
            command=COMMAND,
            config=dict(config or {}),
            seed=0,
            started=started,
            parents=_parents(loaded),
            call=call,
        )
    return arguments


def _write_files(files: Mapping[str, Path], loaded: LoadedPipeline, said: Mapping[str, Any]) -> None:
    """Each transformer as a file, or none; `said`, which stands for a run.json, goes into the header."""
    header = _header(loaded, said)
    with ExitStack() as whole:  # all are written when the first takes its name
        for name, file in files.items():
            transformer: Any = getattr(loaded.pipe, name)
            width = transformer.config.num_attention_heads * transformer.config.attention_head_dim
            weights = {key: weight.detach().cpu() for key, weight in transformer.state_dict().items()}
            original = as_original(weights, loaded.family, width)
            draft = whole.enter_context(atomic_path(file))
            save_file({key: weight.contiguous() for key, weight in original.items()}, draft, metadata=header)


def _header(loaded: LoadedPipeline, said: Mapping[str, Any]) -> dict[str, str]:
    return {"format": "pt", "vidaccel": json.dumps({"vidaccel": __version__, "source": loaded.source, **said})}


@torch.no_grad()
def _write_lora(file: Path, loaded: LoadedPipeline, said: Mapping[str, Any], scale: float) -> None:
    """The student's adapter by the names of diffusers' pipelines. What its embedding of g adds at `scale` is the bias
    of one more pair of matrices, of zeros."""
    weights = adapter_weights(own_adapter(loaded.source, loaded.hashes))
    conditioning, family = loaded.conditioning, loaded.family
    if conditioning is not None:
        layer: Any = denoisers_of(loaded.pipe, family)[0].get_submodule(family.timestep_embedder).linear_2
        added = conditioning(g=torch.tensor([scale], device=next(conditioning.parameters()).device))[0].float().cpu()
        rank, name = next(iter(weights.values())).shape[0], f"{family.timestep_embedder}.linear_2"
        weights |= {
            f"{name}.lora_A.weight": torch.zeros(rank, layer.in_features),
            f"{name}.lora_B.weight": torch.zeros(layer.out_features, rank),
        }
        # One bias asks for those of all.
        biased = {key: weight.new_zeros(len(weight)) for key, weight in weights.items() if key.endswith("B.weight")}
        weights |= {f"{key.removesuffix('weight')}bias": zeros for key, zeros in biased.items()}
        weights[f"{name}.lora_B.bias"] = added
    prefix = f"{family.denoisers[0].attribute}."
    with atomic_path(file) as draft:
        named = {prefix + key: weight.contiguous() for key, weight in weights.items()}
        save_file(named, draft, metadata=_header(loaded, said))


def own_adapter(source: str, hashes: Mapping[str, str]) -> Path:
    """The folder of a student's adapter; `UserError` where it has none, or is loaded with other LoRA files."""
    if not any(name.startswith("lora/") for name in hashes):
        raise UserError(
            f"{source} has no adapter of its own, of which alone a LoRA file is made",
            "distil it with train.lora_rank=64 merge_lora=false, or export a folder: -o FOLDER",
        )
    if any(name.startswith(ADAPTERS) for name in hashes):
        raise UserError("the files of lora= are LoRA files already", "leave lora= out, or export a folder: -o FOLDER")
    return local_path(source) / "lora"


def _parents(loaded: LoadedPipeline) -> dict[str, str]:
    """SHA-256 of the model's run.json, and of each LoRA file that it was loaded with."""
    run = Path(loaded.source) / RUN_FILE
    found = {"model": sha256_file(run)} if run.is_file() else {}
    lora = [name for name in loaded.hashes if name.startswith(ADAPTERS)]
    return found | {f"lora.{i}": loaded.hashes[name] for i, name in enumerate(lora)}


def _require_exportable(loaded: LoadedPipeline, weights_alone: bool) -> None:
    if not weights_alone and isinstance(loaded.pipe.scheduler, ListedScheduler):
        raise UserError(
            f"{loaded.source} is sampled at listed times, which no scheduler of diffusers alone holds",
            "share the folder as it is, for vidaccel",
        )
    for each in (loaded, *loaded.further):
        embeds = each.conditioning.config.embeds if each.conditioning else ()
        told = each.hook is not None and each.conditioning is None and not each.family.embeds_r
        if "r" in embeds or told:
            raise UserError(
                f"{loaded.source} is told at every step how far it goes (r), for which diffusers alone has no place",
                "share the folder as it is, for vidaccel; what can be exported is a student of method=cfg, or a plain "
                "model with its LoRAs",
            )


@contextmanager
def _without_conditioning(loaded: LoadedPipeline, scales: list[float]) -> Iterator[None]:
    """What each transformer's embedding of g adds at its scale, in the bias before it."""
    with torch.no_grad(), ExitStack() as stack:
        for each, scale in zip((loaded, *loaded.further), scales, strict=False):
            if each.conditioning is None:
                continue
            linear: Any = denoisers_of(each.pipe, each.family)[0].get_submodule(each.family.timestep_embedder).linear_2
            own = linear.bias.detach().clone()
            device = next(each.conditioning.parameters()).device
            added = each.conditioning(g=torch.tensor([scale], device=device))[0]
            linear.bias.copy_(own.float() + added.to(own.device).float())
            stack.callback(linear.bias.copy_, own)
        yield


@contextmanager
def _with_scheduler(loaded: LoadedPipeline) -> Iterator[None]:
    """The pipeline with a scheduler of diffusers' own on a student's grid: flow-match Euler, which most pipelines hand
    their grid to; UniPC, as Wan ships it, where a pipeline leaves that to its scheduler."""
    pipe, own = loaded.pipe, loaded.pipe.scheduler
    if loaded.conditioning is not None and loaded.family.times:
        log.info(
            "the pipeline of %s gives its scheduler times of its own: the model is sampled at those, as its teacher is",
            loaded.family.title,
        )
        pipe.scheduler = FlowMatchEulerDiscreteScheduler(invert_sigmas=loaded.family.rises)
    elif loaded.conditioning is not None:
        shift = fixed_shift(own, loaded.family)
        handed = {"sigmas", "timesteps"} & inspect.signature(type(pipe).__call__).parameters.keys()
        if handed:
            pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
        else:
            flow = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": shift}
            pipe.scheduler = UniPCMultistepScheduler(**flow)
    try:
        yield
    finally:
        pipe.scheduler = own
