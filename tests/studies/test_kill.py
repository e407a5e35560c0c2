"""One kill of one stage, and what is held against each other afterwards."""

import json

import pytest
from typer.testing import CliRunner

from studies.kill import study


def test_a_killed_collection_ends_with_the_same_bytes(tmp_path):
    words = ["--stage", "collect", "--processes", "1", "--kills", "1", "-o", str(tmp_path)]
    result = CliRunner().invoke(study.app, words)
    assert result.exit_code == 0, result.output
    (found,) = json.loads((tmp_path / "kill.json").read_text())
    assert found["kills"] == 1 and found["ended"] >= 1 and not found["differing"] and not found["faults"]


@pytest.mark.parametrize(
    ("name", "before", "after", "same"),
    [
        ("a.json", '{"loss": 1, "seconds": 2}', '{"seconds": 3, "loss": 1}', True),
        ("a.jsonl", '{"loss": 1, "seconds": 2}\n', '{"loss": 2, "seconds": 2}\n', False),
        ("a.tar", "abc", "abd", False),
        ("a.tar", "abc", None, False),
        (".lock", "held", None, True),
    ],
)
def test_files_are_compared_but_for_the_clock(tmp_path, name, before, after, same):
    for folder, text in (("one", before), ("two", after)):
        (tmp_path / folder).mkdir()
        if text is not None:
            (tmp_path / folder / name).write_text(text)
    assert study.differing(tmp_path / "one", tmp_path / "two") == ([] if same else [name])
