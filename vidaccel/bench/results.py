"""Rows as results.json has them (results.schema.json says what each field is)."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np

from vidaccel.artefacts import atomic_path
from vidaccel.bench import counterparts
from vidaccel.bench.measures.pairs import Totals, differences, verdicts
from vidaccel.bench.measures.quality import columns, distribution, scorer_of, summary
from vidaccel.bench.rows import SCHEMA, STAGES, Row, Rows, blank_run, speedups
from vidaccel.config.benchmark import EQUAL_COMPUTE, BenchmarkConfig
from vidaccel.config.runtime import RuntimeConfig
from vidaccel.numbers import quartiles

EXAMPLES, RECONSTRUCTED = "examples", "through the autoencoder"
"""Videos as the prompts ask for, made by the world itself, and the same once through the teacher's autoencoder."""
DIGITS = 5
"""Of a score of one prompt."""
NAMED, BASELINE, EQUAL_TIME, TRAINING_FREE = "named beforehand", "baseline", "equal time", "best training-free"
"""What a row is compared with, beside EQUAL_COMPUTE (as many full passes of the same model, by FLOPs): what `contrasts`
name; the baseline; as many full passes as timed; the best row without a trained network that is at least as cheap."""


def results_of(
    config: BenchmarkConfig,
    rows: Rows,
    environment: dict[str, Any],
    seeds: Sequence[int],
    prompts: Sequence[str] = (),
    compared: bool = False,
    ceilings: Mapping[str, Sequence[Mapping[str, Any]]] | None = None,
) -> dict[str, Any]:
    """The whole of results.json, from what the rows know by now.

    Args:
        prompts: those that are scored.
        compared: whether rows are compared, which takes all of their videos.
        ceilings: what no model can do better than, scored as a row's videos are.
    """
    scorer = scorer_of(config)
    meanings = [scorer.meaning(prompt) if scorer else prompt for prompt in prompts]
    totals = scorer.totals if scorer else None
    owns = {id(row): counterparts.own_row(row, rows.rows) for row in rows.rows}
    runs = {id(row): _run(row, owns[id(row)], rows, config, seeds, meanings, totals) for row in rows.rows}
    for row in rows.rows:
        own = owns[id(row)]
        runs[id(row)]["full_pass_equivalents"] = {
            "flops": counterparts.by_flops(row, own),
            "timed": counterparts.as_timed(runs[id(row)], runs[id(own)] if own else None),
        }
    if compared:
        _compare(config, rows.rows, runs, meanings, totals)
        examples = (ceilings or {}).get(EXAMPLES, ())
        for row in rows.rows:
            if row.videos and row.error is None:
                run = runs[id(row)]
                run["distribution"] = distribution(row.videos, examples, meanings[: len(row.videos)])
    about: dict[str, Any] = {}
    if prompts:
        about = {"prompts": list(prompts), "meanings": meanings, "stream": config.stream, "endpoints": config.endpoints}
    if ceilings:
        about["ceilings"] = {
            name: {key: value for key, value in summary(videos, meanings, totals).items() if "fidelity" not in key}
            | {"distribution": distribution(videos, ceilings[EXAMPLES], meanings)}
            for name, videos in ceilings.items()
        }
    return {
        "schema": SCHEMA,
        "environment": environment,
        "baseline": config.baseline,
        **about,
        "runs": list(runs.values()),
    }


def write_results(path: Path, results: dict[str, Any]) -> None:
    """As indented JSON in which a list or object of mere numbers and strings is one line."""
    with atomic_path(path) as temporary:
        # A name that is no Unicode has half characters, which JSON writes as backslash escapes.
        temporary.write_text(dumped(results) + "\n", encoding="utf-8", errors="backslashreplace")


