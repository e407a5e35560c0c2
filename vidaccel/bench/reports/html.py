"""What a benchmark leaves for people: report.html (one file that loads nothing) and the pictures in it."""

import base64
import html
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from vidaccel.artefacts import atomic_path
from vidaccel.bench.reports.contrasts import ABOUT, orders, tables_of
from vidaccel.bench.reports.frontier import frontier
from vidaccel.bench.reports.plots import pareto
from vidaccel.bench.reports.tables import COLUMNS, HEADINGS, MEANINGS, failures, title
from vidaccel.bench.reports.wording import in_words
from vidaccel.bench.results import dumped
from vidaccel.bench.rows import Rows
from vidaccel.data.video import contact_sheet

REPORT_FILE, PARETO_FILE, SHEET_FILE = "report.html", "pareto.png", "sheet.png"
FRONTIER_FILE = "frontier.png"
FIRST = (
    "total",
    "speedup, denoising",
    "speedup, end to end",
    "passes",
    "full passes",
    "latent",
    "own latent",
    "memory",
)
"""Columns that are seen without a click, in order."""
LOOKS = Path(__file__).parent
"""report.css and report.js, which the page has in it."""


def write_report(folder: Path, results: dict[str, Any], rows: Rows) -> None:
    """All of them, from results.json's content and the frames and clips that the rows kept."""
    pictures = pictures_of(results)
    for name, (light, _) in pictures.items():
        with atomic_path(folder / name) as temporary:
            temporary.write_bytes(light)
    shown = [(row, frames) for row in rows.rows if (frames := rows.frames(row)) is not None]
    if shown:
        contact_sheet([frames for _, frames in shown], folder / SHEET_FILE, labels=[row.name for row, _ in shown])
    clips = {row.id: clip for row in rows.rows if (clip := rows.clip(row)) is not None}
    with atomic_path(folder / REPORT_FILE) as temporary:
        temporary.write_text(report(results, folder, clips, pictures), encoding="utf-8")


def pictures_of(results: dict[str, Any]) -> dict[str, tuple[bytes, bytes]]:
    """PNGs on white and on black, by the name of the file that the first is written to."""
    drawn = {name: (draw(results), draw(results, dark=True)) for name, (draw, _) in PICTURES.items()}
    return {name: (light, dark) for name, (light, dark) in drawn.items() if light and dark}


def report(
    results: dict[str, Any],
    folder: Path,
    clips: dict[str, bytes] | None = None,
    pictures: dict[str, tuple[bytes, bytes]] | None = None,
) -> str:
    """The page, with the sheet of frames that lies in `folder` inside it, `clips`, mp4s by the ids of runs, and what
    `pictures_of` gives."""
    runs = results["runs"]
    parts = [
        "<h1>How fast, and at what cost</h1>",
        _about(results),
        *(part for _, of_size in groupby(runs, key=lambda run: run["size"]) for part in _size(results, list(of_size))),
        *(_picture(*pair, PICTURES[name][1]) for name, pair in (pictures or {}).items()),
        _clips(runs, clips or {}, folder / SHEET_FILE),
        *_contrasts(results, runs),
        *(part for _, of_size in groupby(runs, key=lambda run: run["size"]) for part in _scores(list(of_size))),
        f"<h2>How it was measured</h2><p><code>{html.escape(results['command'])}</code></p>"
        f"<p>{_environment(results['environment'])}</p>",
        "<details><summary>results.json, without the values of each prompt</summary>"
        f"<pre>{_data(results)}</pre></details>",
    ]
    head = (
        "<meta charset='utf-8'><meta name='viewport' content='width=device-width, initial-scale=1'>"
        f"<title>vidaccel benchmark</title><style>{_look('report.css')}</style>"
    )
    body = f"<main>{''.join(parts)}</main><script>{_look('report.js')}</script>"
    return f"<!doctype html><html lang='en'><head>{head}</head><body>{body}</body></html>"


def _look(name: str) -> str:
    return (LOOKS / name).read_text(encoding="utf-8")


def _data(results: dict[str, Any]) -> str:
    short = [{key: value for key, value in run.items() if key != "per_prompt"} for run in results["runs"]]
    return html.escape(dumped(results | {"runs": short}))


def _about(results: dict[str, Any]) -> str:
    base = next((run for run in results["runs"] if run["method"] == results["baseline"]), None)
    against = f"{in_words(base)} (<code>{html.escape(base['method'])}</code>)" if base else "the baseline"
    return (
        f"<p>Every row makes the same videos in another way. They are held against {against}: speedups are ratios "
        "to it within each round of timing, of the sampler alone (denoising) and of all that a user waits for (end to "
        "end). Passes are runs of the transformer, counted as they happened: those of the whole of it, and those in "
        "which something cheaper stood in.</p>"
    )


def _size(results: dict[str, Any], runs: Sequence[dict[str, Any]]) -> Iterator[str]:
    """What was found of videos of one size."""
    yield f"<h2>{html.escape(title(runs[0]))}</h2>"
    ran = [run for run in runs if run["passes"]]
    columns = [name for name, cell in COLUMNS.items() if any(cell(run) for run in ran)]
    others = [name for name in columns if name not in FIRST]
    yield _columns(ran, [name for name in FIRST if name in columns])
    if others:
        yield f"<details><summary>Seconds of each stage, memory and more</summary>{_columns(ran, others)}</details>"
    meanings = [(HEADINGS.get(name, name), MEANINGS[name]) for name in columns if name in MEANINGS]
    said = (f"<dt>{html.escape(name)}</dt><dd>{html.escape(text)}</dd>" for name, text in meanings)
    terms = "".join(said).replace("{baseline}", html.escape(results["baseline"]))
    yield f"<details><summary>What the columns mean</summary><dl>{terms}</dl></details>"
    yield _errors(runs)


