"""Speed against quality, as a picture: every row a point, and the line that ours make together."""

import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.transforms import Bbox

from vidaccel.bench.reports.themes import DARK, LIGHT

KINDS = {
    "sampler on the teacher": ("o", "#777777"),
    "sampler on the student": ("o", "#2f86c8"),
    "with a predictor": ("D", "#d62728"),
    "cache on the teacher": ("s", "#aaaaaa"),
    "cache on the student": ("s", "#8fbbe0"),
}
"""Marker and colour."""
LEADER = {"arrowstyle": "-", "color": "#999999", "linewidth": 0.4, "shrinkA": 0, "shrinkB": 2}
"""From a name to its point."""
PLACES = 12
"""Directions from a point in which its name is tried."""
TICKS = (1, 2, 3, 5, 7, 10, 15, 20, 30, 50, 70, 100, 150, 200)
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


def pareto(results: Mapping[str, Any], dark: bool = False) -> bytes:
    """A PNG: total against measured speedup; likeness to the baseline where nothing was scored; else measured against
    ideal speedup."""
    timed = [run for run in results["runs"] if run["speedup"]["measured"] is not None]
    buffer = io.BytesIO()
    with rc_context(DARK if dark else LIGHT):
        figure = Figure(figsize=(9, 7), dpi=110, layout="constrained")
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
            figure.legend(loc="outside lower center", ncols=3, fontsize=8)
            _label(axes)
        figure.savefig(buffer, format="png")
    return buffer.getvalue()


def _totals(axes: Axes, runs: Sequence[dict[str, Any]]) -> None:
    _points(axes, runs, [run["total"] for run in runs])
    for run in runs:
        low, high = run["intervals"]["total"]
        axes.vlines(run["speedup"]["measured"], low, high, color=KINDS[kind_of(run)][1], alpha=0.35)
    ours = [run for run in runs if kind_of(run) == "with a predictor"]
    speeds = sorted(run["speedup"]["measured"] for run in ours)
    if ours:
        best = [best_total(ours, speed) for speed in speeds]
        axes.plot(speeds, best, color=KINDS["with a predictor"][1], zorder=1, label="best of them, at least so fast")
    axes.set(xscale="log", xlabel="speedup of denoising, measured", ylabel="total, % (95 % interval over meanings)")


def _likeness(axes: Axes, runs: Sequence[dict[str, Any]]) -> None:
    _points(axes, runs, [run["fidelity"]["latent_relative_l2"] for run in runs])
    axes.set(
        xscale="log",
        xlabel="speedup of denoising, measured",
        ylabel="relative L2 distance of the latent to the baseline's",
    )
    axes.invert_yaxis()


def _speedups(axes: Axes, runs: Sequence[dict[str, Any]]) -> None:
    _points(axes, runs, [run["speedup"]["ideal"] for run in runs])
    fastest = max((run["speedup"]["ideal"] for run in runs), default=1.0)
    axes.plot([1, fastest], [1, fastest], color="#dddddd", zorder=0)
    axes.set(xscale="log", yscale="log", xlabel="speedup of denoising, measured", ylabel="speedup, by FLOPs")


def _points(axes: Axes, runs: Sequence[dict[str, Any]], heights: Sequence[float]) -> None:
    for kind, (marker, colour) in KINDS.items():
        chosen = [(run, y) for run, y in zip(runs, heights, strict=True) if kind_of(run) == kind]
        if chosen:
            speeds, ys = zip(*((run["speedup"]["measured"], y) for run, y in chosen), strict=True)
            axes.scatter(speeds, ys, marker=marker, color=colour, label=kind, s=28, zorder=2)
        sweeps: dict[str, list[tuple[float, float]]] = {}
        for run, y in chosen:
            at = run["speedup"]["measured"], y
            sweeps.setdefault(run["method"].split()[0], []).append(at)
            if "=" not in run["method"]:  # a sweep has one name
                axes.annotate(
                    run["method"], at, xytext=(0, 0), textcoords="offset points", fontsize=6, arrowprops=LEADER
                )
        for points in sweeps.values():
            axes.plot(*zip(*sorted(points), strict=True), color=colour, linewidth=0.8, zorder=1)


def _label(axes: Axes) -> None:
    """Put each name at the free place that is nearest to its point."""
    figure = axes.get_figure()
    figure.draw_without_rendering()  # the layout decides where points are in pixels
    figure.set_layout_engine("none")
    points = axes.transData.transform([(x, y) for each in axes.collections for x, y in each.get_offsets()])
    taken = [Bbox.from_bounds(x - 4, y - 4, 8, 8) for x, y in points]
    rings = [(r, 2 * math.pi * k / PLACES) for r in range(8, 240, 8) for k in range(PLACES)]
    for text in axes.texts:
        for radius, angle in rings:
            x, y = radius * math.cos(angle), radius * math.sin(angle)
            text.set(position=(x, y), ha="left" if x > -1 else "right", va="center")
            box = Text.get_window_extent(text).padded(1)  # without the line to its point
            if axes.bbox.count_contains(box.corners()) == 4 and not any(box.overlaps(other) for other in taken):
                break
        taken.append(box)
