"""The picture of speed against quality: names that can be read where points crowd."""

from itertools import combinations

import matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text

from tests.bench.test_results import RUN
from vidaccel.bench.reports.plots import _label, write_frontier, write_pareto


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


def test_a_picture_of_nothing_is_one(tmp_path):
    write_pareto(tmp_path / "pareto.png", [])
    assert matplotlib.image.imread(tmp_path / "pareto.png").shape == (770, 990, 4)


def test_the_frontier_is_drawn_where_costs_are_known(tmp_path):
    file, settings = tmp_path / "frontier.png", {"cache": None}
    old = RUN | {"settings": settings}
    assert not write_frontier(file, [old, RUN | {"intervals": None}]) and not file.exists()
    assert write_frontier(file, [old, old | {"full_pass_equivalents": {"flops": 8.9, "timed": None}}])
    assert matplotlib.image.imread(file).shape == (880, 990, 4)