def _columns(runs: Sequence[dict[str, Any]], names: Sequence[str]) -> str:
    return _table(["method", *names], [[run, *(COLUMNS[name](run) or "" for name in names)] for run in runs])


def _environment(environment: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in environment["versions"].items() if version)
    facts = [environment["device"], environment["cpu"], f"{environment['threads']} threads", environment["platform"]]
    return html.escape("; ".join([*facts, versions, f"commit {environment['commit']}"]))


def _table(headings: Sequence[str], lines: Sequence[Sequence[str | dict[str, Any]]]) -> str:
    """Sorted by a click on a heading; a run as a cell is its method."""
    head = "".join(
        f"<th scope='col'><button>{html.escape(HEADINGS.get(each, each))}</button></th>" for each in headings
    )
    body = "".join("<tr>" + "".join(f"<td>{_cell(cell)}</td>" for cell in line) + "</tr>" for line in lines)
    return f"<div class='wide'><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"


def _cell(cell: str | dict[str, Any]) -> str:
    return html.escape(cell) if isinstance(cell, str) else _method(cell)


def _method(run: dict[str, Any]) -> str:
    return f"<span>{html.escape(in_words(run))}</span> <code>{html.escape(run['method'])}</code>"


def _errors(runs: Sequence[dict[str, Any]]) -> str:
    """Rows that could not run, and why."""
    lines = [
        f"<li>{html.escape(why)}: {', '.join(f'<code>{html.escape(each)}</code>' for each in methods)}</li>"
        for why, methods in failures(runs).items()
    ]
    return f"<h3>What could not run</h3><ul>{''.join(lines)}</ul>" if lines else ""


def _contrasts(results: dict[str, Any], runs: Sequence[dict[str, Any]]) -> Iterator[str]:
    """What the rows were held against, and which were better or worse."""
    by_method = {run["method"]: run for run in runs}
    found = list(tables_of(results, runs))
    if found:
        yield f"<h2>Which is better</h2><p>{html.escape(ABOUT)}</p>"
        yield "<ul>" + "".join(f"<li>{html.escape(each)}</li>" for each in orders(results, runs)) + "</ul>"
        for heading, headings, lines in found:
            named = [[by_method.get(line[0], line[0]), *line[1:]] for line in lines]
            yield f"<h3>{html.escape(heading)}</h3>" + _table(headings, named)


def _scores(runs: Sequence[dict[str, Any]]) -> Iterator[str]:
    """Every score with its interval."""
    scored = [run for run in runs if run["intervals"]]
    if scored:
        names = list(dict.fromkeys(name for run in scored for name in run["intervals"]))
        lines = [[run, *(_with_interval(run, name) for name in names)] for run in scored]
        headings = ["method", *(name.replace("own_fidelity.", "own full run: ").replace("_", " ") for name in names)]
        yield "<h2>Scores, with 95 % intervals over meanings</h2>" + _table(headings, lines)


def _with_interval(run: dict[str, Any], name: str) -> str:
    if name not in run["intervals"]:
        return ""
    group, _, key = name.rpartition(".")
    where = run[group] if group else run if name in ("semantic", "quality", "total") else run["dimensions"]
    if not where or key not in where:  # VBench has no mean where it failed on one video
        return ""
    low, high = run["intervals"][name]
    return f"{where[key]:.3g} [{low:.3g}, {high:.3g}]"


PICTURES = {
    FRONTIER_FILE: (frontier, "Quality for so many full passes"),
    PARETO_FILE: (pareto, "Speed against quality, every row"),
}
"""What draws it, and its heading."""


def _picture(light: bytes, dark: bytes, text: str) -> str:
    """In the colours that the reader's system has."""
    on_white, on_black = (f"data:image/png;base64,{base64.b64encode(each).decode()}" for each in (light, dark))
    source = f"<source media='(prefers-color-scheme: dark)' srcset='{on_black}'>"
    return f"<h2>{text}</h2><p><picture>{source}<img alt='{html.escape(text)}' src='{on_white}'></picture></p>"


def _clips(runs: Sequence[dict[str, Any]], clips: dict[str, bytes], sheet: Path) -> str:
    """The rows' videos of one prompt from the same noise, to be played together; of old folders their frames."""
    shown = [(run, clips[run["id"]]) for run in runs if run["id"] in clips]
    frames = ""
    if sheet.exists():
        data = base64.b64encode(sheet.read_bytes()).decode()
        frames = f"<details{'' if shown else ' open'}><summary>Frame by frame</summary>"
        frames += f"<p><img alt='frames of each row' src='data:image/png;base64,{data}'></p></details>"
    if not shown and not frames:
        return ""
    videos = "".join(
        f"<figure><video muted loop playsinline src='data:video/mp4;base64,{base64.b64encode(clip).decode()}'>"
        f"</video><figcaption>{_method(run)}{_speed(run)}</figcaption></figure>"
        for run, clip in shown
    )
    play = "<p><button id='together'>Play all from the start</button> A click on one stops it.</p>" if shown else ""
    return f"<h2>The same prompt from the same noise</h2>{play}<div class='clips'>{videos}</div>{frames}"


def _speed(run: dict[str, Any]) -> str:
    speeds = {"denoising": run["speedup"]["measured"], "end to end": run["speedup"].get("end_to_end")}
    said = ", ".join(f"{name} {value:.1f}x" for name, value in speeds.items() if value)
    return f"<br>{said}" if said else ""
