"""A study's JSON as markdown, after the paper's Table 1. Every number comes from the JSON: nothing is typed by hand."""

import statistics
from collections.abc import Iterable, Iterator
from itertools import groupby
from typing import Any

MODELS = ("teacher", "cfg", "derivative", "rollout")
TITLES = {
    "teacher": "teacher, two passes",
    "cfg": "CFG-distilled",
    "derivative": "derivative",
    "rollout": "rollout",
    "plain": "plain forward-backward",
    "finite_difference": "derivative, finite difference",
    "exact": "derivative, exact",
}
SCORES = ("semantic", "quality", "total", "dynamic_degree")


def markdown(document: dict[str, Any]) -> str:
    """The whole page."""
    rows = sorted(document["rows"], key=_order)
    return "\n".join([*_heading(document, rows), *_main(rows), *_seeds(rows), *_cost(document["cost"])]) + "\n"


def _order(row: dict[str, Any]) -> tuple:
    return MODELS.index(row["model"]), row["restrict"] or 0, row["seed"] or 0, -row["steps"]


def _heading(document: dict[str, Any], rows: list[dict]) -> Iterator[str]:
    made_of = document["made_of"]
    yield "# Few-step students at equal training time"
    yield ""
    yield "Made by"
    yield ""
    yield from (f"    {command}" for command in document["commands"])
    yield ""
    yield (
        f"Teacher {made_of['teacher'][:12]}, features {made_of['features'][:12]} (SHA-256). {made_of['prompts']} "
        f"held-out prompts, the same noise for every row; {made_of['cfg_minutes']:g} minutes of CFG distillation, "
        f"{made_of['minutes']:g} minutes for each student."
    )
    for machine in _machines([*rows, *([document["cost"]] if document["cost"] else [])]):
        yield f"On {machine}."


def _machines(measured: Iterable[dict]) -> list[str]:
    """What rows ran on, each once."""
    lines = []
    for environment in (each["environment"] for each in measured):
        versions = environment["versions"]
        lines.append(
            f"{environment['cpu']}, {environment['threads']} threads, torch {versions['torch']}, diffusers "
            f"{versions['diffusers']}, vidaccel {versions['vidaccel']} at {environment['commit'] or 'no commit'}"
        )
    return list(dict.fromkeys(lines))


def _main(rows: list[dict]) -> Iterator[str]:
    reference = next((row["scores"]["total"]["mean"] for row in rows if row["model"] == "teacher"), None)
    yield ""
    yield "Scores are percentages with 95 % intervals over prompts; the latent error is the relative L2 distance of"
    yield "final latents to the teacher's."
    yield ""
    columns = ["model", "R", "seed", "steps", "passes", "semantic", "quality", "total", "less the teacher's"]
    columns += ["dynamic degree", "latent error", "trained steps", "minutes", "skipped"]
    yield from _head(columns)
    for row in rows:
        yield _line([*_which(row), row["steps"], row["passes"], *_measured(row, reference), *_trained(row["trained"])])


def _which(row: dict) -> list[object]:
    return [TITLES[row["model"]], row["restrict"], row["seed"]]


def _measured(row: dict, reference: float | None) -> list[object]:
    if row["error"]:
        return [f"failed: {row['error']}", *5 * [None]]
    semantic, quality, total, motion = (_estimate(row["scores"][name], 1) for name in SCORES)
    less = None if reference is None else f"{row['scores']['total']['mean'] - reference:+.1f}"
    return [semantic, quality, total, less, motion, _estimate(row["latent_error"], 3)]


def _estimate(estimate: dict[str, float] | None, digits: int) -> str | None:
    if estimate is None:
        return None
    mean, low, high = (f"{estimate[name]:.{digits}f}" for name in ("mean", "low", "high"))
    return f"{mean} ({low} to {high})"


def _trained(training: dict | None) -> list[object]:
    if training is None:
        return [None, None, None]
    return [training["steps"], f"{training['seconds'] / 60:.1f}", training["skipped"]]


def _seeds(rows: list[dict]) -> Iterator[str]:
    """Models that were trained with several seeds: means of their rows, and the extremes."""
    done = [row for row in rows if not row["error"]]
    groups = [list(group) for _, group in groupby(sorted(done, key=_group), key=_group)]
    several = [group for group in groups if len(group) > 1]
    if not several:
        return
    yield ""
    yield "Means over training seeds, with the least and the most:"
    yield ""
    yield from _head(["model", "R", "steps", "seeds", "total", "latent error"])
    for group in several:
        first, totals = group[0], [row["scores"]["total"]["mean"] for row in group]
        errors = [row["latent_error"]["mean"] for row in group]
        cells = [TITLES[first["model"]], first["restrict"], first["steps"], len(group)]
        yield _line([*cells, _extremes(totals, 1), _extremes(errors, 3)])


def _group(row: dict) -> tuple:
    model, restrict, _, steps = _order(row)
    return model, restrict, steps


def _extremes(values: list[float], digits: int) -> str:
    return f"{statistics.mean(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def _cost(cost: dict | None) -> Iterator[str]:
    if cost is None:
        return
    yield ""
    yield f"What a training step costs, batch {cost['batch_size']}; medians of interleaved rounds, with quartiles:"
    yield ""
    yield from _head(["step", "seconds", "over a plain pass", "rounds"])
    for name, seconds in cost["seconds"].items():
        ratio = cost["ratio_to_plain"].get(name)
        yield _line([TITLES[name], _spread(seconds), ratio and _spread(ratio), seconds["rounds"]])
    yield ""
    yield "Memory of the weights of teacher and student, and of all tensors while they train, in MB:"
    yield ""
    yield from _head(["step", "weights", "at most", "over a plain step", "what steps add", "over a plain step"])
    plain = cost["memory_bytes"]["plain"]
    for name, memory in cost["memory_bytes"].items():
        before, most, added = memory["before"], memory["peak"], _added(memory)
        shares = [f"{most / plain['peak']:.2f}", f"{added / 1e6:.0f}", f"{added / _added(plain):.2f}"]
        yield _line([TITLES[name], f"{before / 1e6:.0f}", f"{most / 1e6:.0f}", *shares])


def _added(memory: dict[str, int]) -> int:
    return memory["peak"] - memory["before"]


def _spread(values: dict[str, float]) -> str:
    return f"{values['median']:.3g} ({values['p25']:.3g} to {values['p75']:.3g})"


def _head(columns: list[str]) -> list[str]:
    return [_line(columns), "|" + "---|" * len(columns)]


def _line(cells: Iterable[object]) -> str:
    return "| " + " | ".join("" if cell is None else str(cell) for cell in cells) + " |"
