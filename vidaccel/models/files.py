"""A model on disk, by the name that a user gives it: a local folder, a hub id or a shipped name.

What is found is checked whole before any weight is read (folder.py); the folder of a transformer or an adapter alone is
read as the pipeline that its run.json names, with that part replaced.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline
from huggingface_hub import snapshot_download

from vidaccel.artefacts import RUN_FILE, own_files, read_run, refuse_unfinished, sha256_file, verify_files
from vidaccel.errors import UserError
from vidaccel.file_hashes import FileHashes
from vidaccel.models.adapters import Adapter
from vidaccel.models.folder import FORMAT, STUDENT_PARTS, ModelFolder, read_pipeline_folder, with_own_parts
from vidaccel.models.released import Released
from vidaccel.models.weights import one_line
from vidaccel.worlds import WORLDS, shipped_models

ADAPTERS = "adapter-"
"""How names of LoRA files begin among hashes, with their number and scale behind it."""


def local_path(name: str | Path) -> Path:
    """Where the folder of this name would be: within the package for the name of a shipped model, WORLD/<name> as text.

    Raises:
        UserError: such a name is also that of a folder here, which is called ./WORLD/<name>.
    """
    shipped = shipped_models()
    if not isinstance(name, str) or name not in shipped:
        return Path(name).expanduser()
    if Path(name).exists():
        raise UserError(f"{name} is a shipped model, and a folder here has that name too", f"write ./{name} for it")
    return shipped[name]


def _local_folder(model: str | Path) -> Path | None:
    """The folder that `model` means, None if it can only be a hub id."""
    folder = local_path(model)
    if str(model).split("/")[0] in WORLDS and not folder.exists():
        hint = f"choose from: {', '.join(shipped_models())}; or train one: vidaccel distill"
        raise UserError(f"no model is shipped as {model}", hint)
    if folder.is_file():
        raise UserError(f"{folder} is a file, not a model folder", "pass the folder that holds model_index.json")
    return folder if folder.is_dir() else None


def config_folder(model: str | Path) -> Path:
    """The folder of a model; of a hub id a snapshot of its JSON files alone.

    Raises:
        UserError: it cannot be found.
    """
    return _local_folder(model) or _download(str(model), partial(snapshot_download, allow_patterns="*.json"))


def _download(hub_id: str, fetch: Callable[..., Any] | None = None) -> Path:
    """The local snapshot of a hub model, safetensors only, or what `fetch` gets of it."""
    if hub_id.count("/") > 1 or hub_id.startswith(("/", ".", "~")):
        raise UserError(f"there is no folder {hub_id}", "check the path of the model")
    try:
        return Path(fetch(hub_id) if fetch else DiffusionPipeline.download(hub_id, use_safetensors=True))
    except (OSError, ValueError) as error:
        raise UserError(
            f"{hub_id} is neither a folder here nor a model that the hub gave us: {one_line(error)}",
            "check the path; for a hub id check the spelling, the network and, for a gated model, `hf auth login`",
        ) from error


@dataclass(frozen=True)
class ModelFiles:
    """A model on disk, checked, before any weight is read."""

    source: str
    """The local folder or hub id."""
    contents: ModelFolder
    call: dict[str, Any]
    """As in `LoadedPipeline`."""
    hashes: Mapping[str, str]
    """As in `LoadedPipeline`."""
    student: Released | None = None
    """A file that others have released, whose weights take the place of the transformer's."""

    def default(self, name: str) -> Any:
        """As of a `LoadedPipeline`."""
        return self.call.get(name, getattr(self.contents.family.defaults, name))


def read_model(model: str | Path, student: str | Path | None = None) -> ModelFiles:
    """The files of what `load_pipeline` calls a model, with a student in its transformer's place; errors as there."""
    files = _read_model(model)
    if student is None:
        return files
    contents = files.contents
    released = Released.opened(student, "student", contents.family)
    if contents.conditioning or contents.lora:
        raise UserError(f"{files.source} is a student itself", "name the model that the released one was made of")
    return replace(
        files,
        call=released_call(files.call, released),
        hashes=hashes_of(contents, student=released),
        student=released,
    )


def _read_model(model: str | Path) -> ModelFiles:
    folder = _local_folder(model)
    if folder is None:
        contents = read_pipeline_folder(_download(str(model)))
        return ModelFiles(str(model), contents, {}, hashes_of(contents))
    contents, runs = _read_local(folder)
    for root, run in runs.items():
        verify_files(root, run)
    call = {name: value for run in runs.values() for name, value in run.get("call", {}).items()}
    # A folder here that is called like a shipped model stays itself when its source is read again.
    source = str(folder.absolute() if str(folder) in shipped_models() else folder)
    return ModelFiles(source, contents, call, hashes_of(contents))


def hashes_of(contents: ModelFolder, adapters: Sequence[Adapter] = (), student: Released | None = None) -> FileHashes:
    """Of all weights, by names that are the same for a folder here and for a snapshot of the hub's."""
    weights = {component.name: component.weight_files for component in contents.components.values()}
    if student is not None:
        weights[contents.family.denoisers[0].attribute] = [student.file]
    for name, part in (("conditioning", contents.conditioning), ("lora", contents.lora)):
        weights[name] = own_files(part, "*.safetensors") if part else []
    weights |= {part.name: own_files(part, "*.safetensors") for part in contents.further.values()}
    named = {f"{name}/{file.name}": file for name, files in weights.items() for file in files}
    return FileHashes(named | {f"{ADAPTERS}{i}/{each.recorded}": each.file for i, each in enumerate(adapters)})


def _read_local(folder: Path) -> tuple[ModelFolder, dict[Path, dict[str, Any]]]:
    """The contents of a local model folder, and the run.json of each folder that had a part in it.

    The folder of a transformer or an adapter is read as the pipeline named in its run.json with that part replaced.
    """
    run = _run(folder)
    alone = (folder / "config.json").exists() or (folder / "lora").exists()
    if not (folder / "model_index.json").exists():
        refuse_unfinished(folder)
    if (folder / "model_index.json").exists() or not alone:
        return read_pipeline_folder(folder), {folder: run}
    if "pipeline" not in run:
        raise UserError(
            f"{folder} holds a single model and does not say which pipeline it belongs to",
            f'pass the pipeline folder above it, or name one in {folder / RUN_FILE}: "pipeline": "<folder or hub id>"',
        )
    named, shipped = folder / run["pipeline"], shipped_models().get(run["pipeline"])
    base = named if named.is_dir() else shipped or _local_folder(run["pipeline"])
    contents = with_own_parts(read_pipeline_folder(base or _download(run["pipeline"])), folder)
    expected = run.get("parents", {}).get("pipeline")
    if expected and expected != (sha256_file(base / RUN_FILE) if base and (base / RUN_FILE).exists() else None):
        raise UserError(
            f"{base or run['pipeline']} is no longer the model that {folder} was made for",
            "put that model back in its place, or train again on the new one",
        )
    return contents, ({base: _run(base)} if base else {}) | {folder: run}


def _run(folder: Path) -> dict[str, Any]:
    """run.json of a model folder; an empty one for a plain diffusers folder, which no student's is."""
    students = any((folder / part).exists() for part in STUDENT_PARTS)
    return read_run(folder, FORMAT) if students or (folder / RUN_FILE).exists() else {"files": {}}


def released_call(call: Mapping[str, Any], released: Released) -> dict[str, Any]:
    """How a model is called with a released student in its transformer's place."""
    own = {name: value for name, value in call.items() if name not in ("timesteps", "sigmas", "shift")}
    return own | dict(released.layout.call)
