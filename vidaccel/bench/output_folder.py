"""A benchmark goes on only in an output folder that it began itself, with the same models on the same machine.

Its settings.json holds the configuration, the environment, and a hash of each model's run.json.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vidaccel.artefacts import RUN_FILE, differences, read_json, read_run, sha256_file, write_json
from vidaccel.config.benchmark import BenchmarkConfig, MethodConfig
from vidaccel.config.loader import to_dict, with_current_names
from vidaccel.errors import UserError
from vidaccel.models.adapters import Adapter
from vidaccel.models.files import local_path
from vidaccel.train.checkpoints import flat

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
    found = differences(_compared(read_json(file, "choose another folder with -o")), _compared(settings))
    if found:
        more = f"; and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
        raise UserError(
            f"{folder} holds another benchmark: {'; '.join(found[:SHOWN])}{more}",
            "choose another folder with -o, or set things back",
        )


def parents(config: BenchmarkConfig, methods: Mapping[str, MethodConfig]) -> dict[str, str]:
    """SHA-256 of the run.json of each local model, predictor and decoder and of each LoRA file, by its role; a row's
    own by its name."""
    roles = {role: getattr(config, role) for role in ("model", "student", "distilled", "predictor")}
    for name, method in methods.items():
        roles |= {f"{name}.model": method.model, f"{name}.predictor": method.predictor}
        roles |= {f"{name}.decoder": method.decoder}
    files = {role: local_path(path) / RUN_FILE for role, path in roles.items() if path is not None}
    for name, lora in {"": config.lora, **{f"{name}.": method.lora for name, method in methods.items()}}.items():
        files |= {f"{name}lora.{i}": Adapter.parsed(each).file for i, each in enumerate(lora or ())}
    return {role: sha256_file(file) for role, file in files.items() if file.exists()}


def _compared(settings: Mapping[str, Any]) -> dict[str, Any]:
    """By dotted names as they are now; what an earlier version did not know is at its default."""
    config = to_dict(BenchmarkConfig()) | with_current_names(settings["config"], BenchmarkConfig)
    config["vbench"] = None  # another environment, or none, judges the same videos
    config["methods"] = {name: to_dict(MethodConfig()) | method for name, method in config["methods"].items()}
    return flat({**settings, "config": config})
