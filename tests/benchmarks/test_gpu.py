"""The GPU benchmark at toy sizes: that every measurement runs, and that one which does not costs only its own row."""

import json
import time

import pytest

from benchmarks.gpu import items, run
from benchmarks.gpu.measure import Rows, read_rows
from benchmarks.gpu.targets import targets

# What a machine for tests need not have installed.
OPTIONAL = {"jvp-flash-attention", "fp8", "int8"}
EVERYTHING = "trimmed, fused, compiled"
WANTED = {
    "ops": {"eager", "compiled", "vidaccel", "two products", "torch forward, no tangent", "jvp-flash-attention"},
    "blocks": {"eager", "trimmed", "trimmed, fused", "trimmed, fused, cudnn", "trimmed, compiled", EVERYTHING},
    "model": {"eager", "trimmed", EVERYTHING, "50 steps with CFG, eager", "8 full of 20, eager", "4 full of 8, eager"},
    "training": {"central difference", "eager ops, attention_jvp", "trimmed, fused"},
}


@pytest.mark.parametrize("item", items.ITEMS)
def test_every_measurement_runs(item, tmp_path):
    items.ITEMS[item](Rows(tmp_path / "rows.jsonl", item), True)
    rows = read_rows(tmp_path / "rows.jsonl")
    assert rows
    assert [row for row in rows if "error" in row and row["variant"] not in OPTIONAL] == []
    assert all(row["relative_error"] < 1e-4 for row in rows if "relative_error" in row)
    variants = {row["variant"] for row in rows}
    assert variants >= WANTED[item], variants


def row(name, variant, size, **figures):
    item = "model" if "tokens" in size else "ops"
    return {"item": item, "name": name, "variant": variant, "size": size} | figures


def test_targets_are_worked_out_from_the_rows():
    small, large, N = {"tokens": 6}, {"tokens": 60}, {"N": 60}
    names = ("transformer_blocks", "single_transformer_blocks")
    block = {"eager": 4.0, "trimmed": 3.0, "trimmed, fused": 2.0, "trimmed, fused, compiled": 1.5}
    rows = [
        row("adaln", "vidaccel", N, seconds=1.0, of_copy=0.9),
        row("adaln", "compiled", N, seconds=1.1),
        row("adaln", "eager", N, error="out of memory"),
        row("attention_jvp", "vidaccel", N, seconds=5.0),
        row("attention_jvp", "torch forward, no tangent", N, seconds=1.0),
        *(row(name, variant, small, seconds=seconds) for name in names for variant, seconds in block.items()),
        row(
            "composed samplers",
            "eager",
            large,
            seconds_composed={"50 steps with CFG, eager": 100.0, "8 full of 20": 8.0},
        ),
        row("sampler", "50 steps with CFG, eager", small, seconds=50.0),
        row("sampler", "4 full of 8, eager", small, seconds=2.0),
    ]
    lines = {line["target"]: (line["wanted"], line["got"], line["met"]) for line in targets(rows)}
    assert lines["adaln: share of copy bandwidth"] == (0.85, 0.9, True)
    assert lines["adaln: faster than compiled"] == (1.15, 1.1, False)
    assert lines["adaln: faster than eager"] == (1.0, None, None)
    attention = lines["attention_jvp: share of the rate of torch's forward attention"]
    assert attention == (0.6, pytest.approx(0.6), True)  # five times its time for three times its arithmetic
    assert lines["block: trimmed text alone"] == (None, pytest.approx(4 / 3), None)
    assert lines["block: fused ops alone"] == (1.10, pytest.approx(1.5), True)
    assert lines["block: compile on top"] == (1.25, pytest.approx(2.0), True)
    assert lines["block: fp8 on top of that"] == (1.20, None, None)
    assert lines["8 full of 20, eager, composed"] == (11.8, 12.5, True)
    assert lines["4 full of 8, eager, composed"] == (23.0, None, None)
    assert lines["4 full of 8, eager, run at a tenth"] == (None, 25.0, None)
    assert "MISSED" in run.table({"rows": rows, "targets": targets(rows)})


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
