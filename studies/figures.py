"""The figures in README.md and docs/, written from studies/results/*.json: no number there is typed by hand.

    make figures

Between a line `<!-- figures: NAME -->` and the next `<!-- end of figures -->` stands what studies/results/NAME.json
says, a results.json of `vidaccel benchmark`; `headline` is a few rows of sprites.json, NAME.pairs which of its rows are
better than which, and `sharpness` how many prompts each score needs. A test compares the two. Orders between methods
stand in such blocks alone.
"""

import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from studies.sharpness import table
from vidaccel.artefacts import atomic_path
from vidaccel.bench.reports.contrasts import ABOUT, orders, tables_of
from vidaccel.bench.reports.frontier import frontier
from vidaccel.bench.reports.plots import pareto
from vidaccel.bench.reports.tables import COLUMNS as MEASURED
from vidaccel.bench.reports.tables import failures
from vidaccel.bench.results import completed

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "studies" / "results"
BLOCK = re.compile(r"(<!-- figures: (\S+) -->\n).*?(<!-- end of figures -->)", re.DOTALL)
HEADLINE = (
    "cfg-50",
    "student-8",
    "cache-dit-taylor-at-4",
    "reuse-4-of-8-searched",
    "scalars-4-of-8",
    "predictor-4-of-8-searched",
    "predictor-3-of-8-searched",
    "scalars-3-of-8-decoder",
)
"""Rows of sprites.json: the baseline, a student, ways to leave out half of its steps, and fewer with the decoder."""
SHARPNESS = {
    "sprites": ("student-20", "student-4", "student-3", "student-2"),
    "chain/scores": ("teacher-50", "student-8", "student-4", "student-3"),
}
"""Rows that scores are to tell apart, the first from each other, by their file."""
NO_PAIRS = "This file was measured before rows were compared in pairs: it orders nothing."
MISSING = """\
**Nothing has been measured yet**: there is no `studies/results/{name}.json`, and so there is no figure here.
"""


def main() -> None:
    """Rewrite the pages and draw the pictures that they show beside the results."""
    for page in pages():
        text = page.read_text(encoding="utf-8")
        for name in blocks(text):
            file = RESULTS / f"{name}.json"
            if file.exists():
                results = json.loads(file.read_text(encoding="utf-8"))
                drawn = {f"{name}.png": pareto(results), f"{name}-frontier.png": frontier(results)}
                for path, picture in drawn.items():
                    if picture is not None:
                        (RESULTS / path).write_bytes(picture)
        with atomic_path(page) as temporary:
            temporary.write_text(filled(text, RESULTS, page.parent), encoding="utf-8")


def pages(root: Path = ROOT) -> list[Path]:
    """README.md and the pages of docs/ that have figures."""
    found = [root / "README.md", *sorted((root / "docs").glob("*.md"))]
    return [page for page in found if blocks(page.read_text(encoding="utf-8"))]


def blocks(text: str) -> list[str]:
    """Names of the figures in a page."""
    return [name for _, name, _ in BLOCK.findall(text)]


def filled(text: str, results: Path, folder: Path) -> str:
    """The text of a page in `folder`, with its figures as the files in `results` have them."""
    place = os.path.relpath(results, folder)
    return BLOCK.sub(lambda block: block[1] + figures(block[2], results, place) + block[3], text)


def figures(name: str, results: Path, place: str) -> str:
    """Markdown about one results file, or that there is none.

    Args:
        name: of the block.
        results: folder of the files.
        place: the same folder, as links of the page name it.
    """
    if name == "sharpness":
        return "\n\n".join(_sharpness(results)) + "\n"
    source, _, part = ("sprites", "", name) if name == "headline" else name.partition(".")
    file = results / f"{source}.json"
    if not file.exists():
        return MISSING.format(name=source)
    found = completed(json.loads(file.read_text(encoding="utf-8")))
    ran = [run for run in found["runs"] if run["passes"]]
    about = (
        f"`{found['command']}` on {_machine(found['environment'])} ([all of it]({place}/{source}.json)). "
        f"Speedups are relative to {found['baseline']}."
    )
    if part == "pairs":
        return "\n\n".join(_pairs(found, ran)) + "\n"
    rows = _headline(found, ran, place) if name == "headline" else _all(found, ran, f"{place}/{source}.png")
    parts = [about, *rows]
    return "\n\n".join(parts) + "\n"


