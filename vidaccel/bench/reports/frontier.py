"""The frontier: how good the videos are for so many full passes, of three or four methods on one model.

One panel is the total, as a difference to the baseline, and one the error of the final latents to the model's own full
run; what was not measured has none. Bands are of pairs: that of the total is the interval of the difference, and from
errors what makes a prompt harder for all methods alike is taken out first, so that bands which stay apart are methods
that differ.

P prompts, N rows
"""

import io
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from vidaccel.bench.measures.pairs import draws, interval
from vidaccel.bench.reports.themes import DARK, LIGHT

ERROR = "latent_relative_l2"
TICKS = (1, 2, 3, 4, 5, 6, 8, 10, 14, 20, 30, 50, 100)
MOST = 4
"""Methods in one picture."""


class Method(NamedTuple):
    """A line of the picture."""

    name: str
    marker: str
    colours: tuple[str, str]
    """On white and on black, told apart by the colour-blind too."""
    among: Callable[[Mapping[str, Any]], bool]
    """Whether a run is one of its points."""


class Point(NamedTuple):
    """A run in one panel."""

    cost: float
    value: float
    low: float
    high: float


def _forecast(way: str) -> Callable[[Mapping[str, Any]], bool]:
    return lambda run: _shortened(run) and run["settings"].get("cache") is None and _way(run) == way


def _way(run: Mapping[str, Any]) -> str | None:
    return run["settings"].get("on_skipped")


def _shortened(run: Mapping[str, Any]) -> bool:
    return bool(run["passes"]["predicted"] or run["passes"]["skipped"])


METHODS = (
    Method("few steps, all in full", "o", ("#0072b2", "#56b4e9"), lambda run: not _shortened(run)),
    Method("learned network", "D", ("#c8500a", "#ff9a5c"), _forecast("predictor")),
    Method("fitted scalars", "s", ("#00795a", "#3fcfa0"), _forecast("multistep")),
    Method("last output again", "^", ("#8a6d00", "#e6c229"), _forecast("reuse")),
    Method("Taylor forecast", "v", ("#a0507f", "#e28fc0"), _forecast("taylor")),
    Method("caches of parts", "P", ("#666666", "#bbbbbb"), lambda run: run["settings"].get("cache") is not None),
)
"""The most telling first."""


def frontier(results: Mapping[str, Any], dark: bool = False) -> bytes | None:
    """A PNG; None where no costs, or neither totals nor errors, were measured of two rows."""
    runs = _of_one_model(results)
    panels = {
        f"total, points to {results['baseline']}": _totals(runs),
        "error of the final latents\nto the model's own full run": _errors(runs, results.get("meanings", ())),
    }
    panels = {label: points for label, points in panels.items() if len(points) > 1}
    if not panels:
        return None
    methods = [method for method in METHODS if any(method.among(runs[i]) for points in panels.values() for i in points)]
    with rc_context(DARK if dark else LIGHT):
        figure = Figure(figsize=(7.2, 0.7 + 3.1 * len(panels)), dpi=140, layout="constrained")
        FigureCanvasAgg(figure)
        every = figure.subplots(len(panels), sharex=True, squeeze=False)[:, 0]
        for axes, (label, points) in zip(every, panels.items(), strict=True):
            _panel(axes, label, points, runs, methods[:MOST], dark)
        _costs(every[-1], [point.cost for points in panels.values() for point in points.values()])
        handles = {text: each for a in figure.axes for each, text in zip(*a.get_legend_handles_labels(), strict=True)}
        figure.legend(handles.values(), handles.keys(), loc="outside upper center", ncols=MOST, frameon=False)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png")
    return buffer.getvalue()


