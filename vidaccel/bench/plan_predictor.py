"""`train-predictor --plan`: what training a predictor and searching its schedules costs.

The student is frozen: what is trained are a few blocks, or nothing. Passes of the student are most of it.
"""

from typing import Any

import torch

from vidaccel.bench.measures.training import Gradients, kept_bytes
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
from vidaccel.bench.planned_model import PlannedModel, planned_model
from vidaccel.config.plan import PlanConfig
from vidaccel.config.predictor import PredictorConfig
from vidaccel.config.training import TrainConfig
from vidaccel.forecasters.learned import Predictor
from vidaccel.models.grid import Grid, require_trainable
from vidaccel.train.predictor.discriminator import Discriminator
from vidaccel.train.predictor.search import passes_of_lists, passes_of_search
from vidaccel.train.predictor.served import check_lists, default_lists, leading

STEPS = 20
"""Of a student that is not there yet."""


def plan_predictor(
    config: PredictorConfig, plan: PlanConfig, conf: str | None = None, named: bool = False
) -> TrainingPlan:
    """What `vidaccel train-predictor` costs; arguments and errors as of `plan_distillation`."""
    model = planned_model(config.student, plan, conf, named, asked_size(config))
    require_trainable(model.family, "the training of a predictor")
    costs = Costs(model, config.blocks, config.history)
    steps = config.steps or model.call.get("steps") or STEPS
    notes = [] if config.steps or "steps" in model.call else [f"the student makes {STEPS} steps (steps= says others)"]
    if config.forecaster != "learned":
        return _untrained(config, model, costs, steps, notes)
    stages = [config.mse, *([config.adversarial] if config.pairs != "served" and config.adversarial.is_on else [])]
    if config.stage == "search":
        stages = []
    halves = all(stage.precision == "bfloat16" for stage in (config.mse, config.adversarial))
    denoisers = len(model.family.denoisers)
    predictor = denoisers * Predictor.costs(costs.trunk).parameters
    with torch.device("meta"):
        discriminator = Discriminator(costs.trunk.width, config.discriminator, denoisers)
    judges = sum(p.numel() for p in discriminator.parameters()) * (len(stages) > 1)
    trained = predictor + judges

    parts, samples = _trajectories(config, costs, steps, halves), 0
    for index, stage in enumerate(stages):
        of_stage = stage.precision == "bfloat16"
        one = work("", _sample(config, costs, stage, steps, adversarial=index > 0), of_stage)
        count, said = steps_of(stage, plan, one)
        drawn = count * stage.batch_size * stage.accumulate
        what = "adversarial stage" if index else "served runs" if config.pairs == "served" else "first stage"
        parts.append(one.times(drawn, f"{what}: {count:,} steps, {drawn:,} samples"))
        notes += said
        samples += drawn
    parts.append(_search(config, costs, steps, halves))

    stored = HALF if halves else FLOAT32
    shared: dict[str, float] = {"student": stored * denoisers * costs.weights, "predictor": FLOAT32 * trained}
    shared |= optimised(trained, config.mse, denoisers * _matrices(config, costs))
    each = {"activations": float(_activations(config, costs, steps, stages))}
    gathered = stored * (GATHERED_BLOCKS * costs.block + costs.outside) + FLOAT32 * costs.block
    disk = _disk(config, costs, steps, samples) | {
        "a checkpoint": checkpoint_bytes(trained, shared),
        "the predictor": FLOAT32 * predictor,
    }
    known = {"trained": trained, "frozen": denoisers * costs.weights}
    of = f"train-predictor, pairs={config.pairs}, {config.blocks} blocks, {config.mse.precision}"
    return TrainingPlan(of, model, costs.tokens, known, parts, Held(shared, each, gathered), disk, notes)


def _trained(costs: Costs) -> float:
    """FLOPs of a predicted pass with gradients of the predictor, once through the head's inputs."""
    own = costs.passes["predictor"]
    outside = costs.passes["reuse"].total
    network = own.blocks * 3 + own.attention * (1 + 2.5)
    return outside + network


def _sample(config: PredictorConfig, costs: Costs, stage: TrainConfig, steps: int, adversarial: bool) -> float:
    """FLOPs of one sample of a stage."""
    full, predicted, reused = costs.full.total, costs.passes["predictor"].total, costs.passes["reuse"].total
    frozen = Gradients(weights=False, recomputed=False)
    if config.pairs == "served":
        lists = _lists_of(config, costs.model, steps)
        behind = sum(len(each) - leading(each) for each in lists) / len(lists)
        stood_in = sum(steps - len(each) for each in lists) / len(lists)
        return steps * full + behind * frozen.flops(costs.full) + stood_in * _trained(costs)
    longest = min(config.max_skipped, steps - 1)
    before = (longest + 1) / 2 - 1 if config.pairs == "trajectory" else 0.0
    full_steps = config.history + 1 if config.pairs == "trajectory" else 2
    pair = full_steps * full + before * predicted + reused
    if not adversarial:
        return pair + _trained(costs)
    deepest = config.discriminator.depths[-1]
    with_gradients = Gradients(weights=False, recomputed=stage.checkpointing).flops(costs.full) - full
    of_predictor = pair + _trained(costs) + 2 * full + deepest * with_gradients
    if not config.discriminator.in_turn:
        return of_predictor
    return (of_predictor + pair + predicted + 2 * full) / 2


