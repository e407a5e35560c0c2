"""The GPU benchmark at toy sizes: that every measurement runs, and that one which does not costs only its own row."""

import json
import time

import pytest

from studies.gpu import items, run, summary
from studies.gpu.measure import Rows, read_rows
from studies.gpu.targets import targets

# What a machine for tests need not have installed.
OPTIONAL = {"jvp-flash-attention", "int8"}
FUSED = "trimmed, fused"
EVERYTHING = f"{FUSED}, compiled"
SAMPLERS = ("8 full of 20", "4 full of 8")
WANTED = {
    "fp8": {"bf16", "fp8", "fp8, product alone", FUSED, f"{FUSED}, fp8"},
    "decode": {"stock tiles", "auto", "once", "tiled", "once, channels last", "whole"},
    "attention": {"native", "native, masked"},
    "predictor": {"squared error", "adversarial"},
    "distillation": {"rollout, adapters", "derivative, adapters"},
    "ops": {"eager", "compiled", "vidaccel", "torch forward, no tangent", "jvp-flash-attention"},
    "blocks": {
        *("eager", "trimmed", FUSED, f"{FUSED}, cudnn", "trimmed, compiled", EVERYTHING, f"{EVERYTHING}, fp8"),
    },
    "model": {
        *("eager", FUSED, f"{FUSED}, fp8", EVERYTHING, f"{EVERYTHING}, fp8", "50 steps with CFG, eager"),
        *(f"{name}, {variant}" for name in SAMPLERS for variant in ("eager", FUSED, f"{FUSED}, fp8", EVERYTHING)),
    },
    "training": {"central difference", "eager ops, attention_jvp", "trimmed, fused"},
    "offload": {"whole", "group", "fp8", "group, fp8"},
}


def check(rows: list[dict], item: str) -> None:
    assert rows
    assert [row for row in rows if "error" in row and row["variant"] not in OPTIONAL] == []
    assert all(row["relative_error"] < 1e-4 for row in rows if "relative_error" in row)
    variants = {row["variant"] for row in rows}
    assert variants >= WANTED[item], variants


@pytest.mark.parametrize("item", sorted(items.ITEMS.keys() - {"training"}))  # which is in the whole run below
def test_every_measurement_runs(item, tmp_path):
    items.ITEMS[item](Rows(tmp_path / "rows.jsonl", item), True)
    check(read_rows(tmp_path / "rows.jsonl"), item)


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
        row("full pass", "trimmed, fused", large, seconds=5.5),
        row("full pass", "trimmed, fused, fp8", large, seconds=5.0),
        row("linear", "bf16", small, seconds=3.0),
        row("linear", "fp8", small, seconds=2.0),
        row("composed samplers", FUSED, large, seconds_composed={"8 full of 20": 5.0}),
        row("decode", "stock tiles", large, seconds=12.0),
        row("decode", "once", large, seconds=3.0),
        row("end to end", "50 steps with CFG, eager", small, seconds=50.0),
        row("end to end", "4 full of 8, eager", small, seconds=2.0),
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
    assert lines["full pass of 60 tokens: fp8"] == (1.06, pytest.approx(1.1), True)
    assert lines["full pass of 6 tokens: fp8"] == (1.25, None, None)
    assert lines["linear layer of 6 tokens: fp8"] == (None, 1.5, None)
    assert lines["8 full of 20, eager, composed"] == (11.8, 12.5, True)
    assert lines["4 full of 8, eager, composed"] == (23.0, None, None)
    assert lines["8 full of 20, trimmed, fused, composed, with decoding"] == (16.0, 112.0 / 8.0, False)
    assert lines["8 full of 20, trimmed, fused, fp8, composed, with decoding"] == (17.0, None, None)
    assert lines["decoding 60 tokens: 9 s over what it takes"] == (1.0, 3.0, True)
    assert lines["decoding 60 tokens: faster than stock tiles"] == (None, 4.0, None)
    assert lines["4 full of 8, eager, from noise to frames at a tenth"] == (None, 25.0, None)
    assert "MISSED" in run.table({"rows": rows, "targets": targets(rows)})


def test_one_failure_is_one_row(tmp_path):
    rows = Rows(tmp_path / "rows.jsonl", "ops")
    assert rows.measure("division", "by zero", {}, lambda: 1 / 0) is None
    assert rows.measure("division", "by one", {}, lambda: 1 / 1) is not None
    first, second = read_rows(tmp_path / "rows.jsonl")
    assert first["error"] == "ZeroDivisionError: division by zero"
    assert second["seconds"] >= 0


def test_what_a_process_died_in_is_a_row_and_is_not_tried_again(tmp_path):
    def dies():
        raise SystemExit

    rows = Rows(tmp_path / "rows.jsonl", "ops")
    rows.measure("first", "", {}, lambda: None)
    with pytest.raises(SystemExit):
        rows.measure("second", "", {}, dies)
    assert ["error" in row for row in read_rows(rows.path)] == [False, True]
    rows = Rows(rows.path, "ops")
    first, *_ = read_rows(rows.path)
    assert rows.measure("first", "", {}, dies) == first["seconds"]
    assert rows.measure("second", "", {}, dies) is None
    assert rows.measure("third", "", {}, lambda: None) is not None
    assert [row["name"] for row in read_rows(rows.path)] == ["first", "second", "third"]


