"""`benchmark --plan`: what every method costs on a model and video size, without weights and without running it.

Speedups are ideal: the baseline's FLOPs over the method's. The result has the form of results.json, with null for
all that only a run can tell, and `plan` for what a plan adds. Text encoders and autoencoder are left out, and so is the
student's embedding of r (0.1 % of the parameters, one row a pass).
"""

from dataclasses import asdict, dataclass, replace
from typing import Any

from torch import nn

from vidaccel.artefacts import own_files
from vidaccel.bench.environment import environment
from vidaccel.bench.generation import Size
from vidaccel.bench.measures.flops import PassFlops, parameters, pass_flops, planned_trunk
from vidaccel.bench.measures.memory import CacheBytes, activation_bytes, cache_bytes
from vidaccel.bench.own_model import planned, planned_rows
from vidaccel.bench.rows import NOT_RUN, SCHEMA, Row, blank_run, speedups
from vidaccel.bench.sizes import meta_transformer, planned_family, rows
from vidaccel.config.benchmark import BenchmarkConfig, MethodConfig
from vidaccel.errors import UserError
from vidaccel.families.base import DiTFamily
from vidaccel.forecasters.base import ForecasterCosts, PlannedTrunk
from vidaccel.forecasters.registry import forecaster_class
from vidaccel.models.files import local_path
from vidaccel.models.folder import STUDENT_PARTS
from vidaccel.models.loading import DTYPES

UNPLANNED = "what this cache leaves out is known when it runs: vidaccel benchmark --speedup"
"""Why a row has no plan."""


@dataclass(frozen=True)
class Passes:
    """How many forward passes of the transformer one video takes."""

    full: int
    predicted: int
    """With the learned predictor in the trunk's place."""
    skipped: int
    """With a cache in the place of the trunk or parts of it."""


@dataclass(frozen=True)
class SizeCosts:
    """What one pass costs on a video of one size."""

    size: Size
    video_tokens: int
    text_tokens: int
    flops: dict[str, PassFlops]
    """Of a pass, by kind: `full`, or one of `MethodConfig.on_skipped`."""
    cache: dict[str, CacheBytes]
    """By `MethodConfig.on_skipped`."""
    activations: int
    """Bytes."""
    trunk: PlannedTrunk
    """What a forecaster's own costs follow from."""


def plan(config: BenchmarkConfig) -> dict[str, Any]:
    """Every wanted method on every size, as results.json.

    Raises:
        UserError: settings that the family cannot follow, or methods that are not there.
    """
    config = planned(config)
    methods, lacking = planned_rows(config)
    family, model = planned_family(config), meta_transformer(config)
    if why := lacking.get(config.baseline) or (None if methods[config.baseline].planned else UNPLANNED):
        raise UserError(f"the baseline {config.baseline} cannot be planned: {why}", "take another baseline")
    others = beside(config.model, family) or {name: 2 * count for name, count in config.beside.items()}
    weights, runs = len(family.denoisers) * parameters(model), []
    for size in config.videos:
        costs = size_costs(config, family, model, size)
        baseline = method_flops(methods[config.baseline], costs)
        for name, method in methods.items():
            run = blank_run(Row(name, method, costs.size), config.family)
            if name in lacking:
                runs.append(run | {"error": f"{NOT_RUN}{lacking[name]}"})
            elif not method.planned:
                runs.append(run | {"error": UNPLANNED})
            else:
                runs.append(run | _planned(method, costs, config.dtype, weights, baseline, others))
    return {"schema": SCHEMA, "environment": environment("meta"), "baseline": config.baseline, "runs": runs}


def size_costs(config: BenchmarkConfig, family: DiTFamily, model: nn.Module, size: Size) -> SizeCosts:
    """What one pass costs; `UserError` for a size the model cannot make."""
    streams = rows(config, model, size)
    return SizeCosts(
        size,
        streams["video"],
        streams["text"],
        pass_flops(model, family, streams, config.predictor_blocks),
        cache_bytes(model, family, streams, DTYPES[config.dtype]),
        activation_bytes(model, family, streams),
        planned_trunk(model, family, streams, blocks=config.predictor_blocks, history=config.predictor_history),
    )


def stand_in(method: MethodConfig, costs: SizeCosts) -> ForecasterCosts | None:
    """What the row's forecaster costs; None where parts of the trunk are left out by a cache."""
    if not method.forecasts:
        return None
    return forecaster_class(method.on_skipped).costs(replace(costs.trunk, order=method.order))


def passes(method: MethodConfig) -> Passes:
    """Passes of one video, of a method that can be planned."""
    each, full = 1 + method.two_pass, method.full_count()
    others = {"predicted" if method.on_skipped == "predictor" else "skipped": each * (method.steps - full)}
    return Passes(**{"full": each * full, "predicted": 0, "skipped": 0} | others)


def method_flops(method: MethodConfig, costs: SizeCosts) -> int:
    """FLOPs of denoising one video."""
    count, full, other = passes(method), costs.flops["full"], costs.flops[method.on_skipped]
    return count.full * full.total + (count.predicted + count.skipped) * other.total


def beside(model: str | None, family: DiTFamily) -> dict[str, int]:
    """Bytes of the weight files of what a pipeline holds beside its transformer, text encoders and autoencoder, by the
    names of their folders; {} where the model is no folder here."""
    own = {denoiser.attribute for denoiser in family.denoisers}
    folders = [] if model is None else own_files(local_path(model), "*/")
    held = {
        folder.name: sum(file.stat().st_size for file in own_files(folder, "*.safetensors"))
        for folder in folders
        if folder.name not in (*own, *STUDENT_PARTS)
    }
    return {name: size for name, size in held.items() if size}


def _planned(
    method: MethodConfig, costs: SizeCosts, dtype: str, weights: int, baseline: int, beside: dict[str, int]
) -> dict[str, Any]:
    """What a plan knows of a run of a model with so many `weights`, stored in `dtype`, and `beside` its transformer."""
    count, flops = passes(method), method_flops(method, costs)
    caches = count.predicted + count.skipped > 0
    # each of two passes a step has a context, and a cache, of its own
    each, newest = costs.cache[method.on_skipped]
    forecaster = stand_in(method, costs)
    looks_back = forecaster.history if forecaster else 1 + method.order
    cache = (each * looks_back + newest) * (1 + method.two_pass) if caches else 0
    in_use = weights + (forecaster.parameters if forecaster and caches else 0)
    weight_bytes = in_use * DTYPES[dtype].itemsize
    return {
        "full_steps": method.schedule(),
        "passes": asdict(count),
        "speedup": speedups(ideal=baseline / flops),
        "flops": flops,
        "cache_bytes": cache,
        "parameters": in_use,
        "plan": {
            "tokens": {"video": costs.video_tokens, "text": costs.text_tokens},
            "full_pass": asdict(costs.flops["full"]),
            "other_pass": asdict(costs.flops[method.on_skipped]) if caches else None,
            "weight_bytes": weight_bytes,
            "activation_bytes": costs.activations,
            "peak_memory_bytes": weight_bytes + costs.activations + cache,
            "beside_bytes": beside,
        },
    }
