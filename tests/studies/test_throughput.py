import json

import pytest
from typer.testing import CliRunner

from studies import throughput
from studies.throughput import rate_of


def test_the_rate_is_of_the_second_half(tmp_path):
    file = tmp_path / "metrics.jsonl"
    seconds = [10.0, 11.0, 12.0, 13.0, 13.5, 14.0, 14.5, 15.0]  # preparing, then a step a second, then two
    lines = [{"step": i + 1, "seconds": s} for i, s in enumerate(seconds)]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert rate_of(file) == pytest.approx(2.0)


def test_it_measures_all_stages_on_a_cpu(tmp_path, monkeypatch):
    monkeypatch.setattr(throughput, "LISTS", throughput.LISTS[:1])  # whose arithmetic alone is a third of it
    words = ["--batch", "1", "--steps", "4", "--scenes", "2", "--device", "cpu", "-o", str(tmp_path / "rates.json")]
    result = CliRunner().invoke(throughput.app, words)
    assert result.exit_code == 0, result.output
    rows = json.loads((tmp_path / "rates.json").read_text())["rows"]
    assert [(row["stage"], row["way"], row["mfu"]) for row in rows] == [
        ("teacher", "eager", None),
        ("CFG distillation", "eager", None),
        ("mean velocity", "eager", None),
        ("forecaster, served", "eager", None),
    ]
    assert all(row["samples_per_second"] > 0 for row in rows)


def test_mfu_is_the_arithmetic_of_the_samples_over_the_peak(monkeypatch, tmp_path):
    monkeypatch.setattr(throughput.torch.cuda, "get_device_name", lambda: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(throughput, "resolve_device", lambda _: throughput.torch.device("cuda"))
    monkeypatch.setattr(throughput, "rate_of", lambda _: 10.0)
    stage = throughput.Stage("a stage", lambda train, folder: folder, flops=989e9)
    rows = list(throughput.measured([stage], batch=4, steps=4, device="cuda"))
    assert [(row.way, row.samples_per_second) for row in rows] == [("eager", 40), ("one CUDA graph a step", 40)]
    assert rows[0].mfu == pytest.approx(0.04) and "4.0% of the card's bf16 peak" in throughput.line(rows[0])
