"""Results as tables for people: one a size. A plan has what a pass costs above it, a run its errors below."""

import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any

from rich import box
from rich.table import Table

from vidaccel.bench.reports.contrasts import tables_of
from vidaccel.bench.results import completed
from vidaccel.bench.rows import NOT_RUN
from vidaccel.numbers import si


def plan_tables(results: dict[str, Any]) -> Iterator[str | Table]:
    """Lines and tables, in order, of what `plan` gives."""
    for _, runs in groupby(results["runs"], key=lambda run: run["size"]):
        runs = list(runs)
        planned = [run for run in runs if run["passes"]]
        yield from _heading(planned)
        yield _table(planned)
        lacking = _lacking(runs)
        if left := [run["method"] for run in runs if not run["passes"] and run["method"] not in lacking]:
            yield f"known when they run: {', '.join(left)}"
        if lacking:
            yield not_run(lacking)


def speed_tables(results: dict[str, Any]) -> Iterator[str | Table]:
    """Lines and tables, in order, of what a benchmark measured."""
    results = completed(results)
    for _, runs in groupby(results["runs"], key=lambda run: run["size"]):
        runs = list(runs)
        yield title(runs[0])
        yield _speed_table([run for run in runs if run["passes"]])
        for heading, headings, lines in tables_of(results, runs):
            yield heading
            yield _contrast_table(headings, lines)
        yield from explained(results["baseline"], runs)
        if lacking := _lacking(runs):
            yield not_run(lacking)
        others = [run for run in runs if run["method"] not in lacking]
        yield from (f"could not run: {', '.join(methods)} ({why})" for why, methods in failures(others).items())


def _lacking(runs: Iterable[dict[str, Any]]) -> dict[str, str]:
    """Why rows were left out from the start, by their names."""
    errors = {run["method"]: run["error"] or "" for run in runs}
    return {name: why.removeprefix(NOT_RUN) for name, why in errors.items() if why.startswith(NOT_RUN)}


def not_run(lacking: Mapping[str, str]) -> str:
    """One line about rows that were left out, from why each of them was."""
    by_reason = {why: [name for name, other in lacking.items() if other == why] for why in lacking.values()}
    return f"{NOT_RUN}{'; '.join(f'{_some(names)} ({why})' for why, names in by_reason.items())}"


def _some(names: Sequence[str]) -> str:
    more = len(names) - SHOWN
    return ", ".join(names) if more <= 1 else f"{', '.join(names[:SHOWN])} and {more} more"


def explained(baseline: str, runs: Iterable[dict[str, Any]]) -> Iterator[str]:
    """What those columns mean that are in the table and whose names do not say it."""
    runs = [run for run in runs if run["passes"]]
    for name, meaning in MEANINGS.items():
        if name in NARROW and any(COLUMNS[name](run) for run in runs):
            yield f"{name}: {meaning.format(baseline=baseline)}"


def title(run: dict[str, Any]) -> str:
    """The model's family and the video's size."""
    size = run["size"]
    return f"{run['family']}, {size['num_frames']} frames of {size['width']} x {size['height']}"


def failures(runs: Iterable[dict[str, Any]]) -> dict[str, list[str]]:
    """Why rows could not run -> which: where a model is missing, many say the same."""
    found: dict[str, list[str]] = {}
    for run in runs:
        if run["error"]:
            found.setdefault(run["error"], []).append(run["method"])
    return found


def empty_table() -> Table:
    return Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))


def _speed_table(runs: Iterable[dict[str, Any]]) -> Table:
    runs = list(runs)
    columns = {name: cell for name, cell in COLUMNS.items() if name in NARROW and any(cell(run) for run in runs)}
    table = empty_table()
    table.add_column("method", overflow="fold")
    for heading in columns:
        table.add_column(heading.replace(", ", "\n"), justify="right", no_wrap=True)
    for run in runs:
        table.add_row(run["method"], *(cell(run) or "-" for cell in columns.values()))
    return table


def _contrast_table(headings: Sequence[str], lines: Iterable[Sequence[str]]) -> Table:
    """A row for each measure, which is what a terminal has room for; broken between words, never in one."""
    table = empty_table()
    for heading in (f"{headings[0]}, {headings[1]}", "measure", "difference"):
        table.add_column(heading, overflow="fold")
    for method, against, *cells in lines:
        who = f"{method}\n  {against}"
        for measure, cell in zip(headings[2:], cells, strict=True):
            if cell:
                table.add_row(who, _broken(measure, MEASURE_WIDTH), _broken(cell, DIFFERENCE_WIDTH))
                who = ""
    return table


def _broken(text: str, width: int) -> str:
    return textwrap.fill(text, width, break_long_words=False, break_on_hyphens=False)


def passes_text(run: dict[str, Any]) -> str:
    """Full passes and others, as in 8 + 12."""
    count = run["passes"]
    others = count["predicted"] + count["skipped"]
    return f"{count['full']} + {others}" if others else str(count["full"])


