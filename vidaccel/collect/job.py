"""The making of a feature folder: how large it will be, and its writing, whatever its kind."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from vidaccel.artefacts import RUN_FILE, is_finished, sha256_file, write_run
from vidaccel.collect.features import FORMAT
from vidaccel.config import loader as configuration
from vidaccel.config.collect import CollectConfig
from vidaccel.data.buckets import Size
from vidaccel.data.shards import Sample, sample_bytes, write_shards
from vidaccel.errors import UserError
from vidaccel.models.loading import LoadedPipeline
from vidaccel.models.text_cuts import TextCuts
from vidaccel.numbers import si
from vidaccel.processes import by_first, gathered, world
from vidaccel.progress import Progress

CUTS_SHOWN = 3
"""Captions that are cut, of those that are named."""


@dataclass(frozen=True)
class Job:
    """What a feature folder will hold."""

    loaded: LoadedPipeline
    config: CollectConfig
    count: int
    """Samples."""
    compute: Callable[[list[int]], list[Sample]]
    """Consecutive indices, at most the config's batch size, to their samples."""
    made_with: dict[str, str]
    """SHA-256 of each weight file that had a part in it."""
    settings: dict[str, Any]
    """What else the samples depend on, as JSON can hold it."""
    sizes: Sequence[Size] | None = None
    """Of the videos, where there are several."""


@dataclass(frozen=True)
class Plan:
    """How large a feature folder will be, told by its first sample, or the first of each size."""

    count: int
    sample_bytes: int
    """Of one; of several sizes on average."""

    def __str__(self) -> str:
        total = si(self.count * self.sample_bytes, "B")
        return f"{self.count} samples of {si(self.sample_bytes, 'B')}, {total} in all"


def plan(job: Job) -> Plan:
    """Computes one sample, or one of each size.

    Raises:
        UserError: the folder would be larger than the config's `max_gigabytes`.
    """
    counts = Counter(job.sizes or [None] * job.count)
    each = 0
    with Progress("measuring one sample", total=len(counts)) as bar:
        for size, count in counts.items():
            first = 0 if job.sizes is None or size is None else job.sizes.index(size)
            each += count * sample_bytes(job.compute([first])[0])
            bar.advance()
    planned = Plan(job.count, each // job.count)
    limit = job.config.max_gigabytes
    if limit is not None and planned.count * planned.sample_bytes > limit * 1e9:
        raise UserError(
            f"{planned} are more than max_gigabytes={limit:g}", "collect fewer or smaller samples, or raise the limit"
        )
    return planned


def collect(job: Job, folder: Path) -> bool:
    """Write the folder, going on where an earlier, killed run was; one that is finished and whole stays as it is.
    Returns whether it was that already.

    The first captions that are longer than the model takes are named in warnings, and all are counted.

    Raises:
        UserError: the folder was begun with another model, other clips or other settings, or cannot be written.
    """
    started, loaded, config = datetime.now(UTC), job.loaded, job.config
    cuts = TextCuts(most=CUTS_SHOWN)

    def compute(indices: list[int]) -> list[Sample]:
        with cuts.noticed(loaded.pipe):
            return job.compute(indices)

    hub = {} if loaded.hashes else {"model": loaded.source}  # nothing else tells two models without files apart
    write_shards(
        folder,
        compute,
        count=job.count,
        kind=config.kind,
        settings=job.made_with | hub | job.settings,
        per_shard=config.per_shard,
        batch_size=config.batch_size,
        title=f"collecting {config.kind}",
        sizes=job.sizes,
    )
    cuts.counts = sum(gathered(range(world()), lambda _: cuts.counts), Counter())
    cuts.summarise()
    return by_first(lambda: _described(job, folder, started))


def _described(job: Job, folder: Path, started: datetime) -> bool:
    """Whether the folder has its run.json; else it gets one."""
    loaded, config = job.loaded, job.config
    if is_finished(folder, FORMAT):
        return True  # trainings know the folder by its run.json, whose times would be others
    model_run = Path(loaded.source) / RUN_FILE
    write_run(
        folder,
        format=FORMAT,
        command="vidaccel collect-features",
        config=configuration.to_dict(config),
        seed=config.seed,
        started=started,
        parents={"model": sha256_file(model_run)} if model_run.is_file() else {},
        kind=config.kind,
        made_with=job.made_with,
    )
    return False
