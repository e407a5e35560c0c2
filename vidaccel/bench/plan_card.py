"""`benchmark --plan memory=24GB`: which settings of `generate` make a model fit a card, for which rows, in what time.

Each way to hold the model is one or more of those settings, which go together. What is held is what the plan of a row
holds, with the weights that this way has on the card at once: while the transformer runs, or when what stands beside it
does, whichever is more. Seconds are FLOPs at the stated rate, whichever way; what is moved while blocks are offloaded
comes on top. Decoding is left out: it takes tiles where it has no room for the whole (`decode=auto`). What a card has
beyond its name (24 GB are sold as 24 GiB) is left to the driver and the allocator.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from rich.table import Table
from torch import nn

from vidaccel.bench.measures.flops import parameters
from vidaccel.bench.measures.memory import activation_bytes
from vidaccel.bench.own_model import planned
from vidaccel.bench.plan_training import HALF
from vidaccel.bench.planned_model import stored_beside
from vidaccel.bench.reports.tables import empty_table, title
from vidaccel.bench.sizes import meta_transformer, planned_family, rows
from vidaccel.config.benchmark import BenchmarkConfig
from vidaccel.config.plan import PlanConfig
from vidaccel.families.base import DiTFamily
from vidaccel.models.files import config_folder
from vidaccel.models.loading import DTYPES
from vidaccel.numbers import rounded, si
from vidaccel.runtime.quantized import quantizable


@dataclass(frozen=True)
class Way:
    """A way to hold the model."""

    name: str
    how: str
    """What to set."""
    weights: float
    """Bytes of weights on the card while a transformer runs, a predictor's apart."""
    others: float = 0.0
    """The most that are there when none does."""
    moved: float = 0.0
    """Bytes that go to the card in each full pass."""


def ways(config: BenchmarkConfig, plan: PlanConfig, model: nn.Module) -> list[Way]:
    """Those that the card has, largest first, for the configured transformer."""
    family, parts = planned_family(config), beside(config)
    itemsize, count = DTYPES[config.dtype].itemsize, len(family.denoisers)
    one, besides = itemsize * parameters(model), sum(parts.values())
    lists: list[Any] = [model.get_submodule(kind.name) for kind in family.all_lists]
    blocks = [itemsize * parameters(block) for each in lists for block in each]
    largest = max(parts.values(), default=0)
    whole = Way("whole", f"dtype={config.dtype}", count * one + besides)
    apart = Way("model", "offload=model", one, others=largest)
    outside = count * (one - sum(blocks)) + parts.get("autoencoder", 0)
    group = Way("group", "offload=group", outside + max(blocks), moved=sum(blocks))
    if itemsize != HALF:
        return [whole, apart, group]
    kind = "fp8" if plan.card.fp8 else "int8"
    saved = _saved(model, family, kind)
    if kind == "int8":  # which is fast when compiled, and offload is not
        return [whole, Way(kind, "quantize=int8 compile=true", count * (one - saved) + besides), apart, group]
    quantised = Way(kind, "quantize=fp8", count * (one - saved) + besides)
    return [whole, quantised, apart, Way("model+fp8", "offload=model quantize=fp8", one - saved, others=largest), group]


def _saved(model: nn.Module, family: DiTFamily, kind: str) -> int:
    """Bytes: weights of layers that take one in place of two, less a scale of four bytes for each of their rows."""
    lists = [model.get_submodule(block_list.name) for block_list in family.all_lists]
    layers: list[Any] = [blocks.get_submodule(name) for blocks in lists for name in quantizable(blocks, kind)]
    return sum(layer.weight.numel() - torch.float32.itemsize * len(layer.weight) for layer in layers)


def held(run: Mapping[str, Any], way: Way, transformers: int, activations: int) -> float:
    """Bytes that a planned row holds on the card this way, where its plan counts those of `transformers` and a pass
    holds `activations`."""
    costs = run["plan"]
    apart = costs["peak_memory_bytes"] - costs["activation_bytes"] - transformers  # cache and predictor
    return max(way.weights + apart + activations, way.others)


