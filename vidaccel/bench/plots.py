"""Speed against quality, as a picture: every row a point, and the line that ours make together."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from vidaccel.artefacts import atomic_path

KINDS = {
    "sampler on the teacher": ("o", "#444444"),
    "sampler on the student": ("o", "#1f77b4"),
    "with a predictor": ("D", "#d62728"),
    "cache on the teacher": ("s", "#bbbbbb"),
    "cache on the student": ("s", "#8fbbe0"),
}
"""Marker and colour."""
TICKS = (1, 2, 3, 5, 7, 10, 15, 20, 30)
"""Speedups that the axis names."""


def kind_of(run: dict[str, Any]) -> str:
    """One of KINDS."""
    if run["passes"]["predicted"]:
        return "with a predictor"
    cached = run["settings"]["cache"] is not None or run["passes"]["skipped"]
    return f"{'cache' if cached else 'sampler'} on the {run['on']}"


def best_total(runs: Sequence[dict[str, Any]], speedup: float) -> float | None:
    """Highest total of a row that is at least so fast."""
    return max((run["total"] for run in runs if run["speedup"]["measured"] >= speedup), default=None)


def above_ours(runs: Sequence[dict[str, Any]], slowest: float = 3.0, fastest: float = 20.0) -> list[dict[str, Any]]:
    """Rows between those speedups with a higher total than any row with a predictor that is as fast."""
    scored = [run for run in runs if run["total"] is not None and run["speedup"]["measured"] is not None]
    ours = [run for run in scored if kind_of(run) == "with a predictor"]
    found = []
    for run in scored:
        speed = run["speedup"]["measured"]
        best = best_total(ours, speed)
        if run not in ours and slowest <= speed <= fastest and (best is None or run["total"] > best):
            found.append(run)
    return found


def write_pareto(path: Path, runs: Sequence[dict[str, Any]]) -> None:
    """A PNG: total against measured speedup; likeness to the baseline where nothing was marked; else measured against
    ideal speedup."""
    timed = [run for run in runs if run["speedup"]["measured"] is not None]
    figure = Figure(figsize=(9, 6), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    if any(run["total"] is not None for run in timed):
        _totals(axes, [run for run in timed if run["total"] is not None])
    elif any(run["fidelity"] for run in timed):
        _likeness(axes, [run for run in timed if run["fidelity"]])
    else:
        _speedups(axes, timed)
    axes.set_xticks(TICKS, [f"{tick}x" for tick in TICKS])
    axes.minorticks_off()
    if timed:
        fastest = max(run["speedup"]["measured"] for run in timed)
        axes.set_xlim(0.9, 1.5 * fastest)
        axes.legend(fontsize=8)
    with atomic_path(path) as temporary:
        figure.savefig(temporary)


def _totals(axes: Axes, runs: Sequence[dict[str, Any]]) -> None:
    _points(axes, runs, [run["total"] for run in runs])
    for run in runs:
        low, high = run["intervals"]["total"]
        axes.vlines(run["speedup"]["measured"], low, high, color=KINDS[kind_of(run)][1], alpha=0.35)
    ours = [run for run in runs if kind_of(run) == "with a predictor"]
    speeds = sorted(run["speedup"]["measured"] for run in ours)
    axes.plot(speeds, [best_total(ours, speed) for speed in speeds], color=KINDS["with a predictor"][1], zorder=1)
    axes.set(xscale="log", xlabel="speedup, measured", ylabel="total, % (95 % interval over prompts)")


def _likeness(axes: Axes, runs: Sequence[dict[str, Any]]) -> None:
    _points(axes, runs, [run["fidelity"]["latent_relative_l2"] for run in runs])
    axes.set(xscale="log", xlabel="speedup, measured", ylabel="relative L2 distance of the latent to the baseline's")
    axes.invert_yaxis()


def _speedups(axes: Axes, runs: Sequence[dict[str, Any]]) -> None:
    _points(axes, runs, [run["speedup"]["ideal"] for run in runs])
    fastest = max((run["speedup"]["ideal"] for run in runs), default=1.0)
    axes.plot([1, fastest], [1, fastest], color="#dddddd", zorder=0)
    axes.set(xscale="log", yscale="log", xlabel="speedup, measured", ylabel="speedup, by FLOPs")


def _points(axes: Axes, runs: Sequence[dict[str, Any]], heights: Sequence[float]) -> None:
    for kind, (marker, colour) in KINDS.items():
        chosen = [(run, y) for run, y in zip(runs, heights, strict=True) if kind_of(run) == kind]
        if chosen:
            speeds, ys = zip(*((run["speedup"]["measured"], y) for run, y in chosen), strict=True)
            axes.scatter(speeds, ys, marker=marker, color=colour, label=kind, s=28, zorder=2)
        for run, y in chosen:
            if "=" not in run["method"]:  # points of a sweep would write over one another
                at = run["speedup"]["measured"], y
                axes.annotate(run["method"], at, fontsize=6, xytext=(4, 3), textcoords="offset points")
