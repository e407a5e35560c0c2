"""What a distillation learns from: encoded clips, read as they are drawn or all in the device's memory, and some that
are kept out of them for its gates."""

import logging
from collections.abc import Callable
from copy import copy as duplicate
from typing import Any, NamedTuple

import torch

from vidaccel.artefacts import RUN_FILE, sha256_file
from vidaccel.collect.bank import Bank, world_bank
from vidaccel.collect.features import check_tensors, open_features
from vidaccel.collect.source import EncodedSource, open_source
from vidaccel.config.checks import CLIP_SIZE
from vidaccel.config.collect import CollectConfig
from vidaccel.config.distill import DistillConfig
from vidaccel.data.buckets import Buckets
from vidaccel.data.shards import ShardFolder
from vidaccel.errors import UserError
from vidaccel.families.walk import denoisers_of
from vidaccel.models.loading import LoadedPipeline
from vidaccel.models.velocity import Text
from vidaccel.processes import world
from vidaccel.train.methods.base import Data

log = logging.getLogger(__name__)

GATE_SAMPLES, LARGE_GATE_SAMPLES, GATE_SHARE = 512, 64, 0.02
"""Clips that gates are computed on, of a large model too, and at most how many of a feature folder are kept out for
them."""
LARGE = 1_000_000_000
"""Parameters above which gates are computed on fewer clips, and the mean-velocity gap, which takes hundreds of passes a
run, only if asked for."""


class Clips(NamedTuple):
    """What a training learns from."""

    data: Data
    made_of: dict[str, Any]
    """What tells it from others, as JSON can hold it."""
    held_out: Bank | None = None
    """Clips that it does not learn from."""


def open_data(loaded: LoadedPipeline, config: DistillConfig) -> tuple[ShardFolder | EncodedSource, dict[str, Any]]:
    """The encoded clips to train on, and what tells them from others."""
    if config.features is not None:
        features = open_features(config.features, "encoded", loaded.hashes, config.on_damage, several_sizes=True)
        check_tensors(features, loaded)
        return features, {"features": sha256_file(features.folder / RUN_FILE), "samples": len(features)}
    own = {name: getattr(config, name) for name in ("data", "clips", "sizes", "seed", *CLIP_SIZE)}
    clips = CollectConfig(model=config.teacher, **own)
    source = open_source(loaded, clips)
    return EncodedSource(loaded, source), {"clips": len(source)} | source.fingerprint


def gate_samples(parameters: int) -> int:
    """Clips that gates of a model of so many are computed on, where nobody says."""
    return LARGE_GATE_SAMPLES if parameters > LARGE else GATE_SAMPLES


def training_clips(
    loaded: LoadedPipeline,
    config: DistillConfig,
    data: ShardFolder | EncodedSource,
    made_of: dict,
    target: torch.device,
    unconditional: Callable[[], Text],
) -> Clips:
    """`data` in the device's memory where settings say so, and clips that are kept out of it for the gates."""
    cuda = target.type == "cuda" and world() == 1
    parameters = sum(p.numel() for p in denoisers_of(loaded.pipe, loaded.family)[0].parameters())
    count = (gate_samples(parameters) if cuda else 0) if config.gate_samples is None else config.gate_samples
    if not count and config.gate_samples is None:
        log.info("how much of its stage the student learns is not computed here: gate_samples=64 does, on 64 clips")
    if world() > 1 and (config.bank == "on" or count):
        raise UserError("several processes keep no bank of clips, and compute no gates", "set bank=auto gate_samples=0")
    if data.buckets is not None:
        return _of_several_sizes(loaded, config, data, data.buckets, made_of, target, count, unconditional)
    rendered = world_bank(loaded, count, 1, config.seed, "held_out") if count else None
    kept_out = 0
    if count and rendered is None:
        kept_out = min(count, max(1, round(GATE_SHARE * len(data))), len(data) - 1)
    if not _in_memory(config, data, target, kept_out > 0):
        if not kept_out:
            return Clips(data, made_of, rendered)
        first = len(data) - kept_out
        held_out = Bank.of(data.part(range(first, len(data))), target, loaded.family, unconditional())
        return _apart(data.part(range(first)), held_out, made_of)
    bank = Bank.of(data, target, loaded.family, unconditional())
    log.info("%d clips are in the device's memory: %.1f GiB", len(bank), _nbytes(data) / 2**30)
    if not kept_out:
        return Clips(bank, made_of, rendered)
    return _apart(*bank.split(kept_out), made_of)


def _apart(data: Data, held_out: Bank, made_of: dict[str, Any]) -> Clips:
    """A folder's clips but for the last ones."""
    every = len(held_out) + len(data)
    log.info("the last %d of %d clips are kept out of the training, for its gates", len(held_out), every)
    return Clips(data, made_of | {"kept_out": len(held_out)}, held_out)


def _in_memory(
    config: DistillConfig, data: ShardFolder | EncodedSource, target: torch.device, some_kept_out: bool
) -> bool:
    """Whether all clips go into the device's memory: as it is set, else where there is room for them on a CUDA device,
    and on a CPU where gates want some of them."""
    if config.bank != "auto":
        return config.bank == "on"
    if target.type == "cpu":
        return some_kept_out
    return world() == 1 and _nbytes(data) < torch.cuda.mem_get_info(target)[0] / 4


def _nbytes(data: ShardFolder | EncodedSource) -> int:
    """Of all samples, by the first."""
    return sum(tensor.nbytes for tensor in data[0][0].values()) * len(data)


def _of_several_sizes(
    loaded: LoadedPipeline,
    config: DistillConfig,
    data: ShardFolder | EncodedSource,
    buckets: Buckets,
    made_of: dict,
    target: torch.device,
    count: int,
    unconditional: Callable[[], Text],
) -> Clips:
    """`data` without the clips that are kept out of it for the gates, at most `count` of the size that most have."""
    sizes = len(buckets.groups)
    if config.bank == "on":
        raise UserError(
            f"the clips in {config.features or config.data} have {sizes} sizes, and a bank is of one",
            "leave bank= out, or collect features of one size",
        )
    log.info("clips of %d sizes, batches of one each: they are read when they are drawn", sizes)
    kept_out = min(count, max(1, round(GATE_SHARE * len(data))), len(buckets.commonest) - 1)
    if kept_out < 1:
        return Clips(data, made_of)
    last = buckets.commonest[-kept_out:]
    held_out = Bank.of(data.part(last), target, loaded.family, unconditional())
    data = duplicate(data)
    data.buckets = buckets.without(last)
    said = "%d of %d clips, of the size that most have, are kept out of the training, for its gates"
    log.info(said, kept_out, len(data))
    return Clips(data, made_of | {"kept_out": kept_out}, held_out)