def dumped(data: Any, indent: str = "") -> str:
    """See `write_results`."""
    values = list(data.values()) if isinstance(data, dict) else data if isinstance(data, list) else []
    if not any(isinstance(value, dict | list) for value in values):
        return json.dumps(data, ensure_ascii=False)
    inner = indent + "  "
    if isinstance(data, dict):
        lines = [f"{json.dumps(key, ensure_ascii=False)}: {dumped(value, inner)}" for key, value in data.items()]
        return "{\n" + ",\n".join(inner + line for line in lines) + f"\n{indent}}}"
    return "[\n" + ",\n".join(inner + dumped(value, inner) for value in data) + f"\n{indent}]"


def _baseline(row: Row, rows: Rows, config: BenchmarkConfig) -> Row:
    return next(other for other in rows.rows if (other.name, other.size) == (config.baseline, row.size))


def _run(
    row: Row,
    own: Row | None,
    rows: Rows,
    config: BenchmarkConfig,
    seeds: Sequence[int],
    meanings: Sequence[str],
    totals: Totals | None,
) -> dict[str, Any]:
    run: dict[str, Any] = blank_run(row, config.family) | {"error": row.error}
    run["settings"]["settings"] = row.settings or run["settings"]["settings"]
    run["settings"]["runtime"] = {key.name: getattr(config, key.name) for key in fields(RuntimeConfig)}
    if row.counts is None:
        return run
    run |= row.counts | {"speedup": _speedup(row, _baseline(row, rows, config)), "prompts": config.timed_prompts}
    if len(row.rounds) > 1:
        for stage in (*STAGES, "end_to_end"):
            seconds = [each.get(stage) for each in row.rounds]
            known = [value for value in seconds if value is not None]
            run[f"{stage}_seconds"] = quartiles(known) if len(known) == len(seconds) else None
    if row.videos and row.error is None:
        run |= summary(row.videos, meanings[: len(row.videos)], totals, own.name if own else None)
        run |= {"prompts": len(row.videos), "per_prompt": _per_prompt(row)}
        run["vbench"] = {name: 100 * value for name, value in row.vbench.items()} or None
    return run | {"seeds": list(seeds[: run["prompts"]])}


def _per_prompt(row: Row) -> dict[str, Any]:
    """Every score of every prompt: columns by what they are of."""
    owns = {name: columns(row.videos, name) for name in _references(row)}
    found = {"scores": {}, "fidelity": {}, "own_fidelity": {}}
    for name, values in columns(row.videos).items():
        group, _, key = name.rpartition(".")
        found.setdefault(group or "scores", {})[key] = _listed(values)
    for reference, own in owns.items():
        found["own_fidelity"][reference] = {
            name.rpartition(".")[2]: _listed(values) for name, values in own.items() if name.startswith("own_fidelity.")
        }
    return found


def _references(row: Row) -> list[str]:
    return list(dict.fromkeys(name for video in row.videos for name in video.get("own", {})))


def _listed(values: np.ndarray) -> list[float | None]:
    return [None if np.isnan(value) else float(f"{value:.{DIGITS}g}") for value in values]


def _compare(
    config: BenchmarkConfig,
    rows: Sequence[Row],
    runs: Mapping[int, dict[str, Any]],
    meanings: Sequence[str],
    totals: Totals | None,
) -> None:
    """Give every run its contrasts. Each question has a correction of its own."""
    scored = [row for row in rows if row.videos and row.error is None]
    found: dict[str, list] = {}
    meant: dict[str, int] = {}
    for row in scored:
        for question, other in _others(row, scored, runs, rows, config):
            own = counterparts.own_row(row, rows)
            ours, theirs = (columns(each.videos, own.name if own else None) for each in (row, other))
            count = min(len(row.videos), len(other.videos))
            ours, theirs = ({name: values[:count] for name, values in side.items()} for side in (ours, theirs))
            found.setdefault(question, []).append((row, other, differences(ours, theirs, meanings[:count], totals)))
            meant[question] = max(meant.get(question, 0), len(set(meanings[:count])))
    for run in runs.values():
        run["contrasts"] = []
    for question, asked in found.items():
        told = verdicts([difference for _, _, difference in asked], config.endpoints, meant[question])
        for (row, other, _), deltas in zip(asked, told, strict=True):
            runs[id(row)]["contrasts"].append({"question": question, "with": other.name, "deltas": deltas})


