"""What a row is held against: the same model's own full run, and few steps of it that cost as much.

A row that predicts or skips passes costs as much as so many full ones (*full-pass equivalents*): full + others x c,
with c the cost of one of the others over a full pass. By FLOPs that is the row's arithmetic over that of a full pass;
as timed, its seconds over a full pass's share of the own full run.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from vidaccel.bench.rows import Row
from vidaccel.config.benchmark import MethodConfig

SLACK = 0.05
"""Of a full pass, by which a row of few steps may cost less and still count as of equal compute."""


def own_run(method: MethodConfig) -> MethodConfig:
    """The same sampling with every pass full."""
    whole = MethodConfig()
    parts = (
        "full_steps",
        "every",
        "budget",
        "full_share",
        "on_skipped",
        "order",
        "cache",
        "settings",
        "sweep",
        "at_most",
        "predictor",
    )
    return replace(method, **{name: getattr(whole, name) for name in parts})


def is_full(method: MethodConfig) -> bool:
    return method.cache is None and method.full_count() == method.steps


def own_runs(methods: Mapping[str, MethodConfig]) -> dict[str, MethodConfig]:
    """The own full runs of all rows with a forecaster that are not among `methods`, by the names that they get."""
    found: dict[str, MethodConfig] = {}
    for method in methods.values():
        whole = own_run(method)
        if _forecast(method) and whole not in [*methods.values(), *found.values()]:
            found[_free_name(whole, methods.keys() | found.keys())] = whole
    return found


def few_step_rows(rows: Sequence[Row], known: Mapping[str, MethodConfig]) -> list[Row]:
    """The rows of equal compute that are missing: for each counted row with a forecaster as many full steps as it costs
    by FLOPs, and one more, because predicted passes often take longer than their FLOPs say.

    Args:
        known: all methods of the configuration, after which a row is named if it is one of them.
    """
    found: list[Row] = []
    for row in rows:
        own = own_row(row, rows)
        cost = by_flops(row, own)
        if own is None or cost is None or not _forecast(row.method):
            continue
        least = fewest_steps(cost, own)
        for steps in range(least, min(least + 2, own.method.steps)):
            method = _in_steps(own.method, steps)
            if not any((other.method, other.size) == (method, row.size) for other in [*rows, *found]):
                names = [name for name, other in known.items() if other == method]
                taken = known.keys() | {other.name for other in [*rows, *found]}
                found.append(Row(names[0] if names else _free_name(method, taken), method, row.size))
    return found


def own_row(row: Row, rows: Iterable[Row]) -> Row | None:
    """The row's own full run, which may be itself; None where it is not in the table."""
    wanted = own_run(row.method), row.size
    return next((other for other in rows if (other.method, other.size) == wanted), None)


def references(rows: Sequence[Row]) -> list[Row]:
    """Rows to whose videos others are compared: own full runs of rows that are not full, those of most steps first."""
    found = {id(own): own for row in rows if not is_full(row.method) and (own := own_row(row, rows)) is not None}
    return sorted(found.values(), key=lambda row: -row.method.steps)


def compared_with(row: Row, reference: Row) -> bool:
    """Whether the row is a sampling of the same model, as the same model is called, in at most as many steps."""
    if row is reference or row.size != reference.size or not is_full(reference.method):
        return False
    steps = row.method.steps
    return steps <= reference.method.steps and own_run(row.method) == _in_steps(reference.method, steps)


def by_flops(row: Row, own: Row | None) -> float | None:
    """Full-pass equivalents of one video."""
    if own is None or row.counts is None or own.counts is None:
        return None
    return row.counts["flops"] / (own.counts["flops"] / own.counts["passes"]["full"])


def as_timed(run: Mapping[str, Any], own: Mapping[str, Any] | None) -> float | None:
    """The same by seconds, from two runs of results.json."""
    if own is None or run["denoise_seconds"] is None or own["denoise_seconds"] is None:
        return None
    return run["denoise_seconds"]["median"] / (own["denoise_seconds"]["median"] / own["passes"]["full"])


def fewest_steps(cost: float, own: Row) -> int:
    """Steps of the same model that cost at least so many full passes, but for SLACK."""
    return max(1, math.ceil((cost - SLACK) / (1 + own.method.two_pass)))


def equal_row(row: Row, cost: float | None, rows: Iterable[Row]) -> Row | None:
    """The row of the same model and no predicted pass that costs `cost` passes, or less than one step more."""
    own = own_row(row, rows := list(rows))
    if own is None or cost is None or is_full(row.method):
        return None
    wanted = _in_steps(own.method, min(fewest_steps(cost, own), own.method.steps)), row.size
    return next((other for other in rows if (other.method, other.size) == wanted), None)


def _in_steps(method: MethodConfig, steps: int) -> MethodConfig:
    """That full run in other steps: where its times are listed, which say how many, on the model's own grid."""
    listed = {} if steps == method.steps else {"timesteps": None, "sigmas": None}
    return replace(method, steps=steps, **listed)


def training_free(method: MethodConfig) -> bool:
    """Whether the row leaves passes out without a trained network."""
    return not is_full(method) and not method.predicts


def _forecast(method: MethodConfig) -> bool:
    return method.cache is None and method.forecasts and not is_full(method)


def _free_name(method: MethodConfig, taken: Iterable[str]) -> str:
    """Model and steps, as rows of the tables that ship are called; with what else differs behind it."""
    model = method.model.rstrip("/").rpartition("/")[2] if method.model else method.weights
    name = f"{model}-{method.steps}" + ("-cfg" if method.two_pass else "")
    for key in ("shift", "guidance", "guidance_2"):
        if (value := getattr(method, key)) is not None:
            name += f"-{key}-{value:g}"
    if method.decoder is not None:
        name += f"-{method.decoder.rstrip('/').rpartition('/')[2]}"
    if method.decode is not None:
        name += f"-{method.decode}"
    taken = set(taken)
    return next(each for each in (name, *(f"{name} ({i})" for i in range(2, 1000))) if each not in taken)
