"""What a benchmark leaves for people: report.html (one file that loads nothing) and the pictures in it."""

import base64
import html
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from vidaccel.artefacts import atomic_path
from vidaccel.bench.reports.contrasts import ABOUT, orders, tables_of
from vidaccel.bench.reports.plots import write_frontier, write_pareto
from vidaccel.bench.reports.tables import COLUMNS, failures, title
from vidaccel.bench.results import dumped
from vidaccel.bench.rows import Rows
from vidaccel.data.video import contact_sheet

REPORT_FILE, PARETO_FILE, SHEET_FILE = "report.html", "pareto.png", "sheet.png"
FRONTIER_FILE = "frontier.png"
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2em auto; max-width: 75em; padding: 0 1em; color: #222 }
table { border-collapse: collapse; margin: 1em 0 } th, td { padding: .15em .7em; text-align: right }
th { border-bottom: 1px solid #888 } th:first-child, td:first-child { text-align: left }
tr:nth-child(even) { background: #f5f5f5 } img { max-width: 100% } code { font-size: 13px }
"""


def write_report(folder: Path, results: dict[str, Any], rows: Rows) -> None:
    """All of them, from results.json's content and the frames that the rows kept."""
    write_pareto(folder / PARETO_FILE, results["runs"])
    write_frontier(folder / FRONTIER_FILE, results["runs"])
    shown = [(row, frames) for row in rows.rows if (frames := rows.frames(row)) is not None]
    if shown:
        contact_sheet([frames for _, frames in shown], folder / SHEET_FILE, labels=[row.name for row, _ in shown])
    with atomic_path(folder / REPORT_FILE) as temporary:
        temporary.write_text(report(results, folder), encoding="utf-8")


def report(results: dict[str, Any], folder: Path) -> str:
    """The page, with the pictures that lie in `folder` inside it."""
    runs = results["runs"]
    parts = [
        "<h1>vidaccel benchmark</h1>",
        f"<p><code>{html.escape(results['command'])}</code></p><p>{_environment(results['environment'])}</p>",
        f"<p>Speedups are relative to {html.escape(results['baseline'])}, within each round. Ideal is by FLOPs, and "
        "passes are counted as they happened: full ones, and those in which a predictor or a cache took part.</p>",
        *(part for _, of_size in groupby(runs, key=lambda run: run["size"]) for part in _size(results, list(of_size))),
        _picture(folder / PARETO_FILE),
        _picture(folder / FRONTIER_FILE),
        "<h2>The same prompt and seed, a row a method</h2>",
        _picture(folder / SHEET_FILE),
        f"<details><summary>results.json</summary><pre>{html.escape(dumped(results))}</pre></details>",
    ]
    head = f"<meta charset='utf-8'><title>vidaccel benchmark</title><style>{STYLE}</style>"
    return f"<!doctype html><html lang='en'><head>{head}</head><body>{''.join(parts)}</body></html>"


def _size(results: dict[str, Any], runs: Sequence[dict[str, Any]]) -> Iterator[str]:
    """What was found of videos of one size."""
    yield f"<h2>{html.escape(title(runs[0]))}</h2>"
    columns = {name: cell for name, cell in COLUMNS.items() if any(run["passes"] and cell(run) for run in runs)}
    lines = [[run["method"], *(cell(run) or "" for cell in columns.values())] for run in runs if run["passes"]]
    yield _table(["method", *columns], lines)
    yield from (_errors(runs), *_contrasts(results, runs), _scores(runs))


def _environment(environment: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in environment["versions"].items() if version)
    facts = [environment["device"], environment["cpu"], f"{environment['threads']} threads", environment["platform"]]
    return html.escape("; ".join([*facts, versions, f"commit {environment['commit']}"]))


def _table(headings: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{html.escape(heading)}</th>" for heading in headings)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in line) + "</tr>" for line in lines)
    return f"<table><tr>{head}</tr>{body}</table>"


def _errors(runs: Sequence[dict[str, Any]]) -> str:
    """Rows that could not run, and why."""
    lines = [[", ".join(methods), why] for why, methods in failures(runs).items()]
    return "<h3>What could not run</h3>" + _table(["methods", "why"], lines) if lines else ""


def _contrasts(results: dict[str, Any], runs: Sequence[dict[str, Any]]) -> Iterator[str]:
    """What the rows were held against, and which were better or worse."""
    found = list(tables_of(results, runs))
    if found:
        yield f"<h3>Which is better</h3><p>{html.escape(ABOUT)}</p>"
        yield "<ul>" + "".join(f"<li>{html.escape(each)}</li>" for each in orders(results, runs)) + "</ul>"
        for heading, headings, lines in found:
            yield f"<h4>{html.escape(heading)}</h4>" + _table(headings, lines)


def _scores(runs: Sequence[dict[str, Any]]) -> str:
    """Every score with its interval."""
    scored = [run for run in runs if run["intervals"]]
    if not scored:
        return ""
    names = list(dict.fromkeys(name for run in scored for name in run["intervals"]))
    lines = [[run["method"], *(_with_interval(run, name) for name in names)] for run in scored]
    return "<h3>Scores, with 95 % intervals over meanings</h3>" + _table(["method", *names], lines)


def _with_interval(run: dict[str, Any], name: str) -> str:
    if name not in run["intervals"]:
        return ""
    group, _, key = name.rpartition(".")
    where = run[group] if group else run if name in ("semantic", "quality", "total") else run["dimensions"]
    low, high = run["intervals"][name]
    return f"{where[key]:.3g} [{low:.3g}, {high:.3g}]"


def _picture(path: Path) -> str:
    if not path.exists():
        return ""
    data = base64.b64encode(path.read_bytes()).decode()
    return f"<p><img alt='{path.stem}' src='data:image/png;base64,{data}'></p>"
