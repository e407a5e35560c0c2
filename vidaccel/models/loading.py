"""Any supported model, local folder, hub id or shipped name, as a diffusers pipeline ready to call.

Modules are loaded one by one through their own class with `output_loading_info`, because a pipeline's
`from_pretrained` fills weights that a file lacks with random numbers and only warns; the pipeline class then takes the
modules and loads the rest.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from textwrap import shorten
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline

from vidaccel.artefacts import RUN_FILE, read_run, sha256_file, verify_files
from vidaccel.errors import UserError, nearest
from vidaccel.models.family import DiTFamily
from vidaccel.models.folder import (
    Component,
    ModelFolder,
    check_component,
    read_pipeline_folder,
    safetensors_header,
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
    target = resolve_device(device)
    if dtype not in ("auto", *DTYPES):
        raise UserError(f"no dtype is called {dtype}", nearest(dtype, ("auto", *DTYPES)))
    folder = _local_folder(model)
    if folder is None:
        contents, call, hashes = read_pipeline_folder(_download(str(model))), {}, {}
    else:
        contents, call, hashes = _read_local(folder)
    modules = {
        component.name: _load_module(component, _dtype(component, dtype, target))
        for component in contents.components.values()
        if component.is_module
    }
    pipe = _assemble(contents, modules).to(target)
    return LoadedPipeline(pipe, contents.family, str(folder or model), call, hashes)


def resolve_device(name: str) -> torch.device:
    """auto, cpu or cuda as a device; `UserError` for another name, and for cuda where there is none."""
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
    most = max(stored, key=stored.__getitem__, default="F32")
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
    """The local snapshot of a hub model, safetensors only."""
    try:
        return Path(DiffusionPipeline.download(hub_id, use_safetensors=True))
    except (OSError, ValueError) as error:
        raise UserError(
            f"{hub_id} is neither a folder here nor a model that the hub gave us: {_one_line(error)}",
            "check the path; for a hub id check the spelling, the network and, for a gated model, `hf auth login`",
        ) from error


def _read_local(folder: Path) -> tuple[ModelFolder, dict[str, Any], dict[str, str]]:
    """The checked contents of a local model folder, its own call settings and the hashes of its weights.

    A transformer folder is read as the pipeline named in its run.json with that one component replaced.
    """
    if (folder / "model_index.json").exists() or not (folder / "config.json").exists():
        contents, runs = read_pipeline_folder(folder), {folder: _run(folder)}
    else:
        contents, runs = _read_transformer(folder)
    for root, run in runs.items():
        verify_files(root, run)
    vouched = {root / name: digest for root, run in runs.items() for name, digest in run["files"].items()}
    hashes = {
        f"{component.name}/{file.name}": vouched.get(file) or sha256_file(file)
        for component in contents.components.values()
        for file in component.weight_files
    }
    call = {name: value for run in runs.values() for name, value in run.get("call", {}).items()}
    return contents, call, hashes


def _read_transformer(folder: Path) -> tuple[ModelFolder, dict[Path, dict[str, Any]]]:
    """The pipeline that a transformer folder belongs to, with this transformer, and the run.json of both."""
    run = _run(folder)
    if "pipeline" not in run:
        raise UserError(
            f"{folder} holds a single model and does not say which pipeline it belongs to",
            f'pass the pipeline folder above it, or name one in {folder / RUN_FILE}: "pipeline": "<folder or hub id>"',
        )
    beside = folder / run["pipeline"]
    base = beside if beside.is_dir() else _local_folder(run["pipeline"])
    contents = read_pipeline_folder(base or _download(run["pipeline"]))
    transformer = replace(contents.components[contents.family.denoisers[0].attribute], folder=folder)
    check_component(transformer)
    contents = replace(contents, components=contents.components | {transformer.name: transformer})
    return contents, ({base: _run(base)} if base else {}) | {folder: run}


def _run(folder: Path) -> dict[str, Any]:
    """run.json of a model folder; an empty one for a plain diffusers folder."""
    for extra in ("conditioning", "lora"):
        if (folder / extra).exists():
            raise UserError(f"{folder / extra} needs a newer vidaccel", "choose a model that has none")
    return read_run(folder, "model/1") if (folder / RUN_FILE).exists() else {"files": {}}


def _load_module(component: Component, dtype: torch.dtype) -> torch.nn.Module:
    """The module with every weight from its files; `UserError` if one is missing, left over or of another shape."""
    hint = f"weights and config.json have to be of the same {component.cls.__name__}"
    with _reading(component.folder, hint):
        module, info = component.cls.from_pretrained(
            component.folder,
            dtype=dtype,
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # that is, list them in `info`; they are refused below
        )
    files = component.weight_files
    for problem in ("missing", "unexpected", "mismatched"):
        names = sorted(key if isinstance(key, str) else key[0] for key in info[f"{problem}_keys"])
        if names:
            where = files[0] if len(files) == 1 else component.folder
            raise UserError(f"{where} has {len(names)} {problem} weights, such as {names[0]}", hint)
    return module


def _assemble(contents: ModelFolder, modules: dict[str, torch.nn.Module]) -> DiffusionPipeline:
    """The pipeline of these modules with the tokenizers, scheduler and guider of the folder."""
    with _reading(contents.path, "its tokenizer or scheduler is broken: copy or download the folder again"):
        return getattr(diffusers, contents.pipeline).from_pretrained(contents.path, local_files_only=True, **modules)


@contextmanager
def _reading(folder: Path, hint: str) -> Iterator[None]:
    """Turn what diffusers, transformers and tokenizers raise about a folder into a `UserError`.

    That can be anything: a wrong value in a config surfaces as TypeError, KeyError, a dataclass error or, from the
    Rust of tokenizers, a plain Exception. The original is chained.
    """
    try:
        yield
    except Exception as error:
        raise UserError(f"{folder} does not load: {_one_line(error)}", hint) from error


def _one_line(error: Exception) -> str:
    return shorten(f"{type(error).__name__}: {error}", 300)