def _number(form: str, *path: str) -> Callable[[dict[str, Any]], str | None]:
    """A cell: the number that stands at the end of this path in a run, if there is one."""

    def cell(run: dict[str, Any]) -> str | None:
        for key in path:
            run = run.get(key) if run is not None else None
        return None if run is None else form.format(run)

    return cell


def _cache_share(run: dict[str, Any]) -> str | None:
    """Of peak memory."""
    return f"{run['cache_bytes'] / run['peak_memory_bytes']:.1%}" if run["cache_bytes"] else None


def _bytes(key: str) -> Callable[[dict[str, Any]], str | None]:
    return lambda run: si(run[key], "B") if run[key] else None


COLUMNS: dict[str, Callable[[dict[str, Any]], str | None]] = {
    "passes": passes_text,
    "seconds, text": _number("{:.2g}", "text_seconds", "median"),
    "seconds, denoising": _number("{:.3g}", "denoise_seconds", "median"),
    "seconds, decoding": _number("{:.2g}", "decode_seconds", "median"),
    "seconds, writing": _number("{:.2g}", "write_seconds", "median"),
    "seconds, all": _number("{:.3g}", "end_to_end_seconds", "median"),
    "speedup, denoising": _number("{:.2f}x", "speedup", "measured"),
    "speedup, end to end": _number("{:.2f}x", "speedup", "end_to_end"),
    "by FLOPs": _number("{:.2f}x", "speedup", "ideal"),
    "full passes": _number("{:.1f}", "full_pass_equivalents", "flops"),
    "as timed": _number("{:.1f}", "full_pass_equivalents", "timed"),
    "of it": _number("{:.0%}", "speedup", "measured_over_ideal"),
    "cache": _bytes("cache_bytes"),
    "memory": _bytes("peak_memory_bytes"),
    "cache share": _cache_share,
    "latent": _number("{:.3f}", "fidelity", "latent_relative_l2"),
    "Frechet": _number("{:.3f}", "distribution", "frechet"),
    "own latent": _number("{:.3f}", "own_fidelity", "latent_relative_l2"),
    "total": _number("{:.1f}", "total"),
}
"""Of a measured run, each where a row has something to say in it."""
HEADINGS = {
    "full passes": "as many full passes, by FLOPs",
    "as timed": "as many full passes, as timed",
    "of it": "denoising of by FLOPs",
    "cache": "cache between steps",
    "memory": "peak memory",
    "cache share": "cache of memory",
    "latent": "latent error to the baseline",
    "own latent": "latent error to own full run",
    "Frechet": "Frechet distance",
    "total": "total, %",
}
"""Of columns where there is room for words."""
MEANINGS = {
    "passes": "of the whole transformer + of what stands in for it",
    "speedup, denoising": "how many times as fast as {baseline}, of the sampler alone",
    "speedup, end to end": "the same of all stages, from the prompt to an mp4",
    "by FLOPs": "what the counted arithmetic allows",
    "full passes": "what a video costs in full passes of the same model",
    "own latent": "the same to the same model's own run of all passes full",
    "Frechet": "of the videos as a whole to those that the scorer's world made itself",
    "latent": "latent error, the distance of the final latents to {baseline}'s from the same noise; 0 is identical",
    "total": "score of the videos in percent",
}
"""Of columns, below a table."""
SHOWN = 3
"""Names of rows that a line lists."""
NARROW = ("passes", "seconds, denoising", "speedup, denoising", "speedup, end to end", "latent", "total")
"""Those that a terminal of 80 columns has room for."""
MEASURE_WIDTH, DIFFERENCE_WIDTH = 12, 34


def _heading(runs: list[dict[str, Any]]) -> Iterator[str]:
    costs = runs[0]["plan"]
    full = costs["full_pass"]
    total = sum(full.values())
    shares = ", ".join(f"{name} {value / total:.2%}" for name, value in full.items())
    tokens = costs["tokens"]
    yield f"{title(runs[0])}: {tokens['video']:,} video and {tokens['text']:,} text tokens"
    parameters = min(run["parameters"] for run in runs)
    weights = min(run["plan"]["weight_bytes"] for run in runs)
    yield f"{parameters:,} parameters, {si(weights, 'B')}; activations {si(costs['activation_bytes'], 'B')}"
    beside = [f"{name} {si(held, 'B')}" for name, held in costs.get("beside_bytes", {}).items()]
    yield f"memory is the transformer's alone; {', '.join(beside) or 'text encoder and autoencoder are'} beside it"
    yield f"a full pass: {si(total, 'FLOPs')} ({shares})"
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
    table = empty_table()
    table.add_column("method", overflow="fold")
    for heading in ("steps", "passes", "FLOPs", "cache", "memory", "ideal"):
        table.add_column(heading, justify="right", no_wrap=True)
    for run in runs:
        table.add_row(
            run["method"],
            str(run["steps"]),
            passes_text(run),
            si(run["flops"]),
            si(run["cache_bytes"], "B") if run["cache_bytes"] else "-",
            si(run["plan"]["peak_memory_bytes"], "B"),
            f"{run['speedup']['ideal']:.2f}x",
        )
    return table
