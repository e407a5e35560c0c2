"""A feature folder: how large it will be, its making, and whether one that is read was made for this model."""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from torch import nn

from vidaccel import config as configuration
from vidaccel.artefacts import RUN_FILE, read_run, sha256_file, write_run
from vidaccel.collect.encode import encode_samples, text_settings
from vidaccel.collect.source import Source, open_source
from vidaccel.config import CollectConfig
from vidaccel.data.shards import Sample, ShardFolder, sample_bytes, write_shards
from vidaccel.errors import UserError
from vidaccel.models.loading import LoadedPipeline

FORMAT = "features/1"
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Job:
    """What a feature folder will hold."""

    loaded: LoadedPipeline
    config: CollectConfig
    kind: str
    count: int
    """Samples."""
    compute: Callable[[list[int]], list[Sample]]
    """Consecutive indices, at most the config's batch size, to their samples."""
    made_with: dict[str, str]
    """SHA-256 of each weight file that had a part in it."""
    settings: dict[str, Any]
    """What else the samples depend on, as JSON can hold it."""


@dataclass(frozen=True)
class Plan:
    """How large a feature folder will be, told by its first sample."""

    count: int
    sample_bytes: int

    def __str__(self) -> str:
        total = decimal_bytes(self.count * self.sample_bytes)
        return f"{self.count} samples of {decimal_bytes(self.sample_bytes)}, {total} in all"


def job_of(loaded: LoadedPipeline, config: CollectConfig) -> Job:
    """What `config` asks for; raises what `open_source` does."""
    return encoding(loaded, open_source(loaded, config), config)


def encoding(loaded: LoadedPipeline, source: Source, config: CollectConfig) -> Job:
    """The samples of kind `encoded` of these clips."""
    if config.tiling:
        loaded.pipe.vae.enable_tiling()

    def compute(indices: list[int]) -> list[Sample]:
        videos, records = zip(*(source[i] for i in indices), strict=True)
        return encode_samples(loaded, videos, records, config.store)

    settings = {"store": config.store, "dtype": str(loaded.pipe.vae.dtype), "tiling": config.tiling}
    settings |= {"text": text_settings(loaded)} | source.identity | _hub(loaded)
    return Job(loaded, config, "encoded", len(source), compute, encoder_hashes(loaded), settings)


def plan(job: Job) -> Plan:
    """Computes one sample.

    Raises:
        UserError: the folder would be larger than the config's `max_gigabytes`.
    """
    planned = Plan(job.count, sample_bytes(job.compute([0])[0]))
    limit = job.config.max_gigabytes
    if limit is not None and planned.count * planned.sample_bytes > limit * 1e9:
        raise UserError(
            f"{planned} are more than max_gigabytes={limit:g}", "collect fewer or smaller samples, or raise the limit"
        )
    return planned


def collect(job: Job, folder: Path) -> None:
    """Write the folder, going on where an earlier, killed run was.

    Raises:
        UserError: the folder was begun with another model, other clips or other settings, or cannot be written.
    """
    started = datetime.now(UTC)
    config = job.config
    write_shards(
        folder,
        job.compute,
        count=job.count,
        kind=job.kind,
        settings=job.made_with | job.settings,
        per_shard=config.per_shard,
        batch_size=config.batch_size,
        title=f"collecting {job.kind}",
    )
    model_run = Path(job.loaded.source) / RUN_FILE
    write_run(
        folder,
        format=FORMAT,
        command="vidaccel collect-features",
        config=configuration.to_dict(config),
        seed=config.seed,
        started=started,
        parents={"model": sha256_file(model_run)} if model_run.is_file() else {},
        kind=job.kind,
        made_with=job.made_with,
    )


def open_features(folder: str | Path, kind: str, hashes: Mapping[str, str], on_damage: str = "stop") -> ShardFolder:
    """A feature folder to train on, every byte of it checked.

    Args:
        kind: `encoded` or `trajectory`.
        hashes: those of the model that will be trained on it, as `LoadedPipeline` has them.
        on_damage: `stop`, or `skip` to go on without the shards that are damaged, which a warning names.

    Raises:
        UserError: it is unfinished, of another kind, made with another model, or damaged.
    """
    check_made_for(folder, hashes)
    features = ShardFolder(folder, kind, on_damage=on_damage)
    if on_damage == "stop":
        features.verify()
    return features


def check_made_for(folder: str | Path, hashes: Mapping[str, str]) -> None:
    """Refuse a feature folder that was made with other weights than those of `hashes`.

    Only what shaped the features counts: encoded clips are those of an autoencoder and text encoders, and serve every
    transformer beside these. Warns where one side has no hashes, as models from the hub have none.
    """
    made_with = read_run(folder, FORMAT).get("made_with")
    if not made_with or not hashes:
        log.warning("%s does not say what it was made with, or the model has no hashes: they may not fit", folder)
        return
    others = sorted(name for name, digest in made_with.items() if hashes.get(name) != digest)
    if others:
        raise UserError(
            f"{folder} was made with another model: its {', '.join(others)} differ",
            "collect features with this model, or train the one that they were made with",
        )


def encoder_hashes(loaded: LoadedPipeline) -> dict[str, str]:
    """Hashes of the weights that make latents and text tensors: every module's but the denoisers'."""
    denoisers = {denoiser.attribute for denoiser in loaded.family.denoisers}
    encoders = {name for name, part in loaded.pipe.components.items() if isinstance(part, nn.Module)} - denoisers
    return {name: digest for name, digest in loaded.hashes.items() if name.split("/")[0] in encoders}


def _hub(loaded: LoadedPipeline) -> dict[str, str]:
    """The hub id of a model that has no hashes to be told apart by."""
    return {} if loaded.hashes else {"model": loaded.source}


def decimal_bytes(count: int) -> str:
    """1234567 as 1.23 MB."""
    value, unit = float(count), "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if value < 1000:
            break
        value, unit = value / 1000, larger
    return f"{value:.3g} {unit}"
