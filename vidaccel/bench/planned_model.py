"""How large a model is that a training is planned for, from what stands beside its weights, or from that of another.

A folder is read as it lies here, and of a hub id its JSON files are fetched. What is not there yet (`runs/cfg`) is as
large as what `size_of` names, or as the model that the shipped configuration of the training is for.
"""

import functools
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vidaccel.artefacts import RUN_FILE
from vidaccel.bench.generation import Size
from vidaccel.bench.own_model import planned
from vidaccel.config.benchmark import BenchmarkConfig
from vidaccel.config.checks import SIZE
from vidaccel.config.loader import conf_root, load
from vidaccel.config.plan import PlanConfig
from vidaccel.errors import UserError
from vidaccel.families.base import DiTFamily
from vidaccel.families.registry import FAMILIES
from vidaccel.models.files import config_folder, local_path
from vidaccel.models.folder import read_json

COMPRESSIONS = (
    ("temporal_compression_ratio", "spatial_compression_ratio"),
    ("scale_factor_temporal", "scale_factor_spatial"),
)
"""What the autoencoders' classes call how many frames and pixels they make one of."""


@dataclass(frozen=True)
class PlannedModel:
    """A model to be trained or learnt from."""

    config: BenchmarkConfig
    """Its transformer and texts, in float32."""
    size: Size
    """Of its videos."""
    call: dict[str, Any]
    """What its run.json says of how it is called."""
    embeds: tuple[str, ...]
    """Of "r" and "g", what its conditioning embeds."""
    beside: dict[str, int]
    """Bytes of what is in memory beside the transformer, by what it is."""
    source: str
    """What it was read from."""

    @property
    def family(self) -> DiTFamily:
        return FAMILIES[self.config.family]


def planned_model(
    source: str, plan: PlanConfig, conf: str | None, named: bool, asked: dict[str, int | None]
) -> PlannedModel:
    """The model that the settings name.

    Args:
        source: as they name it.
        conf: the configuration that they are from.
        named: whether the user named the model, and not the configuration.
        asked: num_frames, height and width, where they say.

    Raises:
        UserError: it is not there and nothing says how large it is, or it is of no family that is known.
    """
    sized = _benchmark_conf(conf) if conf and not named else None
    if plan.size_of is None and sized is not None and not local_path(source).is_dir():
        return _shipped(sized, asked)
    wanted = source if plan.size_of is None else plan.size_of
    if plan.size_of is not None and _benchmark_conf(wanted) == wanted and not local_path(wanted).exists():
        return _shipped(wanted, asked)
    try:
        folder = _with_transformer(config_folder(wanted))
    except UserError as error:
        hint = f"{error.hint}; for a model that is not there yet say one as large: size_of=wan_14b, or a folder"
        raise UserError(error.message, hint) from error
    return _of_folder(wanted, folder, asked)


def _benchmark_conf(name: str) -> str | None:
    """The configuration of `benchmark` for the model that the first part of a shipped configuration's name is."""
    first = name.split("/")[0]
    if name.endswith((".yaml", ".yml")):
        return None
    return first if (conf_root() / "benchmark" / f"{first}.yaml").is_file() else None


def _shipped(name: str, asked: dict[str, int | None]) -> PlannedModel:
    config = planned(replace(_configured(name), dtype="float32"))
    if config.model is not None:
        return _of_folder(config.model, _with_transformer(config_folder(config.model)), asked)
    size = _size(dict(zip(SIZE, config.videos[0], strict=True)), asked)
    beside = {name: 2 * count for name, count in config.beside.items()}
    return PlannedModel(config, size, {}, (), beside, f"the configuration {name} of benchmark")


@functools.cache
def _configured(name: str) -> BenchmarkConfig:
    return load("benchmark", BenchmarkConfig, name)


def _of_folder(name: str, folder: Path, asked: dict[str, int | None]) -> PlannedModel:
    run = read_json(folder / RUN_FILE) if (folder / RUN_FILE).is_file() else {}
    call = run.get("call", {})
    config = planned(BenchmarkConfig(model=str(folder), sizes=None, dtype="float32"))
    family = FAMILIES[config.family]
    like = _configured(_conf_of(family))
    autoencoder = read_json(folder / "vae" / "config.json") if (folder / "vae" / "config.json").is_file() else {}
    known = [[autoencoder[key] for key in keys] for keys in COMPRESSIONS if all(autoencoder.get(key) for key in keys)]
    longest = {"prompt": call["max_sequence_length"]} if "max_sequence_length" in call else {}
    config = replace(
        config, text_tokens=like.text_tokens | longest, compression=known[0] if known else like.compression
    )
    conditioning = folder / "conditioning" / "config.json"
    embeds = tuple(read_json(conditioning)["embeds"]) if conditioning.is_file() else ()
    size = _size(dict(zip(SIZE, config.videos[0], strict=True)), asked)
    return PlannedModel(config, size, call, embeds, stored_beside(folder), name)


def _conf_of(family: DiTFamily) -> str:
    """The configuration of `benchmark` for a released model of this family: where there are several, for the first."""
    stems = sorted(path.stem for path in (conf_root() / "benchmark").glob(f"{family.name}*.yaml"))
    return next(stem for stem in stems if stem == family.name or FAMILIES.get(stem, family) is family)


def _size(own: dict[str, int], asked: dict[str, int | None]) -> Size:
    size = own | {name: value for name, value in asked.items() if value is not None}
    return size["num_frames"], size["height"], size["width"]


def _with_transformer(folder: Path) -> Path:
    """The folder itself, or the pipeline that an adapter or a transformer alone belongs to."""
    if not (folder / "transformer" / "config.json").is_file() and (folder / RUN_FILE).is_file():
        pipeline = read_json(folder / RUN_FILE).get("pipeline")
        if pipeline is not None:
            return config_folder(pipeline)
    return folder


def stored_beside(folder: Path) -> dict[str, int]:
    """Bytes of the weights of encoders, of the autoencoder and of what LTX-2 has besides, as they lie there."""
    parts = {
        "text encoder": ["text_encoder", "text_encoder_2"],
        "image encoder": ["image_encoder"],
        "connectors": ["connectors"],
        "autoencoder": ["vae"],
        "sound": ["audio_vae", "vocoder"],
    }
    found = {
        name: sum(file.stat().st_size for part in names for file in (folder / part).glob("*.safetensors"))
        for name, names in parts.items()
    }
    return {name: size for name, size in found.items() if size}
