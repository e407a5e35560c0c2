"""A plan as tables for people: one a size, and above each what a pass costs."""

from collections.abc import Iterable, Iterator
from itertools import groupby
from typing import Any

from rich import box
from rich.table import Table

PREFIXES = ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def si(value: float) -> str:
    """Three digits and a prefix: 3876543 is "3.88 M"."""
    unit, prefix = next(((unit, prefix) for unit, prefix in PREFIXES if value >= unit), (1, ""))
    return f"{value / unit:.3g} {prefix}".strip()


def plan_tables(results: dict[str, Any]) -> Iterator[str | Table]:
    """Lines and tables, in order, of what `plan` gives."""
    for _, runs in groupby(results["runs"], key=lambda run: run["size"]):
        runs = list(runs)
        yield from _heading(runs)
        yield _table(runs)


def _heading(runs: list[dict[str, Any]]) -> Iterator[str]:
    size, costs = runs[0]["size"], runs[0]["plan"]
    full = costs["full_pass"]
    total = sum(full.values())
    shares = ", ".join(f"{name} {value / total:.2%}" for name, value in full.items())
    yield (
        f"{runs[0]['family']}, {size['num_frames']} frames of {size['width']} x {size['height']}: "
        f"{costs['tokens']['video']:,} video and {costs['tokens']['text']:,} text tokens"
    )
    parameters = min(run["parameters"] for run in runs)
    weights = min(run["plan"]["weight_bytes"] for run in runs)
    yield f"{parameters:,} parameters, {si(weights)}B; activations {si(costs['activation_bytes'])}B"
    yield f"a full pass: {si(total)}FLOPs ({shares})"
    yield from _predictor(runs, parameters, total)


def _predictor(runs: Iterable[dict[str, Any]], parameters: int, full: int) -> Iterator[str]:
    """What the learned predictor adds, if a run has it."""
    for run in runs:
        if run["passes"]["predicted"]:
            added = run["parameters"] - parameters
            cost = sum(run["plan"]["other_pass"].values()) / full
            yield f"a predicted pass: {cost:.2%} of it; the predictor adds {added / parameters:.1%} of parameters"
            return


def _table(runs: Iterable[dict[str, Any]]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("method", no_wrap=True)
    for heading in ("steps", "passes", "FLOPs", "cache", "memory", "ideal"):
        table.add_column(heading, justify="right", no_wrap=True)
    for run in runs:
        count = run["passes"]
        table.add_row(
            run["method"],
            str(run["steps"]),
            f"{count['full']} + {cheap}" if (cheap := count["predicted"] + count["skipped"]) else str(count["full"]),
            si(run["flops"]),
            f"{si(run['cache_bytes'])}B" if run["cache_bytes"] else "-",
            f"{si(run['plan']['peak_memory_bytes'])}B",
            f"{run['speedup']['ideal']:.2f}x",
        )
    return table