def _trajectories(config: PredictorConfig, costs: Costs, steps: int, halves: bool) -> list[Work]:
    if config.pairs != "trajectory" or config.stage == "search":
        return []
    count = config.clips
    return [work(f"trajectories: {count:,} of {steps} steps", count * steps * costs.full.total, halves)]


def _disk(config: PredictorConfig, costs: Costs, steps: int, samples: int) -> dict[str, float]:
    clip = HALF * (costs.latent + costs.texts)
    if config.pairs == "trajectory" and config.stage != "search":
        each = HALF * (2 * steps * costs.latent + costs.texts)
        return {f"trajectories, {config.clips:,}": each * config.clips}
    count = folder_size(config.features)
    return features_disk(count, config.clips if config.pairs == "served" else samples, clip)


def _two_pass(config: PredictorConfig, model: PlannedModel, costs: Costs) -> bool:
    """Whether the model's own runs make two passes a step."""
    settings: Any = costs.transformer.config
    embeds_scale = costs.family.g_config and settings.get(costs.family.g_config)
    return model.call.get("two_pass", not (embeds_scale or "g" in model.embeds)) and config.guidance != 1


def _search(config: PredictorConfig, costs: Costs, steps: int, halves: bool, passes: int = 1) -> Work:
    """Stretches, how errors grow, and the cheapest lists run as they serve: of these at most; `passes` a step."""
    prompts = config.search_prompts
    full, predicted = passes_of_search(config, steps, prompts, config.checked_prompts)
    name = "predictor" if config.forecaster == "learned" else config.forecaster
    what = f"search: {prompts} prompts, and lists on {config.checked_prompts} (at most)"
    return work(what, passes * (full * costs.full.total + predicted * costs.passes[name].total), halves)


def _untrained(
    config: PredictorConfig, model: PlannedModel, costs: Costs, steps: int, notes: list[str]
) -> TrainingPlan:
    """A forecaster of which nothing is trained by gradients."""
    halves = config.forecaster == "multistep" and config.mse.precision == "bfloat16"
    if config.forecaster == "multistep":
        parts = [_fitted(config, model, costs, steps, halves)]
    else:
        parts = [_search(config, costs, steps, halves, 1 + _two_pass(config, model, costs))]
    weights = len(model.family.denoisers) * costs.weights
    shared: dict[str, float] = {"the model": (HALF if halves else FLOAT32) * weights}
    precision = "bfloat16" if halves else "float32"
    held = Held(shared, {"activations": float(config.mse.batch_size * costs.quiet(precision))}, 0.0)
    known = {"trained": 0, "frozen": weights}
    of = f"train-predictor, forecaster={config.forecaster}, {precision}"
    return TrainingPlan(of, model, costs.tokens, known, parts, held, {}, [*notes, "one process does it"])


def _fitted(config: PredictorConfig, model: PlannedModel, costs: Costs, steps: int, halves: bool) -> Work:
    """The model's own runs, how errors grow in them, and lists as they are served."""
    two_pass = _two_pass(config, model, costs)
    runs = config.runs + config.checked_prompts
    if config.full_steps is not None:
        passes = runs * (steps + len(config.full_steps))
    else:
        growth = config.search_prompts * (steps - 1) * (steps - 2) / 2
        passes = runs * (steps + passes_of_lists(config, steps, range(1, steps // 2 + 1)).full) + growth
    what = f"{runs} runs of {steps} steps{' in two passes' if two_pass else ''}, and lists (at most)"
    return work(what, (1 + two_pass) * passes * costs.full.total, halves)


def _matrices(config: PredictorConfig, costs: Costs) -> int:
    """Of the predictor's blocks."""
    return config.blocks * costs.matrices() // max(1, len(costs.blocks))


def _activations(config: PredictorConfig, costs: Costs, steps: int, stages: list[TrainConfig]) -> float:
    """Most bytes of a stage: the student's without gradients, or what passes with them keep."""
    most = 0.0
    for index, stage in enumerate(stages):
        last = costs.with_gradients(stage.precision, weights=True)[-1]
        network = config.blocks * last.kept + last.peak
        if config.pairs == "served":
            through = kept_bytes(costs.with_gradients(stage.precision, weights=False), recomputed=False)
            lists = _lists_of(config, costs.model, steps)
            held = max((len(each) - leading(each)) * through + (steps - len(each)) * network for each in lists)
        elif index:
            through = costs.with_gradients(stage.precision, weights=False)
            held = network + kept_bytes(through, stage.checkpointing, config.discriminator.depths[-1])
        else:
            held = network
        most = max(most, stage.batch_size * max(held, costs.quiet(stage.precision)))
    return most or config.mse.batch_size * costs.quiet(config.mse.precision)


def _lists_of(config: PredictorConfig, model: PlannedModel, steps: int) -> list[tuple[int, ...]]:
    """Of served runs; the first step of each transformer is full, on the grid that is said or is published."""
    grid = Grid.listed(config.timesteps, config.sigmas)
    shift = config.shift or model.call.get("shift") or model.family.defaults.shift
    if grid is None and shift is not None:
        grid = Grid.shifted(steps, shift)
    firsts = (0,) if grid is None else grid.firsts([each.until for each in model.family.denoisers[:-1]])
    return default_lists(steps, firsts) if config.lists is None else check_lists(config.lists, steps, firsts)
