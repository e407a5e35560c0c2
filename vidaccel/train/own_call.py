"""How a student will be called, settled before it is trained: size, rate, guidance and negative prompt, each said once.

The settings of the training say it, else its features, which repeat what was said when they were collected, else the
teacher's own run.json, else its family.
"""

import logging
from dataclasses import replace

from vidaccel.collect.bank import Bank
from vidaccel.collect.features import called_like
from vidaccel.collect.source import EncodedSource, sizes_of
from vidaccel.config.checks import CLIP_SIZE
from vidaccel.config.distill import DistillConfig
from vidaccel.data.shards import ShardFolder
from vidaccel.models.grid import fixed_shift, shift_of
from vidaccel.models.loading import LoadedPipeline
from vidaccel.train.methods.base import Data

log = logging.getLogger(__name__)
HIGHEST = 8.0
"""Scale up to which students learn at least; models are called with 5 to 7."""


def called_as_told(teacher: LoadedPipeline, config: DistillConfig, data: Data) -> LoadedPipeline:
    """The teacher, called as its student is to be."""
    teacher = _called_like(data, teacher)
    own = {name: getattr(config, name) for name in (*CLIP_SIZE, "negative_prompt")}
    return replace(teacher, call=teacher.call | {name: value for name, value in own.items() if value is not None})


def say_sources(told: LoadedPipeline, config: DistillConfig, data: Data, teacher: LoadedPipeline) -> None:
    """Say of each thing that a student's call has who said it: `told` is `called_as_told` of the others."""
    features = {} if isinstance(data, Bank) else _called_like(data, teacher).call
    of: dict[str, list[str]] = {}
    for name in (*CLIP_SIZE, "guidance", "negative_prompt"):
        own = getattr(config, name)
        if name not in told.call and not hasattr(told.family.defaults, name):
            continue
        known = told.call[name] if name in told.call else getattr(told.family.defaults, name)
        value = known if own is None else own
        if own is not None:
            source = "the settings"
        elif name in features and features.get(name) != teacher.call.get(name):
            source = "the features" if isinstance(data, ShardFolder) else "the clips"
        else:
            source = "the model" if name in told.call else f"{told.family.title}'s defaults"
        of.setdefault(source, []).append(f"{name}={value}")
    log.info("the student is made for %s", "; ".join(f"{' '.join(said)} (of {who})" for who, said in of.items()))
    scheduler = teacher.pipe.scheduler
    if config.shift is None and shift_of(scheduler, teacher.family) is None:
        shift = fixed_shift(scheduler, teacher.family)
        log.info(
            "and for steps of shift=%g (of %s; the teacher's own follow the video's size)", shift, told.family.title
        )


def _called_like(data: Data, teacher: LoadedPipeline) -> LoadedPipeline:
    """With what features say of its call, and clips of several sizes of the videos' size: that which most have."""
    if isinstance(data, ShardFolder):
        return called_like(data, teacher)
    if isinstance(data, EncodedSource) and data.buckets is not None:
        sizes = sizes_of(data.source) or ()
        size = dict(zip(CLIP_SIZE, sizes[data.buckets.commonest[0]], strict=False))
        return replace(teacher, call=teacher.call | size)
    return teacher


def own_scale(config: DistillConfig, teacher: LoadedPipeline) -> float:
    """Scale that the student is called with unless told."""
    return teacher.default("guidance") if config.guidance is None else config.guidance


def with_scales(config: DistillConfig, teacher: LoadedPipeline) -> DistillConfig:
    """`config` with the range of scales that is trained on, where it leaves that open."""
    learnt = teacher.conditioning.config.guidance_range if teacher.conditioning else None
    chosen = config.guidance_range or learnt or (1.0, max(HIGHEST, own_scale(config, teacher)))
    return replace(config, guidance_range=list(chosen))


def warn_of_scale(config: DistillConfig, teacher: LoadedPipeline) -> None:
    """Say so where the student does not learn the scale that it is called with."""
    scale = own_scale(config, teacher)
    low, high = config.guidance_range or (scale, scale)
    if not low <= scale <= high:
        log.warning(
            "the student is called with guidance %g and learns scales from %g to %g: set guidance=, or guidance_range=",
            scale,
            low,
            high,
        )