def _headline(found: dict[str, Any], runs: Sequence[dict[str, Any]], place: str) -> Iterator[str]:
    by_name = {run["method"]: run for run in runs}
    left_out = ("by FLOPs", "full passes", "cache", "latent error")
    columns = {name: cell for name, cell in COLUMNS.items() if name not in left_out}
    yield _table([by_name[name] for name in HEADLINE], columns)
    if frontier(found) is not None:
        yield f"![Quality for so many full passes]({place}/sprites-frontier.png)"


def _all(found: dict[str, Any], ran: Sequence[dict[str, Any]], picture: str) -> Iterator[str]:
    unknown = {name for name in ADDED if not any(COLUMNS[name](run) for run in ran)}
    yield _table(ran, {name: cell for name, cell in COLUMNS.items() if name not in unknown})
    if said := list(orders(found, ran)):
        yield "\n".join(f"- {each}" for each in said)
    yield f"![Speed against quality]({picture})"
    if frontier(found) is not None:
        yield f"![Quality for so many full passes]({picture.removesuffix('.png')}-frontier.png)"
    yield from _errors(found["runs"])


def _sharpness(results: Path) -> Iterator[str]:
    for source, (row, *others) in SHARPNESS.items():
        found = json.loads((results / f"{source}.json").read_text(encoding="utf-8"))
        prompts = found["prompts"] if isinstance(found["prompts"], int) else len(found["prompts"])
        command = f"python -m studies.sharpness studies/results/{source}.json {' '.join((row, *others))}"
        yield f"`{command}`: {row} on {prompts:,} prompts,"
        yield _lines(table(found, row, others))


def _pairs(found: dict[str, Any], ran: Sequence[dict[str, Any]]) -> Iterator[str]:
    tables = list(tables_of(found, ran))
    if not tables:
        yield NO_PAIRS
        return
    yield ABOUT
    for title, headings, lines in tables:
        yield f"{title}:"
        yield _lines([headings, ["---", "---", *["--:"] * (len(headings) - 2)], *lines])


def _machine(environment: dict[str, Any]) -> str:
    threads = f"{environment['threads']} thread{'s' * (environment['threads'] > 1)}"
    where = environment["cpu"] if environment["device"] == "cpu" else environment["device"]
    return f"{where}, {threads}, torch {environment['versions']['torch']}"


def _table(runs: Iterable[dict[str, Any]], columns: dict[str, Callable[[dict[str, Any]], str | None]]) -> str:
    lines = [["method", *columns], ["---", *["--:"] * len(columns)]]
    lines += [[run["method"], *(cell(run) or "" for cell in columns.values())] for run in runs]
    return _lines(lines)


def _lines(cells: Iterable[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(line) + " |" for line in cells)


def _total(run: dict[str, Any]) -> str | None:
    if run["total"] is None:
        return None
    low, high = run["intervals"]["total"]
    return f"{run['total']:.1f} [{low:.1f}, {high:.1f}]"


COLUMNS: dict[str, Callable[[dict[str, Any]], str | None]] = {
    "passes": MEASURED["passes"],
    "seconds": MEASURED["seconds, denoising"],
    "speedup, denoising": MEASURED["speedup, denoising"],
    "end to end": MEASURED["speedup, end to end"],
    "by FLOPs": MEASURED["by FLOPs"],
    "full passes": MEASURED["full passes"],
    "cache": MEASURED["cache"],
    "total": _total,
    "latent error": MEASURED["latent"],
    "to its own full run": MEASURED["own latent"],
}
"""Of a table, each a cell of a run."""
ADDED = ("full passes", "to its own full run")
"""Those that older results files know nothing of."""


def _errors(runs: Sequence[dict[str, Any]]) -> list[str]:
    lines = [f"- {', '.join(methods)}: {why}" for why, methods in failures(runs).items()]
    return ["What could not run:\n\n" + "\n".join(lines)] if lines else []


if __name__ == "__main__":
    main()