def beside(config: BenchmarkConfig) -> dict[str, int]:
    """Bytes of what a pipeline holds beside the transformer, by what it is."""
    if config.model is not None:
        return stored_beside(config_folder(config.model))
    return {name: HALF * count for name, count in config.beside.items()}


def card_tables(results: Mapping[str, Any], config: BenchmarkConfig, plan: PlanConfig) -> Iterator[str | Table]:
    """Lines and tables, in order, of the rows that `plan` gives on one card."""
    config = planned(config)
    model, family = meta_transformer(config), planned_family(config)
    known, card, parts = ways(config, plan, model), plan.card, beside(config)
    transformers = len(family.denoisers) * DTYPES[config.dtype].itemsize * parameters(model)
    rate = plan.mfu * (card.float32 if config.dtype == "float32" else card.bfloat16)
    yield f"on {si(plan.room, 'B')}, at {si(rate, 'FLOP/s')}: {plan.mfu:.1%} of the peak of {card.title} (mfu=, gpu=)"
    planned_rows = [run for run in results["runs"] if run["passes"]]
    for size, runs in groupby(planned_rows, key=lambda run: run["size"]):
        of_size = list(runs)
        activations = of_size[0]["plan"]["activation_bytes"]
        if family.needs_mask:
            streams = rows(config, model, tuple(size.values()))
            activations = activation_bytes(model, family, streams, trim_text=True)
        yield title(of_size[0])
        yield from _of_size(of_size, known, rate, plan, transformers, activations)
    yield from (f"{way.name}: {way.how}{' trim_text=true' * family.needs_mask}" for way in known)
    if family.needs_mask:
        yield "trim_text=true does without masks, which take more than all else that the stock model's passes hold"
    moved = known[-1].moved
    less = f", {si(moved - _saved(model, family, 'fp8'), 'B')} with quantize=fp8" if known[1].name == "fp8" else ""
    yield f"each full pass of group moves {si(moved, 'B')} to the card{less}, on top of the seconds; a predicted none"
    total = si(transformers + sum(parts.values()), "B")
    yield f"what offload takes off the card lies in the computer's own memory, {total} in all"
    if parts:
        yield "beside the transformer: " + ", ".join(f"{name} {si(size, 'B')}" for name, size in parts.items())
    else:
        yield "text encoder and autoencoder come on top, whose size nothing here says"


def _of_size(
    runs: Sequence[Mapping[str, Any]],
    known: Sequence[Way],
    rate: float,
    plan: PlanConfig,
    transformers: int,
    activations: int,
) -> Iterator[str | Table]:
    """A table of the rows and ways that fit, and lines of those that do not."""
    sizes = {run["method"]: [held(run, way, transformers, activations) for way in known] for run in runs}
    fitting = [i for i in range(len(known)) if any(each[i] <= plan.room for each in sizes.values())]
    table = empty_table()
    table.add_column("method", overflow="fold")
    for heading in ("seconds", *(["money"] if plan.price is not None else []), *(known[i].name for i in fitting)):
        table.add_column(heading, justify="right", no_wrap=True)
    lacking = []
    for run in runs:
        each = sizes[run["method"]]
        if min(each) > plan.room:
            lacking.append(f"{run['method']} ({si(min(each), 'B')})")
            continue
        seconds = run["flops"] / rate
        cells = [rounded(seconds)]
        if plan.price is not None:
            cells.append(rounded(seconds / 3600 * plan.price))
        cells += [si(each[i], "B") if each[i] <= plan.room else "-" for i in fitting]
        table.add_row(run["method"], *cells)
    if fitting:
        yield table
    least = [f"{way.name} ({si(min(each[i] for each in sizes.values()), 'B')})" for i, way in enumerate(known)]
    if never := [least[i] for i in range(len(known)) if i not in fitting]:
        yield f"no row fits by {', '.join(never)}"
    if lacking:
        yield f"fit by none, at the least: {', '.join(lacking)}"
