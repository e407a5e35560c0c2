"""The GPU benchmark at toy sizes: that every measurement runs, and that one which does not costs only its own row."""

import json
import time

import pytest

from benchmarks.gpu import items, run
from benchmarks.gpu.measure import Rows, read_rows

# What a machine for tests need not have installed.
OPTIONAL = {"jvp-flash-attention", "fp8"}


@pytest.mark.parametrize("item", items.ITEMS)
def test_every_measurement_runs(item, tmp_path):
    items.ITEMS[item](Rows(tmp_path / "rows.jsonl", item), True)
    rows = read_rows(tmp_path / "rows.jsonl")
    assert rows
    assert [row for row in rows if "error" in row and row["variant"] not in OPTIONAL] == []
    assert all(row["relative_error"] < 1e-4 for row in rows if "relative_error" in row)


def test_one_failure_is_one_row(tmp_path):
    rows = Rows(tmp_path / "rows.jsonl", "ops")
    assert rows.measure("division", "by zero", {}, lambda: 1 / 0) is None
    assert rows.measure("division", "by one", {}, lambda: 1 / 1) is not None
    first, second = read_rows(tmp_path / "rows.jsonl")
    assert first["error"] == "ZeroDivisionError: division by zero"
    assert second["seconds"] >= 0


def test_a_report_names_what_did_not_fit_in_the_time(tmp_path):
    report = run.measure(["ops", "tests"], True, time.monotonic())
    assert [row["error"] for row in report["rows"]] == ["skipped: the time was used up"] * 2
    assert json.loads(json.dumps(report)) == report
    assert "skipped" in run.table(report)


@pytest.mark.slow
def test_the_whole_run_writes_one_file(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["run", "--dry-run", "--output", str(tmp_path), "--items", "tests", "training"])
    assert run.main() == 0
    (file,) = tmp_path.iterdir()
    report = json.loads(file.read_text())
    assert report["dry_run"]
    assert report["rows"][0]["counts"]["passed"] >= 4
    assert not [row for row in report["rows"] if "error" in row]
