"""A training whose command is given again when it is done: told by its settings and by the hashes of the files that
they name, before any model is loaded.

    folder/.asked.json   written when what the training made is in place, of which it is no part
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vidaccel import __version__
from vidaccel.artefacts import RUN_FILE, is_finished, read_json, write_json
from vidaccel.config.distill import DistillConfig
from vidaccel.config.loader import to_dict
from vidaccel.file_hashes import file_sha256
from vidaccel.models.adapters import Adapter
from vidaccel.models.files import local_path, read_model

FILE = ".asked.json"


def is_done(folder: Path, format: str, config: DistillConfig) -> bool:
    """Whether `folder` holds whole what this command makes.

    False too where only the training itself can tell: of videos, which are many files; of another version's; of files
    that are not there any more.

    Raises:
        UserError: the teacher or a file of `lora` is not there any more.
    """
    file = folder / FILE
    if not file.is_file() or not is_finished(folder, format):
        return False
    return read_json(file, f"remove {file}") == _asked(config)


def note_done(folder: Path, config: DistillConfig) -> None:
    """Says so for `is_done`."""
    if (asked := _asked(config)) is not None:
        write_json(folder / FILE, asked)


def _asked(config: DistillConfig) -> Mapping[str, Any] | None:
    """What the file says of this command; None where nothing short of the training can say it."""
    if config.data is not None:
        return None
    files = named_files(config)
    if not all(file.is_file() for file in files.values()):
        return None
    return {
        "vidaccel": __version__,
        "config": to_dict(config),
        "teacher": dict(read_model(config.teacher).hashes),
        "files": {role: file_sha256(file) for role, file in files.items()},
    }


def named_files(config: DistillConfig) -> dict[str, Path]:
    """What tells the things that the settings name besides the teacher, by their roles: LoRA files themselves, of
    folders the run.json, which a model of the hub has not here."""
    files = {f"lora.{i}": Adapter.parsed(each).file for i, each in enumerate(config.lora or ())}
    folders = {"features": config.features, "start": config.start}
    return files | {role: local_path(each) / RUN_FILE for role, each in folders.items() if each is not None}
