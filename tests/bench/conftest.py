"""What the benchmark's tests share."""

import json
from pathlib import Path

import pytest
from jsonschema import Draft202012Validator

import vidaccel.bench


@pytest.fixture(scope="session")
def schema() -> Draft202012Validator:
    """The shipped schema of results.json."""
    file = Path(vidaccel.bench.__file__).parent / "results.schema.json"
    content = json.loads(file.read_text())
    Draft202012Validator.check_schema(content)
    return Draft202012Validator(content)


@pytest.fixture
def no_report(monkeypatch) -> None:
    """The pages and pictures of a report are not made."""
    monkeypatch.setattr("vidaccel.bench.reports.html.write_report", lambda *_: None)
