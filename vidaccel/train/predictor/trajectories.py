"""Trajectories of the student, collected first where a predictor is to learn from them and none were given."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from vidaccel.artefacts import RUN_FILE, TRAJECTORIES, sha256_file
from vidaccel.collect.encode import IMAGE, LATENT
from vidaccel.collect.features import check_conditions, open_features
from vidaccel.collect.job import collect, plan
from vidaccel.collect.source import open_source
from vidaccel.collect.trajectories import trajectory_job
from vidaccel.config.checks import CLIP_SIZE
from vidaccel.config.collect import CollectConfig
from vidaccel.config.predictor import PredictorConfig
from vidaccel.data.shards import ShardFolder, kinds_in
from vidaccel.models.calling import video_size
from vidaccel.models.loading import LoadedPipeline

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Captions:
    """Those of the first encoded clips: a source of trajectories, which needs of videos the first frame at most."""

    features: ShardFolder
    count: int

    def __len__(self) -> int:
        return min(self.count, len(self.features))

    def __getitem__(self, index: int) -> tuple[Tensor, dict[str, Any]]:
        """A video of the one frame that is stored."""
        tensors, record = self.features[index]
        return tensors[IMAGE][:, None] / 127.5 - 1, record

    def record(self, index: int) -> dict[str, Any]:
        return self.features[index][1]

    @property
    def fingerprint(self) -> Mapping[str, Any]:
        provenance = sha256_file(self.features.folder / RUN_FILE)
        # Where damaged shards are left out there are fewer samples.
        return {"captions": provenance, "samples": len(self.features), "clips": len(self)}


def with_trajectories(config: PredictorConfig, loaded: LoadedPipeline, output: Path) -> PredictorConfig:
    """`config` with trajectories of the student as its features, where it is to learn from them.

    Without any they are collected into `output`/trajectories, on the captions of its encoded features or of its clips,
    and of their size; a collection that was stopped is gone on with.

    Raises:
        UserError: there are no captions, or the features are damaged or another model's.
    """
    if config.pairs != "trajectory" or config.stage == "search":
        return config
    if config.features is not None and kinds_in(config.features) == {"trajectory"}:
        return config
    names = ("data", "clips", *CLIP_SIZE, "seed", "steps", "shift", "timesteps", "sigmas", "guidance", "guidance_2")
    sampled = {name: getattr(config, name) for name in names}
    asked = CollectConfig(kind="trajectory", model=config.student, batch_size=config.mse.batch_size, **sampled)
    if config.features is None:
        source = open_source(loaded, asked)
    else:
        features = open_features(config.features, "encoded", loaded.hashes, config.on_damage)
        check_conditions(features, loaded)
        source = Captions(features, config.clips)
        asked = replace(asked, **video_size(loaded, features[0][0][LATENT].shape))
    job = trajectory_job(loaded, source, asked)
    folder = output / TRAJECTORIES
    log.info("trajectories of the student to learn from: %s, in %s", plan(job), folder)
    collect(job, folder)
    return replace(config, features=str(folder), **dict.fromkeys(CLIP_SIZE))
