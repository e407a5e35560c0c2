"""`benchmark --plan memory=24GB`: which ways to hold the transformer fit a card, for which rows, and in what time.

Each way is a setting of `generate`. What is held is what the plan of a row holds, with other weights. Seconds are FLOPs
at the stated rate, whichever way; what is moved while blocks are offloaded comes on top.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from rich.table import Table
from torch import nn

from vidaccel.bench.measures.flops import parameters
from vidaccel.bench.own_model import planned
from vidaccel.bench.plan_training import HALF
from vidaccel.bench.planned_model import stored_beside
from vidaccel.bench.reports.tables import empty_table, title
from vidaccel.bench.sizes import meta_transformer, planned_family
from vidaccel.config.benchmark import BenchmarkConfig
from vidaccel.config.plan import PlanConfig
from vidaccel.families.base import DiTFamily
from vidaccel.models.files import config_folder
from vidaccel.models.loading import DTYPES
from vidaccel.numbers import rounded, si
from vidaccel.runtime.quantized import quantizable


@dataclass(frozen=True)
class Way:
    """A way to hold the transformer."""

    name: str
    how: str
    """What to set."""
    weights: float
    """Bytes on the card."""
    moved: float = 0.0
    """Bytes that go to the card in each full pass."""


def ways(config: BenchmarkConfig, plan: PlanConfig) -> list[Way]:
    """Those that the card has, largest first, of all transformers that the model denoises with."""
    model, family = meta_transformer(config), planned_family(config)
    whole, itemsize, count = parameters(model), DTYPES[config.dtype].itemsize, len(family.denoisers)
    found = [Way(config.dtype, f"dtype={config.dtype}", count * itemsize * whole)]
    if itemsize == HALF and plan.card.fp8:
        found.append(Way("fp8", "quantize=fp8", count * (itemsize * whole - _saved(model, family))))
    lists: list[Any] = [model.get_submodule(kind.name) for kind in family.all_lists]
    blocks = [parameters(block) for each in lists for block in each]
    held = max(blocks) + count * (whole - sum(blocks))  # one block at a time, and all that is in none
    return [*found, Way("offloaded", "offload=group", itemsize * held, moved=itemsize * sum(blocks))]


def _saved(model: nn.Module, family: DiTFamily) -> int:
    """Bytes: weights of layers that take one in place of two, less a scale of four bytes for each of their rows."""
    lists = [model.get_submodule(block_list.name) for block_list in family.all_lists]
    layers: list[Any] = [blocks.get_submodule(name) for blocks in lists for name in quantizable(blocks, "fp8")]
    return sum(layer.weight.numel() - torch.float32.itemsize * len(layer.weight) for layer in layers)


def held(run: Mapping[str, Any], way: Way, stored: Way) -> float:
    """Bytes that a planned row holds on the card this way, where its plan is that of `stored`, the first of `ways`."""
    return run["plan"]["peak_memory_bytes"] - stored.weights + way.weights


def beside(config: BenchmarkConfig) -> dict[str, int]:
    """Bytes of what a pipeline holds beside the transformer, by what it is."""
    if config.model is not None:
        return stored_beside(config_folder(config.model))
    return {name: HALF * count for name, count in config.beside.items()}


def card_tables(results: Mapping[str, Any], config: BenchmarkConfig, plan: PlanConfig) -> Iterator[str | Table]:
    """Lines and tables, in order, of the rows that `plan` gives on one card."""
    config = planned(config)
    known, card = ways(config, plan), plan.card
    rate = plan.mfu * (card.float32 if config.dtype == "float32" else card.bfloat16)
    yield f"on {si(plan.room, 'B')}, at {si(rate, 'FLOP/s')}: {plan.mfu:.1%} of the peak of {card.title} (mfu=, gpu=)"
    planned_rows = [run for run in results["runs"] if run["passes"]]
    for _, runs in groupby(planned_rows, key=lambda run: run["size"]):
        rows = list(runs)
        yield title(rows[0])
        yield _table(rows, known, rate, plan)
    yield from (_way(way) for way in known)
    parts = ", ".join(f"{name} {si(size, 'B')}" for name, size in beside(config).items())
    yield f"the transformer alone; beside it {parts or 'text encoder and autoencoder'}, which"
    yield "offload=model takes off the card while the transformer runs; decode=tiled bounds what decoding holds"


def _way(way: Way) -> str:
    moved = f"; each full pass moves {si(way.moved, 'B')} to the card, on top of the seconds" if way.moved else ""
    return f"{way.name}: {way.how}{moved}"


def _table(runs: Sequence[Mapping[str, Any]], known: Sequence[Way], rate: float, plan: PlanConfig) -> Table:
    table = empty_table()
    table.add_column("method", overflow="fold")
    for heading in ("seconds", *(["money"] if plan.price is not None else []), *(way.name for way in known)):
        table.add_column(heading, justify="right", no_wrap=True)
    for run in runs:
        seconds = run["flops"] / rate
        cells = [rounded(seconds)]
        if plan.price is not None:
            cells.append(rounded(seconds / 3600 * plan.price))
        for way in known:
            size = held(run, way, known[0])
            cells.append(si(size, "B") if size <= plan.room else "too large")
        table.add_row(run["method"], *cells)
    return table
