"""The one value of a sweep that a row is reported with, chosen on prompts that nothing is reported on.

A benchmark of its own in the folder `choosing`: every value of every sweep, on choosing prompts of the scorer's world
or on those of the configuration's that are not scored, beside the full runs of the models that they skip passes of.
Kept is the value that costs at most `at_most` full passes whose latents end nearest to those of the full run: it tells
values apart where scores are full.
"""

import logging
from collections.abc import Container, Mapping
from dataclasses import replace
from typing import Any

from vidaccel.bench.counterparts import SLACK, own_run
from vidaccel.config.benchmark import BenchmarkConfig, MethodConfig

log = logging.getLogger(__name__)

FOLDER = "choosing"
SEED = 2**40
"""Beyond the seed of the first scored prompt."""


def chosen_for(config: BenchmarkConfig) -> dict[str, MethodConfig]:
    """Rows of which one value of their sweep is to be chosen."""
    if not config.sweeps or config.stream == "choose":
        return {}
    return {name: row for name, row in config.wanted().items() if row.sweep and row.at_most is not None}


def to_choose(config: BenchmarkConfig, lacking: Container[str] = ()) -> BenchmarkConfig | None:
    """The benchmark that chooses; None where there is nothing to choose, or no prompts to choose on.

    Args:
        lacking: rows that cannot run.
    """
    rows = {name: row for name, row in chosen_for(config).items() if name not in lacking}
    if not rows:
        return None
    prompts, count = [], config.choosing_prompts
    if config.prompts or config.scorer is None:
        # An image belongs to a prompt by its place in the whole list.
        prompts = [] if config.images else config.prompts[config.scored_prompts :][:count]
        count = len(prompts)
        if not prompts:
            why = "each has an image" if config.images else f"of {len(config.prompts)} all are scored"
            log.info("%s: every value is a row, as no prompts are left to choose one on: %s", ", ".join(rows), why)
            return None
    methods = config.methods | rows  # with the decoders that they get, of which there is no other for all here
    owns: dict[str, None] = {}
    for name, row in rows.items():
        own = own_run(row)
        known = next((other for other, method in methods.items() if method == own), f"{name} in full")
        methods[known] = own
        owns[known] = None
    longest = max(owns, key=lambda name: methods[name].steps)
    return replace(
        config,
        methods=methods,
        only=[*owns, *rows],
        baseline=longest,
        stream="choose",
        prompts=prompts,
        decoder=None,
        contrasts={},
        equal_compute=False,
        rounds=2,
        timed_prompts=1,
        timed_seconds=0.0,
        scored_prompts=count,
        scored_seed=SEED + (config.seed if config.scored_seed is None else config.scored_seed),
        keep_videos=False,
        vbench=None,
    )


def with_choices(config: BenchmarkConfig, results: Mapping[str, Any]) -> BenchmarkConfig:
    """The rows with the values that were best in `results`, of which each stands for its sweep."""
    runs, methods = {run["method"]: run for run in results["runs"]}, dict(config.methods)
    for name, row in chosen_for(config).items():
        ways = {name: row} | {name + suffix: way for suffix, way in row.swept().items()}
        costs = {way: cost for way in ways if (cost := _passes(runs.get(way))) is not None}
        limit = (row.at_most or 0) + SLACK
        fitting = [way for way, cost in costs.items() if cost <= limit]
        best = name
        if fitting:
            best = min(fitting, key=lambda way: _error(runs[way]))
        elif costs:
            best = min(costs, key=costs.__getitem__)
            log.info("%s: no value of its sweep costs at most %g full passes", name, row.at_most)
        elif name in runs:
            log.warning("%s: no value was compared with its model's own full run, so it keeps its first", name)
        methods[name] = replace(config.methods[name], settings=ways[best].settings, sweep={}, at_most=None)
    return replace(config, methods=methods)


def _passes(run: Mapping[str, Any] | None) -> float | None:
    """Full passes that the run costs; None where it failed."""
    if run is None or run["error"] is not None or not run["own_fidelity"]:
        return None
    return run["full_pass_equivalents"]["flops"]


def _error(run: Mapping[str, Any]) -> float:
    return run["own_fidelity"]["latent_relative_l2"]
