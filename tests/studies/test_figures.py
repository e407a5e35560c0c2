"""The figures in README.md and docs/ are those of the results files."""

import json
from pathlib import Path

import pytest
from jsonschema import Draft202012Validator

import vidaccel.bench
from studies.figures import HEADLINE, NO_PAIRS, RESULTS, blocks, figures, filled, pages
from tests.bench.reports.test_contrasts import contrasted
from tests.bench.test_results import RUN, results

PAGES = {page.name: page.read_text(encoding="utf-8") for page in pages()}


@pytest.mark.parametrize("page", pages(), ids=lambda page: page.name)
def test_a_page_is_what_make_figures_writes(page):
    text = PAGES[page.name]
    assert filled(text, RESULTS, page.parent) == text, "run make figures"


def test_every_table_is_shown():
    names = [name for text in PAGES.values() for name in blocks(text)]
    parts = {"headline", "sharpness", "sprites.pairs", "caching.pairs"}
    assert {"sprites", "caching"} <= set(names) <= {"sprites", "caching"} | parts


def test_the_headline_is_rows_of_the_full_table():
    lines = figures("headline", RESULTS, "x").splitlines()
    assert "([all of it](x/sprites.json))" in lines[0]
    assert lines[2] == "| method | passes | seconds | speedup, denoising | end to end | total | to its own full run |"
    full = [line.split("|") for line in figures("sprites", RESULTS, "x").splitlines()]
    without = [cells[:6] + [cells[9], *cells[11:]] for cells in full if len(cells) == 13]  # what takes room
    rows = [line for line in lines[4:] if line.startswith("|")]
    assert {tuple(line.split("|")) for line in rows} < set(map(tuple, without))
    assert tuple(line.split("|")[1].strip() for line in rows) == HEADLINE


def test_links_are_those_of_the_page(tmp_path):
    text = "<!-- figures: sprites -->\n<!-- end of figures -->\n"
    folder = RESULTS.parents[1]
    assert "](studies/results/sprites.png)" in filled(text, RESULTS, folder)
    assert "](../studies/results/sprites.json)" in filled(text, RESULTS, folder / "docs")


def test_pages_are_those_with_figures(tmp_path):
    (tmp_path / "docs").mkdir()
    for name, text in (("README.md", "<!-- figures: a -->\n<!-- end of figures -->"), ("docs/faq.md", "none")):
        (tmp_path / name).write_text(text)
    assert pages(tmp_path) == [tmp_path / "README.md"]


def test_every_results_file_has_its_form():
    schema = json.loads((Path(vidaccel.bench.__file__).parent / "results.schema.json").read_text())
    for file in RESULTS.glob("*.json"):
        Draft202012Validator(schema).validate(json.loads(file.read_text(encoding="utf-8")))


@pytest.fixture
def folder(tmp_path) -> Path:
    found = results() | {"command": "vidaccel benchmark --speedup"}
    found["runs"][0]["speedup"]["end_to_end"] = 4.4
    speedup = {"measured": 4.0, "ideal": 5.0, "measured_over_ideal": 0.8}
    cache = {"method": "tea", "total": 90.0, "speedup": speedup, "passes": {"full": 9, "predicted": 0, "skipped": 1}}
    found["runs"].append(RUN | cache | {"intervals": {"total": [89.0, 91.0]}, "fidelity": None, "cache_bytes": 0})
    found["runs"] += [RUN | {"method": name, "passes": None, "error": "it cannot"} for name in ("sea", "lake")]
    found["runs"][0]["settings"] = found["runs"][1]["settings"] = {"cache": None}
    (tmp_path / "mine.json").write_text(json.dumps(found))
    return tmp_path


def test_figures(folder):
    text = figures("mine", folder, "results")
    assert "`vidaccel benchmark --speedup` on " in text and "Speedups are relative to cfg-50" in text
    assert (
        "| predictor-8-of-20 | 8 + 12 | 24.6 | 11.80x | 4.40x | 11.90x | 57.3 kB | 78.8 [77.9, 79.6] | 0.120 |" in text
    )
    assert "| tea | 9 + 1 | 24.6 | 4.00x |  | 5.00x |  | 90.0 [89.0, 91.0] |  |" in text
    assert "better" not in text and " than " not in text  # nothing was compared in pairs
    assert "- sea, lake: it cannot" in text


def test_orders_are_those_of_the_verdicts(folder):
    assert figures("mine.pairs", folder, "results") == NO_PAIRS + "\n"
    (folder / "mine.json").write_text(json.dumps(contrasted()))
    order = "Against the same model in as many full passes, by FLOPs, total: better: six than student-7; not told apart"
    assert f"- {order}" in figures("mine", folder, "results")
    assert "| six | student-7 | +0.861 [+0.361, +1.36] better |" in figures("mine.pairs", folder, "results")


def test_without_results_it_says_so(tmp_path):
    assert "there is no `studies/results/mine.json`" in figures("mine", tmp_path, "results")


def test_only_what_is_between_the_comment_lines_is_written(tmp_path):
    end = "<!-- end of figures -->\n"
    text = f"before\n<!-- figures: a -->\nold\n{end}between\n<!-- figures: b -->\n{end}"
    new = filled(text, tmp_path, tmp_path)
    assert new.startswith("before\n<!-- figures: a -->\n**Nothing") and "old" not in new
    assert "<!-- end of figures -->\nbetween\n<!-- figures: b -->\n**Nothing" in new
    assert filled(new, tmp_path, tmp_path) == new
