"""What a training costs, before anything but settings is read: what plans of both kinds are made of.

FLOPs are those of `benchmark --plan`, pass by pass, with those of gradients (measures/training.py); memory is that of
weights, gradients, moments and averages, which torchrun's processes share (train/parallel.py), and of what each of them
holds for itself. Norms, losses, heads of a discriminator and the optimiser's own arithmetic are left out of the FLOPs.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from vidaccel.artefacts import RUN_FILE, read_json
from vidaccel.bench.measures.flops import parameters, pass_flops, planned_trunk
from vidaccel.bench.measures.memory import activation_bytes
from vidaccel.bench.measures.training import BlockBytes, training_blocks
from vidaccel.bench.planned_model import PlannedModel
from vidaccel.bench.sizes import meta_transformer, new_transformer, rows
from vidaccel.config.checks import SIZE
from vidaccel.config.distill import DistillConfig
from vidaccel.config.plan import PlanConfig
from vidaccel.config.predictor import PredictorConfig
from vidaccel.config.training import TrainConfig
from vidaccel.data.shards import ShardFolder
from vidaccel.families.walk import blocks_of, conditions_of, latent_channels, patch_of

FLOAT32, HALF = 4, 2
GATHERED_BLOCKS = 2
"""Blocks whose weights are whole on a card at once where they are sharded: the one that runs, and the next."""


@dataclass(frozen=True)
class Work:
    """A part of a training."""

    what: str
    flops: float
    """In the training's precision."""
    float32: float = 0.0
    """FLOPs in float32 beside them, where that is not the training's precision."""

    @property
    def total(self) -> float:
        return self.flops + self.float32

    def __add__(self, other: "Work") -> "Work":
        return Work(self.what, self.flops + other.flops, self.float32 + other.float32)

    def times(self, count: float, what: str = "") -> "Work":
        return Work(what, count * self.flops, count * self.float32)


@dataclass(frozen=True)
class Held:
    """Bytes of a training."""

    shared: dict[str, float]
    """What processes share, by what it is."""
    own: dict[str, float]
    """What each process holds."""
    gathered: float
    """What each holds besides where there are several: weights that are gathered for a pass."""

    def on(self, gpus: int) -> float:
        """Of one of so many cards."""
        return sum(self.shared.values()) / gpus + sum(self.own.values()) + (self.gathered if gpus > 1 else 0.0)


@dataclass(frozen=True)
class TrainingPlan:
    """What a training costs."""

    of: str
    model: PlannedModel
    tokens: dict[str, int]
    """Of a video."""
    parameters: dict[str, int]
    """By what they are."""
    work: list[Work]
    memory: Held
    """Without what is beside the transformer (`model.beside`)."""
    disk: dict[str, float]
    """Bytes, by what they are."""
    notes: list[str]
    """What was assumed."""


