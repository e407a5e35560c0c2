"""Rows as results.json has them (results.schema.json says what each field is)."""

from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import numpy as np

from vidaccel.bench.measures.quality import scorer_of, summary
from vidaccel.bench.rows import SCHEMA, Row, Rows, blank_run
from vidaccel.config.benchmark import BenchmarkConfig
from vidaccel.config.runtime import RuntimeConfig
from vidaccel.numbers import quartiles


def results_of(
    config: BenchmarkConfig, rows: Rows, environment: dict[str, Any], seeds: Sequence[int]
) -> dict[str, Any]:
    """The whole of results.json, from what the rows know by now."""
    runs = [_run(row, _baseline(row, rows, config), config, seeds) for row in rows.rows]
    return {"schema": SCHEMA, "environment": environment, "baseline": config.baseline, "runs": runs}


def _baseline(row: Row, rows: Rows, config: BenchmarkConfig) -> Row:
    return next(other for other in rows.rows if (other.name, other.size) == (config.baseline, row.size))


def _run(row: Row, baseline: Row, config: BenchmarkConfig, seeds: Sequence[int]) -> dict[str, Any]:
    run = blank_run(row, config.family) | {"error": row.error}
    run["settings"]["settings"] = row.settings or run["settings"]["settings"]
    run["settings"]["runtime"] = {key.name: getattr(config, key.name) for key in fields(RuntimeConfig)}
    if row.counts is None:
        return run
    run |= row.counts | {"speedup": _speedup(row, baseline), "prompts": config.timed_prompts}
    if len(row.rounds) > 1:
        run["denoise_seconds"] = quartiles([each["denoise"] for each in row.rounds])
        run["end_to_end_seconds"] = quartiles([each["end_to_end"] for each in row.rounds])
    if row.videos and row.error is None:
        run |= summary(row.videos, scorer_of(config)) | {"prompts": len(row.videos)}
    return run | {"seeds": list(seeds[: run["prompts"]])}


def _speedup(row: Row, baseline: Row) -> dict[str, float | None]:
    """`measured` is the median over rounds of the ratio to the baseline within the round."""
    ideal = baseline.counts["flops"] / row.counts["flops"] if baseline.counts else None
    pairs = list(zip(baseline.rounds, row.rounds, strict=False))
    if len(pairs) < 2:
        return {"measured": None, "ideal": ideal, "measured_over_ideal": None}
    measured = float(np.median([slow["denoise"] / fast["denoise"] for slow, fast in pairs]))
    return {"measured": measured, "ideal": ideal, "measured_over_ideal": measured / ideal if ideal else None}
