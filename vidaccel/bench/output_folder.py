"""Whose an output folder is: a benchmark goes on only in what it began itself, with the same models and machine.

Its settings.json holds the configuration, the environment, and a hash of each model's run.json.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from vidaccel.artefacts import RUN_FILE, read_run, sha256_file, write_json
from vidaccel.config.benchmark import BenchmarkConfig, MethodConfig
from vidaccel.config.loader import to_dict
from vidaccel.errors import UserError
from vidaccel.models.loading import local_path

FORMAT = "benchmark/1"
SETTINGS_FILE = "settings.json"
SHOWN = 5
"""Differences that an error names."""


def open_output_folder(
    folder: Path, config: BenchmarkConfig, quality: bool, environment: dict[str, Any], parents: dict[str, str]
) -> None:
    """`UserError` naming the differences unless the folder is new or holds the beginning of this very benchmark."""
    settings = {"config": to_dict(config), "quality": quality, "environment": environment, "models": parents}
    if (folder / RUN_FILE).exists():
        read_run(folder, FORMAT)
    file = folder / SETTINGS_FILE
    if not file.exists():
        write_json(file, settings)
        return
    found = list(differences(json.loads(file.read_text(encoding="utf-8")), json.loads(json.dumps(settings))))
    if found:
        more = f"; and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
        raise UserError(
            f"{folder} holds another benchmark: {'; '.join(found[:SHOWN])}{more}",
            "choose another folder with -o, or set things back",
        )


def parents(config: BenchmarkConfig, methods: Mapping[str, MethodConfig]) -> dict[str, str]:
    """SHA-256 of the run.json of each local model and predictor, by its role; a row's own by the row's name."""
    roles = {role: getattr(config, role) for role in ("model", "student", "distilled", "predictor")}
    for name, method in methods.items():
        roles |= {f"{name}.model": method.model, f"{name}.predictor": method.predictor}
    files = {role: local_path(path) / RUN_FILE for role, path in roles.items() if path is not None}
    return {role: sha256_file(file) for role, file in files.items() if file.exists()}


def differences(old: Any, new: Any, where: str = "") -> Iterator[str]:
    """What is not the same in two trees of JSON: "config.rounds was 3 and is 5"."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in _keys(old, new):
            yield from differences(old.get(key), new.get(key), f"{where}.{key}" if where else key)
    elif old != new:
        yield f"{where} was {old} and is {new}"


def _keys(*trees: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(key for tree in trees for key in tree))