class Costs:
    """What passes of a model cost, and what a training holds of it."""

    def __init__(self, model: PlannedModel, predictor_blocks: int = 2, history: int = 1):
        self.model, self.family = model, model.family
        self.transformer = meta_transformer(model.config)
        self.rows = rows(model.config, self.transformer, model.size)
        self.passes = pass_flops(self.transformer, self.family, self.rows, predictor_blocks)
        self.full = self.passes["full"]
        settings = {"blocks": predictor_blocks, "history": history}
        self.trunk = planned_trunk(self.transformer, self.family, self.rows, **settings)
        self.weights = parameters(self.transformer)
        self.blocks = [parameters(block) for _, block in blocks_of(self.transformer, self.family)]
        """Parameters of each."""
        self.block, self.outside = max(self.blocks), self.weights - sum(self.blocks)

    def quiet(self, precision: str) -> int:
        """Bytes of activations of one video's pass without gradients."""
        return activation_bytes(self._shallow(precision), self.family, self.rows)

    def with_gradients(self, precision: str, weights: bool) -> list[BlockBytes]:
        """Bytes of one with gradients of weights, or with such that only go through it, by list of blocks."""
        typed = self._shallow(precision).requires_grad_(weights)
        lists: list[Any] = [self.transformer.get_submodule(block_list.name) for block_list in self.family.block_lists]
        found = training_blocks(typed, self.family, self.rows)
        return [replace(block, count=len(blocks)) for block, blocks in zip(found, lists, strict=True)]

    def _shallow(self, precision: str) -> nn.Module:
        """One block of each kind, which is as much as is looked at."""
        return new_transformer(replace(self.model.config, dtype=precision), "meta", depth=1)

    def matrices(self) -> int:
        """Parameters of the blocks that are matrices, which Muon takes."""
        blocks = (block for _, block in blocks_of(self.transformer, self.family))
        return sum(p.numel() for block in blocks for p in block.parameters() if p.ndim == 2)

    @property
    def latent(self) -> int:
        """Numbers in one."""
        return latent_channels(self.transformer) * math.prod(patch_of(self.transformer)) * self.rows["video"]

    @property
    def texts(self) -> int:
        """Numbers in the text tensors of a caption, and in what is made of an image."""
        config: Any = self.transformer.config
        shapes = [tensor.shape for tensor in self.family.text_tensors]
        conditions = conditions_of(self.transformer, self.family)
        shapes += [(each.tokens, each.width_config) for each in conditions if each.tokens and each.width_config]
        found = sum(math.prod(self.rows[n] if n in self.rows else config[n] for n in shape) for shape in shapes)
        own = latent_channels(self.transformer)
        if any(each.argument is None for each in conditions):  # as many channels again as stand behind the latent's
            found += self.latent * (config.in_channels - own) // own
        return found

    @property
    def tokens(self) -> dict[str, int]:
        return {name: self.rows[name] for name in ("video", "text")}


def work(what: str, flops: float, halves: bool) -> Work:
    """In the training's precision, which is bfloat16 or not."""
    return Work(what, flops) if halves else Work(what, 0.0, flops)


def optimised(trained: int, train: TrainConfig, matrices: int) -> dict[str, float]:
    """Bytes of what a trainer holds of so many parameters beside themselves, those that are matrices among them."""
    moments = 2 * trained - (matrices if train.optimizer == "muon" else 0)
    return {"gradients": FLOAT32 * trained, "moments": FLOAT32 * moments, "averages": FLOAT32 * trained}


def checkpoint_bytes(trained: int, held: Mapping[str, float]) -> float:
    """Of one checkpoint of a training that holds so much: weights, averages, moments."""
    return FLOAT32 * trained + held["moments"] + held["averages"]


def steps_of(train: TrainConfig, plan: PlanConfig, sample: Work) -> tuple[int, list[str]]:
    """Those that are set, or that there is time for, and then a note that says so."""
    if train.steps is not None:
        return train.steps, []
    assert train.minutes is not None
    step = plan.seconds(sample.flops, sample.float32) * train.batch_size * train.accumulate
    count = max(1, int(60 * train.minutes / step))
    return count, [f"minutes={train.minutes:g} are some {count:,} steps at this rate"]


def features_disk(clips: int | None, samples: int, clip: int) -> dict[str, float]:
    """Bytes of encoded clips: of as many as there are, or as there would be if none were seen twice."""
    count = samples if clips is None else clips
    return {f"features of {count:,} clips{'' if clips else ', each seen once'}": clip * count}


def asked_size(config: DistillConfig | PredictorConfig) -> dict[str, int | None]:
    """num_frames, height and width of the settings, of several sizes the largest, else what their features were
    collected with, where that is there; None leaves it to the model."""
    run = Path(config.features or "") / RUN_FILE
    collected = read_json(run, "collect them again").get("config", {}) if config.features and run.is_file() else {}
    if sizes := (config.sizes if isinstance(config, DistillConfig) else None) or collected.get("sizes"):
        return dict(zip(SIZE, max(sizes, key=math.prod), strict=True))
    return {name: collected.get(name) if getattr(config, name) is None else getattr(config, name) for name in SIZE}


def folder_size(features: str | None) -> int | None:
    """Samples in a folder of features that is there."""
    folder = Path(features or "")
    return len(ShardFolder(folder)) if features and (folder / RUN_FILE).is_file() else None
