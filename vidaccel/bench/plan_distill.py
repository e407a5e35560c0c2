"""`distill --plan`: what distilling a model costs."""

import pkgutil
from typing import Any

import torch

from vidaccel.bench.measures.flops import PassFlops
from vidaccel.bench.measures.training import Gradients, adapters, kept_bytes, tangent_flops
from vidaccel.bench.plan_training import (
    FLOAT32,
    GATHERED_BLOCKS,
    HALF,
    Costs,
    Held,
    TrainingPlan,
    Work,
    asked_size,
    checkpoint_bytes,
    features_disk,
    folder_size,
    optimised,
    steps_of,
    work,
)
from vidaccel.bench.planned_model import planned_model
from vidaccel.config.distill import DistillConfig
from vidaccel.config.plan import PlanConfig
from vidaccel.models.conditioning import Conditioning, ConditioningConfig, embedding_width
from vidaccel.models.grid import require_trainable
from vidaccel.train.clips import GATE_SHARE, LARGE, gate_samples
from vidaccel.train.distill import EVALUATION_PASSES, SHEET_PROMPTS
from vidaccel.train.methods import method_of
from vidaccel.train.methods.base import Method, OtherTraining
from vidaccel.train.passes import Passes


def plan_distillation(
    config: DistillConfig, plan: PlanConfig, conf: str | None = None, named: bool = False
) -> TrainingPlan:
    """What `vidaccel distill` costs.

    Args:
        conf: name of the configuration that the settings are from.
        named: whether the user named the teacher, and not that configuration.

    Raises:
        UserError: nothing says how large the teacher is, it makes no such videos, or its family is not distilled.
    """
    method = method_of(config.method)
    if isinstance(method, OtherTraining):
        return pkgutil.resolve_name(method.plan)(config, plan, conf, named)
    model = planned_model(config.teacher, plan, conf, named, asked_size(config))
    require_trainable(model.family, "distillation")
    costs, train = Costs(model), config.train
    settings = config.own_settings
    target_passes: Passes = method.passes(settings if settings is None else method.resolved(settings))
    halves, low_rank = train.precision == "bfloat16", None
    if train.lora_rank:
        low_rank = adapters(costs.transformer, costs.family, costs.rows, train.lora_rank)
    adapted = low_rank.parameters if low_rank else 0
    embeddings = _embeddings(costs, method, model.embeds)
    added = embeddings + adapted
    trained = added + (0 if low_rank else costs.weights)

    own = Gradients(weights=low_rank is None, recomputed=train.checkpointing).flops(costs.full)
    own += low_rank.flops * (3 + train.checkpointing) if low_rank else 0
    target = _without_gradients(target_passes, costs.full, halves)
    sample = work("", own, halves) + target
    steps, notes = steps_of(train, plan, sample)
    samples = steps * train.batch_size * train.accumulate
    parts = [sample.times(samples, f"training: {steps:,} steps, {samples:,} samples")]
    parts += _evaluations(config, costs.full, target_passes, steps, halves)
    parts += _gates(config, costs, method, halves, notes)

    blocks = costs.with_gradients(train.precision, weights=low_rank is None)
    activations = max(kept_bytes(blocks, train.checkpointing), costs.quiet(train.precision))
    shared: dict[str, float] = {"teacher": FLOAT32 * costs.weights, "student": FLOAT32 * (costs.weights + added)}
    shared |= optimised(trained, train, adapted or costs.matrices())
    each = {"activations": float(train.batch_size * activations)}
    if halves:
        each["bf16 copies"] = HALF * _copied(costs, train.checkpointing)
    gathered = 2 * FLOAT32 * (GATHERED_BLOCKS * costs.block + costs.outside)
    clip = HALF * (costs.latent + costs.texts)
    clips = folder_size(config.features)
    merged = low_rank is None or config.merge_lora
    disk = {
        **features_disk(clips, samples, clip),
        "a checkpoint": checkpoint_bytes(trained, shared),
        "the student": HALF * (costs.weights if merged else adapted) + FLOAT32 * embeddings,
    }
    kind = f"adapters of rank {train.lora_rank}" if low_rank else "whole weights"
    known = {"trained": trained, "frozen": costs.weights * (2 if low_rank else 1)}
    of = f"distill, method={config.method}, {kind}, {train.precision}"
    of += ", checkpointing" if train.checkpointing else ""
    return TrainingPlan(of, model, costs.tokens, known, parts, Held(shared, each, gathered), disk, notes)


def _embeddings(costs: Costs, method: Method, embeds: tuple[str, ...]) -> int:
    """Parameters of the numbers that the student embeds beside its transformer's own."""
    config: Any = costs.transformer.config
    native = {"g"} if costs.family.g_config and config.get(costs.family.g_config) else set()
    names = tuple(sorted({method.embeds, *embeds} - native))
    if not names:
        return 0
    with torch.device("meta"):
        made = Conditioning(
            ConditioningConfig(costs.family.name, embedding_width(costs.transformer, costs.family), names)
        )
    return sum(p.numel() for p in made.parameters())


def _without_gradients(passes: Passes, full: PassFlops, halves: bool) -> Work:
    """Of one sample."""
    float32 = passes.in_float32 * full.total + passes.tangents * tangent_flops(full)
    free = work("", (passes.teacher + passes.student) * full.total, halves)
    return Work("", free.flops, free.float32 + float32)


def _evaluations(config: DistillConfig, full: PassFlops, target: Passes, steps: int, halves: bool) -> list[Work]:
    """What the trainer does with averaged weights."""
    train = config.train
    times = -(-steps // train.evaluate_every) if steps else 0
    samples = times * EVALUATION_PASSES * train.batch_size
    one = _without_gradients(target._replace(student=target.student + 1), full, halves)
    parts = [one.times(samples, f"evaluations: {samples:,} samples")]
    sheets = -(-steps // train.sample_every) if train.sample_every else 0
    videos = sheets * (len(config.prompts) or SHEET_PROMPTS)
    passes = videos * config.sample_steps
    what = f"sample sheets: {videos} videos of {config.sample_steps} steps"
    return [*parts, work(what, passes * full.total, halves)]


def _gates(config: DistillConfig, costs: Costs, method: Method, halves: bool, notes: list[str]) -> list[Work]:
    several = len(costs.family.denoisers) > 1
    unsaid = 0 if several else gate_samples(costs.weights)
    count = unsaid if config.gate_samples is None else config.gate_samples
    if (features := folder_size(config.features)) is not None:
        count = min(count, max(1, round(GATE_SHARE * features)))
    what = "clips"
    if method.gates_runs:
        runs = (0 if costs.weights > LARGE else count) if config.gate_runs is None else min(config.gate_runs, count)
        count, what = runs, "runs"
    if not count:
        return []
    notes.append("gates are computed by one process, not by many")
    passes = _without_gradients(method.gate_passes, costs.full, halves)
    most = "at most " if several else ""  # of a transformer's own times
    return [passes.times(count, f"gates: {count} {what}, {most}{sum(method.gate_passes)} passes each")]


def _copied(costs: Costs, recomputed: bool) -> int:
    """Weights of which there is a copy until a pass ends: all, a block's where activations are computed again."""
    return costs.block if recomputed else costs.weights
