"""Curves of what a training measures of itself on the way, drawn from its metrics.jsonl.

A number is called QUANTITY/WHERE, "guidance_gap_closed/g=3": what has one quantity shares a picture, side by side with
the others.
"""

import json
from collections.abc import Sequence
from pathlib import Path

from vidaccel.artefacts import atomic_path

FILE = "gates.png"


def draw_curves(metrics: Path, names: Sequence[str], picture: Path) -> None:
    """Write the PNG: each of these numbers against the step, in all lines of the file that have it."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # slow to import, and most trainings draw nothing
    from matplotlib.figure import Figure

    lines = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    quantities = list(dict.fromkeys(name.partition("/")[0] for name in names))
    figure = Figure(figsize=(5 * len(quantities), 3.5), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    for place, quantity in enumerate(quantities, start=1):
        axes = figure.add_subplot(1, len(quantities), place)
        axes.set(title=quantity.replace("_", " "), xlabel="step")
        for name in (name for name in names if name.partition("/")[0] == quantity):
            points = [(line["step"], line[name]) for line in lines if line.get(name) is not None]
            axes.plot(*zip(*points, strict=True), marker=".", label=name.partition("/")[2])
        axes.legend(fontsize=7)
    with atomic_path(picture) as temporary:
        figure.savefig(temporary, format="png")