def _of_one_model(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Runs of the first size whose costs are known, of the student where some of its passes were saved, else of the
    teacher as the model is called: without the passes of guidance of another row."""
    known = [run for run in results["runs"] if run["passes"] and (run.get("full_pass_equivalents") or {}).get("flops")]
    known = [run for run in known if run["size"] == results["runs"][0]["size"]]
    saved = [run for run in known if _shortened(run)]
    best = max(saved, key=lambda run: (run["on"] == "student", _way(run) == "predictor"), default=None)
    return [] if best is None else [run for run in known if _model(run) == _model(best)]


def _model(run: Mapping[str, Any]) -> tuple[Any, ...]:
    keys = ("model", "shift", "guidance", "guidance_2", "two_pass", "as_called", "lora", "decoder", "decode")
    return run["on"], *(run["settings"].get(key) for key in keys)


def _totals(runs: Sequence[Mapping[str, Any]]) -> dict[int, Point]:
    """Of each run that was compared with the baseline, by its place."""
    found = {}
    for i, run in enumerate(runs):
        for each in run.get("contrasts") or ():
            if each["question"] == "baseline" and (delta := each["deltas"].get("total")):
                found[i] = Point(_cost(run), delta["delta"], delta["low"], delta["high"])
    return found


def _errors(runs: Sequence[Mapping[str, Any]], meanings: Sequence[str]) -> dict[int, Point]:
    """Of each run whose distance to the model's full run of most steps was measured, by its place."""
    measured = [((run.get("per_prompt") or {}).get("own_fidelity") or {}) for run in runs]
    steps = {run["method"]: run["steps"] for run in runs}
    names = [name for each in measured for name in each if name in steps]
    if not names:
        return {}
    reference = max(dict.fromkeys(names), key=lambda name: (steps[name], names.count(name)))
    columns = {i: each[reference][ERROR] for i, each in enumerate(measured) if ERROR in each.get(reference, {})}
    columns = {i: np.array(values, dtype=np.float64) for i, values in columns.items() if len(values) == len(meanings)}
    if not columns:
        return {}
    spread = _without_what_prompts_share(np.stack(list(columns.values())))
    drawn = draws(tuple(meanings))
    found = {}
    for (i, values), own in zip(columns.items(), spread, strict=True):
        low, high = interval(drawn @ own / drawn.sum(1))
        found[i] = Point(_cost(runs[i]), float(values.mean()), low, high)
    return found


def _without_what_prompts_share(values: np.ndarray) -> np.ndarray:
    """[N, P] with each prompt's mean over the rows replaced by that of all; spread by what that takes from the variance
    (Morey 2008)."""
    rows, own_means = len(values), values.mean(1, keepdims=True)
    left = values - values.mean(0) + values.mean()
    return own_means + (left - left.mean(1, keepdims=True)) * (rows / max(1, rows - 1)) ** 0.5


def _cost(run: Mapping[str, Any]) -> float:
    return run["full_pass_equivalents"]["flops"]


def _panel(
    axes: Axes,
    label: str,
    points: Mapping[int, Point],
    runs: Sequence[Mapping[str, Any]],
    methods: Sequence[Method],
    dark: bool,
) -> None:
    higher = label.startswith("total")
    for method in methods:
        own = sorted(point for i, point in points.items() if method.among(runs[i]))
        best = _best(own, higher)
        colour = method.colours[dark]
        line = {"color": colour, "marker": method.marker, "markersize": 6, "linewidth": 1.6, "label": method.name}
        if best:
            costs, values, lows, highs = (np.array(column) for column in zip(*best, strict=True))
            axes.fill_between(costs, lows, highs, color=colour, alpha=0.2, linewidth=0)
            axes.vlines(costs, lows, highs, color=colour, alpha=0.5, linewidth=1.2)
            axes.plot(costs, values, **line)
        if others := [point for point in own if point not in best]:
            costs, values, *_ = zip(*others, strict=True)
            axes.scatter(costs, values, color=colour, marker=method.marker, s=14, alpha=0.45, linewidth=0)
    if higher:
        axes.axhline(0, linewidth=0.8, color=axes.xaxis.label.get_color(), alpha=0.6)
    else:
        axes.set_ylim(bottom=0)
    axes.set_ylabel(label)
    axes.grid(alpha=0.25)


def _costs(axes: Axes, costs: Sequence[float]) -> None:
    """The axis that all panels share."""
    least, most = 0.9 * min(costs), 1.1 * max(costs)
    ticks = [tick for tick in TICKS if least <= tick <= most]
    if len(ticks) < 3:  # what was measured lies close together
        ticks = [round(tick) for tick in MaxNLocator(5, integer=True).tick_values(least, most) if least <= tick <= most]
    about = "what a video costs, in full passes of the same model (by FLOPs)\nbands: 95 %, in pairs of prompt and noise"
    axes.set(xscale="log", xlim=(least, most), xlabel=about)
    axes.set_xticks(ticks, list(map(str, ticks)))
    axes.minorticks_off()


def _best(points: Sequence[Point], higher: bool) -> list[Point]:
    """Those of rising cost that are better than every cheaper one."""
    best: list[Point] = []
    for point in points:
        if not best or (point.value > best[-1].value if higher else point.value < best[-1].value):
            if best and best[-1].cost == point.cost:
                best.pop()
            best.append(point)
    return best
