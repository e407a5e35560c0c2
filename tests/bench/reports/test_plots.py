"""The picture of speed against quality: names that can be read where points crowd."""

import io
from itertools import combinations

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text

from tests.bench.test_results import RUN
from vidaccel.bench.reports.frontier import _best, _costs, _errors, _of_one_model, frontier
from vidaccel.bench.reports.plots import _label, pareto


def test_names_of_close_points_stay_apart_and_inside():
    figure = Figure(figsize=(6, 4), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot(xlim=(1, 10), ylim=(0, 100))
    points = [(5 + 0.01 * i, 50 + 0.3 * i) for i in range(12)] + [(10, 100), (1, 0)]
    axes.scatter(*zip(*points, strict=True))
    for i, point in enumerate(points):
        axes.annotate(f"a-method-{i}", point, xytext=(0, 0), textcoords="offset points", fontsize=6)
    _label(axes)
    boxes = [Text.get_window_extent(text) for text in axes.texts]
    assert not any(a.overlaps(b) for a, b in combinations(boxes, 2))
    assert all(axes.bbox.count_contains(box.corners()) == 4 for box in boxes)
    pixels = axes.transData.transform(points)
    assert not any(box.contains(x, y) for box in boxes for x, y in pixels)


def pixels_of(picture: bytes | None) -> np.ndarray:
    assert picture is not None
    return matplotlib.image.imread(io.BytesIO(picture))


def test_a_picture_of_nothing_is_one():
    assert pixels_of(pareto({"runs": []})).shape == (770, 990, 4)
    assert pixels_of(pareto({"runs": []}))[0, 0].tolist() == [1, 1, 1, 1]
    assert pixels_of(pareto({"runs": []}, dark=True))[0, 0, :3].max() < 0.2


ERRORS = {"few-2": (2, 0.6), "few-4": (4, 0.3), "net-2": (2.1, 0.25), "net-3": (3, 0.2), "net-3-worse": (3, 0.4)}
"""Cost and average error of rows that the frontier is drawn of."""
PROMPTS = 8


def compared(totals: bool = True, errors: bool = True) -> dict:
    """Rows whose errors are as high as their prompts are hard: the i-th of eight is i / 4 from the average of 1."""
    hard = np.linspace(0, 2, PROMPTS)
    runs = []
    for name, (cost, error) in ERRORS.items():
        network = name.startswith("net")
        run = RUN | {"method": name, "full_pass_equivalents": {"flops": cost, "timed": None}, "steps": round(cost)}
        run["settings"] = {"cache": None, "on_skipped": "predictor" if network else None}
        run["passes"] = {"full": 2, "predicted": 2 * network, "skipped": 0}
        delta = {"delta": -10 * error, "low": -11 * error, "high": -9 * error, "p": 0, "p_holm": None, "verdict": None}
        run["contrasts"] = [{"question": "baseline", "with": "cfg-50", "deltas": {"total": delta} if totals else {}}]
        values = {"latent_relative_l2": (error + hard - 1).tolist()} if errors else {}
        run["per_prompt"] = {"scores": {}, "fidelity": {}, "own_fidelity": {"few-20": values}}
        runs.append(run)
    whole = {"method": "few-20", "steps": 20, "contrasts": [], "full_pass_equivalents": {"flops": 20, "timed": None}}
    runs.append(runs[0] | whole | {"per_prompt": {"scores": {}, "fidelity": {}, "own_fidelity": {}}})
    return {"baseline": "cfg-50", "meanings": [str(i) for i in range(PROMPTS)], "runs": runs}


def test_another_decoder_is_another_model():
    results = compared()
    for run in results["runs"][:2]:
        run["settings"] = run["settings"] | {"decoder": "runs/narrow"}
    assert {run["settings"].get("decoder") for run in _of_one_model(results)} == {None}


def test_costs_that_lie_close_together_have_ticks_too():
    axes = Figure().add_subplot()
    _costs(axes, [28.2, 44.0])
    assert [label.get_text() for label in axes.get_xticklabels()] == ["30", "35", "40", "45"]
    _costs(axes, [2.0, 50.0])
    assert [label.get_text() for label in axes.get_xticklabels()][:3] == ["2", "3", "4"]


def test_the_frontier_has_a_panel_for_what_was_measured():
    old = {"baseline": "cfg-50", "runs": [RUN | {"settings": {"cache": None}}] * 2}
    assert frontier(old) is None and frontier(compared(totals=False, errors=False)) is None
    heights = [pixels_of(frontier(compared(**kind))).shape[0] for kind in ({}, {"totals": False}, {"errors": False})]
    assert heights[0] > heights[1] == heights[2]
    dark = pixels_of(frontier(compared(), dark=True))
    assert dark.shape[0] == heights[0] and dark[0, 0, :3].max() < 0.2


def test_bands_are_of_pairs_and_each_method_stands_at_its_best():
    """What all rows share of a prompt is in no band: here that is all there is."""
    results = compared()
    points = _errors(results["runs"], results["meanings"])
    assert [round(point.value, 6) for point in points.values()] == [error for _, error in ERRORS.values()]
    assert all(point.high - point.low < 1e-6 for point in points.values())
    own = sorted(point for i, point in points.items() if i in (2, 3, 4))
    assert [(point.cost, round(point.value, 2)) for point in _best(own, higher=False)] == [(2.1, 0.25), (3, 0.2)]
    assert [point.cost for point in _best(own, higher=True)] == [2.1, 3]
    # one prompt that one row alone finds hard is in the bands: the more so in that row's
    results["runs"][0]["per_prompt"]["own_fidelity"]["few-20"]["latent_relative_l2"][3] += 4
    widths = [point.high - point.low for point in _errors(results["runs"], results["meanings"]).values()]
    assert widths[0] > 3 * max(widths[1:]) > 0
