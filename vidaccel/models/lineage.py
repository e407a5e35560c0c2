"""What a student was distilled from, by the run.json of each model on the way."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vidaccel.artefacts import RUN_FILE, read_json, sha256_file
from vidaccel.errors import UserError
from vidaccel.models.files import local_path
from vidaccel.models.folder import STUDENT_PARTS


def teachers(model: str, hint: str) -> list[str]:
    """The model's teacher, that one's teacher and so on; [] for a model that was not distilled.

    Raises:
        UserError: a teacher is not said, or is no longer the model that it was; `hint` says what else may be done.
    """
    found: list[str] = []
    while (run := recorded(model)) is not None and is_distilled(model, run):
        teacher = run["config"].get("teacher") or run.get("pipeline")
        if not isinstance(teacher, str):
            raise UserError(f"{model} does not say what it was distilled from", hint)
        _check(model, teacher, run["parents"].get("teacher"), hint)
        if teacher in found:
            break
        found.append(teacher)
        model = teacher
    return found


def lora_of_root(model: str, found: Sequence[str]) -> list[str] | None:
    """LoRA files with which the last of the model's `teachers` is what the model was distilled from, those of each
    distillation on the way in their order: of two transformers each has its own."""
    runs = [recorded(each) for each in reversed([model, *found][:-1])]
    return [file for run in runs if run is not None for file in run["config"].get("lora") or ()] or None


def root_of(model: str) -> str:
    """The first of the models that this one was distilled from, as far as they are here: itself where it was not."""
    try:
        return [model, *teachers(model, "")][-1]
    except UserError:
        return model


def recorded(model: str) -> dict[str, Any] | None:
    """run.json of a model folder; None where there is none, as of a hub id and of a plain pipeline."""
    file = local_path(model) / RUN_FILE
    run = read_json(file, "copy the folder again") if file.is_file() else None
    return run and {"config": {}, "parents": {}} | run


def is_distilled(model: str, run: dict[str, Any]) -> bool:
    """Whether this is the run.json of a student."""
    made_of = run["parents"].keys() & {"teacher", "student"}  # the second is a file that others have released
    return bool(made_of) or any((local_path(model) / part).exists() for part in STUDENT_PARTS)


def _check(model: str, teacher: str, expected: str | None, hint: str) -> None:
    folder: Path = local_path(teacher)
    if expected is None and not folder.exists() and teacher.count("/") == 1:
        return  # a hub id
    if not folder.is_dir():
        raise UserError(f"{teacher}, which {model} was distilled from, is not here", hint)
    if expected and (not (folder / RUN_FILE).is_file() or sha256_file(folder / RUN_FILE) != expected):
        raise UserError(f"{teacher} is no longer the model that {model} was distilled from", hint)