def _others(
    row: Row, scored: Sequence[Row], runs: Mapping[int, dict[str, Any]], rows: Sequence[Row], config: BenchmarkConfig
) -> Iterator[tuple[str, Row]]:
    """What the row is compared with, and the question which that answers."""
    costs = runs[id(row)]["full_pass_equivalents"]
    equal = {question: counterparts.equal_row(row, costs[key], scored) for question, key in _EQUAL.items()}
    baseline = next((other for other in scored if (other.name, other.size) == (config.baseline, row.size)), None)
    asked = [(BASELINE, baseline), *equal.items(), (TRAINING_FREE, _best_training_free(row, scored, runs, rows))]
    at_hand = {other.name: other for other in scored if other.size == row.size} | {EQUAL_COMPUTE: equal[EQUAL_COMPUTE]}
    named = [(NAMED, at_hand.get(name)) for name in config.contrasts.get(row.name, ())]
    return ((question, other) for question, other in [*named, *asked] if other is not None and other is not row)


_EQUAL = {EQUAL_COMPUTE: "flops", EQUAL_TIME: "timed"}


def _best_training_free(
    row: Row, scored: Sequence[Row], runs: Mapping[int, dict[str, Any]], rows: Sequence[Row]
) -> Row | None:
    """Of the rows of that size which cost no more than a twentieth of a pass beyond a row with a trained network."""
    if not row.method.predicts:
        return None
    run = runs[id(row)]
    passes = run["full_pass_equivalents"]["flops"] or row.method.steps
    limit = run["flops"] * (1 + counterparts.SLACK / passes)
    fitting = [
        other
        for other in scored
        if counterparts.training_free(other.method) and other.size == row.size and runs[id(other)]["flops"] <= limit
    ]
    own = counterparts.own_row(row, rows)
    return max(fitting, key=lambda other: _goodness(other, runs[id(other)], own), default=None)


def _goodness(row: Row, run: Mapping[str, Any], own: Row | None) -> float:
    """Total; where nothing scores, nearness to the full run `own` of what the row is held against or, if that was not
    measured, to the baseline."""
    if run["total"] is not None:
        return run["total"]
    measured = columns(row.videos, own.name if own else None)
    errors = (measured.get(f"{group}.latent_relative_l2") for group in ("own_fidelity", "fidelity"))
    return next((-float(np.nanmean(error)) for error in errors if error is not None), -np.inf)


def _speedup(row: Row, baseline: Row) -> dict[str, float | None]:
    """Measured ones are medians over rounds of the ratio to the baseline within the round."""
    ideal = baseline.counts["flops"] / row.counts["flops"] if baseline.counts else None
    pairs = list(zip(baseline.rounds, row.rounds, strict=False))
    if len(pairs) < 2:
        return speedups(ideal=ideal)
    measured, end_to_end = (
        float(np.median([slow[key] / fast[key] for slow, fast in pairs])) for key in ("denoise", "end_to_end")
    )
    return speedups(measured, ideal, end_to_end)


def completed(results: dict[str, Any]) -> dict[str, Any]:
    """results.json of an earlier version, with what today's has and its figures allow: the speedup end to end, there
    the ratio of medians."""
    seconds = {_place(run): run["end_to_end_seconds"] for run in results["runs"]}

    def run_now(run: dict[str, Any]) -> dict[str, Any]:
        base, own = seconds.get((results["baseline"], *_place(run)[1:])), run["end_to_end_seconds"]
        if "end_to_end" in run["speedup"]:
            return run
        ratio = base["median"] / own["median"] if base and own else None
        return run | {"speedup": run["speedup"] | {"end_to_end": ratio}}

    return results | {"runs": [run_now(run) for run in results["runs"]]}


def _place(run: dict[str, Any]) -> tuple[Any, ...]:
    return run["method"], *run["size"].values()
