"""The kinds of feature folder (formats.md): which samples each consists of."""

from typing import Any

from vidaccel.collect.encode import encode_samples, text_settings
from vidaccel.collect.features import SAID
from vidaccel.collect.job import Job
from vidaccel.collect.source import ClipSource, open_source, sizes_of
from vidaccel.collect.trajectories import trajectory_job
from vidaccel.config.collect import CollectConfig
from vidaccel.data.shards import Sample
from vidaccel.models.grid import refuse_untrained
from vidaccel.models.loading import LoadedPipeline
from vidaccel.models.weight_hashes import encoder_hashes


def job_of(loaded: LoadedPipeline, config: CollectConfig) -> Job:
    """What `config` asks for.

    Raises:
        UserError: what `open_source` raises, sampling settings that the model cannot follow, or a model that nothing
            can be collected for.
    """
    refuse_untrained(loaded.family, "a folder of features")
    kinds = {"encoded": encoding_job, "trajectory": trajectory_job}
    return kinds[config.kind](loaded, open_source(loaded, config), config)


def encoding_job(loaded: LoadedPipeline, source: ClipSource, config: CollectConfig) -> Job:
    """These clips, encoded."""
    if config.tiling:
        loaded.pipe.vae.enable_tiling()

    sizes = sizes_of(source)

    def compute(indices: list[int]) -> list[Sample]:
        together: dict[Any, list[int]] = {}  # what is encoded at once is of one size
        for i in indices:
            together.setdefault(sizes and sizes[i], []).append(i)
        made: dict[int, Sample] = {}
        for some in together.values():
            videos, records = zip(*(source[i] for i in some), strict=True)
            made |= zip(some, encode_samples(loaded, videos, records, config.store), strict=True)
        return [made[i] for i in indices]

    settings = {"store": config.store, "dtype": str(loaded.pipe.vae.dtype), "tiling": config.tiling}
    # What is passed on to trainings: said otherwise, it is another folder.
    said = {name: getattr(config, name) for name in SAID if getattr(config, name) is not None}
    settings |= said | {"text": text_settings(loaded)} | source.fingerprint
    return Job(loaded, config, len(source), compute, encoder_hashes(loaded), settings, sizes)
