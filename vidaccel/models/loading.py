"""Any supported model, local folder, hub id or shipped name, as a diffusers pipeline ready to call.

Modules are loaded one by one through their own class with `output_loading_info`, because a pipeline's `from_pretrained`
fills weights that a file lacks with random numbers and only warns; the pipeline class then takes them and loads the rest.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline

from vidaccel.errors import UserError, nearest
from vidaccel.models.family import DiTFamily
from vidaccel.models.folder import (
    Component,
    ModelFolder,
    check_component,
    read_pipeline_folder,
    read_run,
    safetensors_header,
    sha256,
)

SHIPPED = Path(__file__).parents[1] / "sprites" / "weights"
"""Holds the folder of each model that is shipped as sprites/<name>."""

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
STORED_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


@dataclass(frozen=True)
class LoadedPipeline:
    """A pipeline in memory, and what is known about where it came from."""

    pipe: DiffusionPipeline
    """The stock diffusers pipeline, on its device."""
    family: DiTFamily
    """The record that describes it."""
    source: str
    """The local folder or hub id it was loaded from."""
    call: dict[str, Any]
    """The model's own sampling settings, by the names of `SamplingDefaults` or of the pipeline's call arguments."""
    hashes: dict[str, str]
    """SHA-256 of each weight file, "transformer/diffusion_pytorch_model.safetensors" -> hex; empty for a hub id."""

    def default(self, name: str) -> Any:
        """A field of `SamplingDefaults` (steps, guidance, fps, ...): the model's own value, else its family's."""
        return self.call.get(name, getattr(self.family.defaults, name))


def load_pipeline(model: str | Path, *, device: str = "cpu", dtype: str = "auto") -> LoadedPipeline:
    """Load a model after checking that it is whole and supported.

    Args:
        model: a diffusers pipeline folder; a transformer folder whose run.json names its "pipeline"; a hub id; or
            sprites/<name> for a shipped model.
        device: "cpu", "cuda", or "auto" (cuda if there is one).
        dtype: "float32", "bfloat16", "float16", or "auto" (as stored on cuda, float32 on a CPU).

    Raises:
        UserError: the model cannot be found, is broken, foreign or a pickle, or the device is not there.
    """
    target = _device(device)
    if dtype not in ("auto", *DTYPES):
        raise UserError(f"no dtype is called {dtype}", nearest(dtype, ("auto", *DTYPES)))
    folder = _local_folder(model)
    if folder is None:
        contents, call, hashes = read_pipeline_folder(_download(str(model))), {}, {}
    else:
        contents, call = _read_local(folder)
        hashes = {
            f"{component.name}/{file.name}": sha256(file)
            for component in contents.components.values()
            for file in component.weight_files
        }
    modules = {
        component.name: _load_module(component, _dtype(component, dtype, target))
        for component in contents.components.values()
        if component.is_module
    }
    pipe = _assemble(contents, modules).to(target)
    return LoadedPipeline(pipe, contents.family, str(folder or model), call, hashes)


def _device(name: str) -> torch.device:
    if name not in ("auto", "cpu", "cuda"):
        raise UserError(f"no device is called {name}", nearest(name, ("auto", "cpu", "cuda")))
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("cuda was asked for, but torch sees no CUDA device", "use device=cpu, or install a CUDA torch")
    return torch.device("cuda" if name == "auto" and torch.cuda.is_available() else name.replace("auto", "cpu"))


def _dtype(component: Component, name: str, device: torch.device) -> torch.dtype:
    """The dtype to hold a module in; "auto" on cuda is the one that most bytes of its weights are stored in."""
    if name != "auto":
        return DTYPES[name]
    if device.type == "cpu":
        return torch.float32
    stored: dict[str, int] = {}
    for file in component.weight_files:
        for entry in safetensors_header(file).values():
            start, end = entry["data_offsets"]
            stored[entry["dtype"]] = stored.get(entry["dtype"], 0) + end - start
    most = max(stored, key=stored.__getitem__)
    if most not in STORED_DTYPES:
        raise UserError(f"{component.folder} is stored as {most}", f"name a dtype to load it in: {', '.join(DTYPES)}")
    return STORED_DTYPES[most]


def _local_folder(model: str | Path) -> Path | None:
    """The folder that `model` means, None if it can only be a hub id."""
    if str(model).startswith("sprites/"):
        folder = SHIPPED / str(model).removeprefix("sprites/")
        if not folder.is_dir():
            shipped = [f"sprites/{path.name}" for path in SHIPPED.glob("*/")]
            raise UserError(f"no model is shipped as {model}", nearest(str(model), shipped))
        return folder
    folder = Path(model).expanduser()
    if folder.is_file():
        raise UserError(f"{folder} is a file, not a model folder", "pass the folder that holds model_index.json")
    return folder if folder.is_dir() else None


def _download(hub_id: str) -> Path:
    """The local snapshot of a hub model, safetensors only; the pipeline class is checked by whoever reads it."""
    try:
        return Path(DiffusionPipeline.download(hub_id, use_safetensors=True))
    except (OSError, ValueError) as error:
        raise UserError(
            f"{hub_id} is neither a folder here nor a model that the hub gave us: {_first_line(error)}",
            "check the path; for a hub id check the spelling, the network and, for a gated model, `hf auth login`",
        ) from error


def _read_local(folder: Path) -> tuple[ModelFolder, dict[str, Any]]:
    """The checked contents of a local model folder and its own call settings.

    A transformer folder is read as the pipeline named in its run.json with that one component replaced.
    """
    run = read_run(folder)
    for extra in ("conditioning", "lora"):
        if (folder / extra).exists():
            raise UserError(f"{folder / extra} needs a newer vidaccel", "a model without it can be loaded")
    if "pipeline" not in run:
        return read_pipeline_folder(folder), run.get("call", {})
    base = run["pipeline"] if _local_folder(folder / run["pipeline"]) is None else folder / run["pipeline"]
    base_folder = _local_folder(base)
    base_call = read_run(base_folder).get("call", {}) if base_folder else {}
    contents = read_pipeline_folder(base_folder or _download(str(base)))
    replaced = replace(contents.components[contents.family.denoisers[0].attribute], folder=folder)
    check_component(replaced)
    components = {**contents.components, replaced.name: replaced}
    return replace(contents, components=components), {**base_call, **run.get("call", {})}


def _load_module(component: Component, dtype: torch.dtype) -> torch.nn.Module:
    """The module with every weight from its files; `UserError` if a weight is missing, left over or of another shape."""
    try:
        module, info = component.cls.from_pretrained(
            component.folder, dtype=dtype, use_safetensors=True, local_files_only=True, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(
            f"{component.folder} does not load as a {component.cls.__name__}: {_first_line(error)}",
            "its weights and its config.json have to be of the same model",
        ) from error
    for problem in ("missing", "unexpected", "mismatched"):
        if keys := sorted(map(str, info[f"{problem}_keys"])):
            raise UserError(
                f"{component.folder} has {len(keys)} {problem} weights for a {component.cls.__name__}, one is {keys[0]}",
                "its weights and its config.json have to be of the same model",
            )
    return module


def _assemble(contents: ModelFolder, modules: dict[str, torch.nn.Module]) -> DiffusionPipeline:
    pipeline_class = getattr(diffusers, contents.pipeline)
    try:
        return pipeline_class.from_pretrained(contents.path, local_files_only=True, **modules)
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(
            f"{contents.path} does not load as a {contents.pipeline}: {_first_line(error)}",
            "its tokenizer or scheduler is broken: copy or download the folder again",
        ) from error


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n", 1)[0]