def test_an_item_that_dies_is_begun_again_while_it_gets_further(tmp_path, monkeypatch):
    path, begun = tmp_path / "rows.jsonl", iter([1, 2, 2, 3])

    def dies(item, path, dry, limit):
        Rows(path, item).add(f"measurement {next(begun)}", "", {}, error="died")
        return "exit 70"

    monkeypatch.setattr(run, "_run", dies)
    assert run._until_done("ops", path, False, time.monotonic() + 60) == "exit 70"
    assert len(read_rows(path)) == 2 and next(begun) == 3


def test_rows_are_json_that_any_reader_takes(tmp_path):
    rows = Rows(tmp_path / "rows.jsonl", "ops")
    rows.add("tuned", "", {}, milliseconds={"a": float("inf"), "b": 1.0}, relative_error=float("nan"))
    (row,) = read_rows(rows.path)
    assert row["milliseconds"] == {"a": None, "b": 1.0} and row["relative_error"] is None


@pytest.mark.parametrize("line", ["[gw3] [ 40%] {1} {0} \n", "{0} {1} [ 40%]\n"], ids=["xdist", "one process"])
def test_what_tests_came_to_is_read_also_where_they_were_stopped(line):
    ended = [("tests/a.py::x", "PASSED"), ("tests/a.py::y[two words]", "FAILED"), ("tests/a.py::z", "PASSED")]
    output = "".join(line.format(*pair) for pair in ended) + "FAILED tests/a.py::y[two words] - assert 0\n"
    assert run._test_results(output) == {"counts": {"passed": 2, "failed": 1}, "failed": ["tests/a.py::y[two words]"]}


def test_a_report_names_what_did_not_fit_in_the_time():
    *_, report = run.reports(["ops", "tests"], True, time.monotonic(), [])
    assert [row["error"] for row in report["rows"]] == ["skipped: the time was used up"] * 2
    assert json.loads(json.dumps(report)) == report
    assert "skipped" in run.table(report)


def test_a_report_is_gone_on_from(monkeypatch):
    def measures(item, path, dry, limit):
        rows = Rows(path, item)
        for name in ("kept", "failed", "new"):
            rows.measure(name, "", {}, lambda: None)

    monkeypatch.setattr(run, "_run", measures)
    kept = {"item": "ops", "name": "kept", "variant": "", "size": {}, "seconds": 3.0}
    failed = {"item": "ops", "name": "failed", "variant": "", "size": {}, "error": "died"}
    *_, report = run.reports(["ops"], True, time.monotonic() + 60, [kept, failed])
    rows = {row["name"]: row for row in report["rows"]}
    assert set(rows) == {"kept", "failed", "new"} and rows["kept"] == kept
    assert all(0 <= rows[name]["seconds"] < 1 for name in ("failed", "new"))


@pytest.mark.slow
def test_the_whole_run_writes_one_file(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["run", "--dry-run", "--output", str(tmp_path), "--items", "tests", "training"])
    assert run.main() == 0
    (file,) = tmp_path.iterdir()
    assert file.name.endswith("tests-training.json")  # beside a whole report, not in its place
    report = json.loads(file.read_text())
    assert report["dry_run"]
    assert report["rows"][0]["counts"]["passed"] >= 4
    assert not [row for row in report["rows"] if "error" in row]
    check([row for row in report["rows"] if row["item"] == "training"], "training")


def test_the_table_in_the_docs_is_that_of_the_reports():
    table = summary.markdown(2.5)
    assert "| 4 full of 8, fp8 | H200 |" in table and "| 50 steps of two passes | H100 | 1031 |" in table
    assert table in (run.ROOT / "docs" / "results.md").read_text(encoding="utf-8")


def test_a_video_is_its_passes_and_its_decoding():
    size = {"tokens": 60}
    rows = [
        row("composed samplers", "eager", size, seconds_composed={summary.BASELINE: 100.0}),
        row("full pass", "eager", size, peak_bytes=3 * 2**30),
        row("decode", "stock tiles", size, seconds=20.0, peak_bytes=2**30),
        row("composed samplers", FUSED, size, seconds_composed={"8 full of 20": 7.0}),
        row("full pass", FUSED, size, peak_bytes=3 * 2**30) | {"item": "fp8"},
        row("full pass", FUSED, size, peak_bytes=5 * 2**30),
        row("decode", "once", size, seconds=5.0, peak_bytes=4 * 2**30),
        row("decode", "once", {"tokens": 6}, seconds=1.0, peak_bytes=1),
    ]
    report = {"machine": {"device": "NVIDIA H100 80GB HBM3"}, "rows": rows}
    with_decoding = [*summary.videos(report, 3.0)]
    assert with_decoding[0] == ("50 steps of two passes", "H100", "100", "20", "120", "1.0", "3.0", "1.0", "0.100")
    assert with_decoding[1] == ("8 full of 20", "H100", "7", "5", "12", "10.0", "3.0", "4.0", "0.010")
    report["rows"] = [each for each in rows if each["name"] != "decode"]
    assert [*summary.videos(report, 3.0)][1] == ("8 full of 20", "H100", "7", "", "", "", "3.0", "", "")
