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


def test_it_measures_both_stages_on_a_cpu(tmp_path):
    words = ["--batch", "1", "--steps", "4", "--scenes", "2", "--device", "cpu", "-o", str(tmp_path / "rates.json")]
    result = CliRunner().invoke(throughput.app, words)
    assert result.exit_code == 0, result.output
    rows = json.loads((tmp_path / "rates.json").read_text())["rows"]
    assert [(row["stage"], row["way"], row["mfu"]) for row in rows] == [
        ("CFG distillation", "eager", None),
        ("mean velocity", "eager", None),
    ]
    assert all(row["samples_per_second"] > 0 for row in rows)
