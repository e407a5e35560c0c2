"""Bad input of every kind, the same at each run: a command ends with 0, 1 or 2, and never in a traceback."""

import json
import os
import shutil
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from vidaccel.cli.main import app
from vidaccel.config.loader import SCHEMAS

EARLIER = Path(__file__).parents[1] / "artefacts_9cb9f0f"
FIXED = {
    "deadline": None,
    "derandomize": True,
    "database": None,
    "suppress_health_check": list(HealthCheck),
}
MODELS = {"generate": "model", "collect-features": "model", "distill": "teacher", "train-predictor": "student"}
"""The setting of each command that names its model."""


def ends(words: list[str]) -> int:
    """The command's exit status, after checks that it ended as a command should."""
    result = CliRunner().invoke(app, words)
    said = result.stdout + result.stderr
    assert result.exception is None or isinstance(result.exception, SystemExit), (words, result.exception)
    assert "Traceback" not in said, (words, said)
    assert result.exit_code in (0, 1, 2), (words, said)
    if result.exit_code == 2 and "Usage:" not in said:
        assert "error: " in result.stderr and "hint: " in result.stderr, (words, said)
    return result.exit_code


@pytest.fixture(scope="module", autouse=True)
def place(tmp_path_factory):
    """A copy of small models, features and resume state of an earlier version, and paths that are none. The run.json
    there vouch for nothing, so that damage is found where it is used."""
    before, folder = Path.cwd(), shutil.copytree(EARLIER, tmp_path_factory.mktemp("fuzz") / "place")
    for run in folder.rglob("run.json"):
        run.write_text(json.dumps(json.loads(run.read_text()) | {"files": {}}))
    (folder / "noise.yaml").write_bytes(bytes(range(256)))
    (folder / "loop").symlink_to("loop")
    os.chdir(folder)
    yield folder
    os.chdir(before)


PATHS = ["noise.yaml", "loop", "nowhere/a", "clips", "/proc/self/mem", "/dev/null", "x" * 300, "a:b", "features", "."]
VALUES = st.one_of(
    st.sampled_from(PATHS),
    st.sampled_from(
        ["null", "nan", "inf", "-1", "0", "1e400", "[", "[1,2", "{a: 1}", "${x}", "${oc.env:HOME}", "'", ""]
    ),
    st.sampled_from(["\ud800", "a\0b", "\u2028", "猫", "$(ls)", "9" * 400, "true", "x,y", "[[1]]", "- 1"]),
    st.integers().map(str),
    st.floats().map(str),
    st.text(max_size=8),
)


@st.composite
def command_lines(draw) -> list[str]:
    command = draw(st.sampled_from(sorted(SCHEMAS)))
    known = sorted(SCHEMAS[command].__dataclass_fields__)
    keys = st.one_of(
        st.sampled_from(known), st.sampled_from(["train.steps", "mse", "methods.a.b", "a..b"]), st.text(max_size=4)
    )
    words = draw(st.lists(st.tuples(keys, VALUES).map("=".join), max_size=3))
    words += draw(st.lists(VALUES, max_size=1))
    options = ["--conf", "-o", "--device", "--prompts", "--features", "--seed", "--sheet", "--speedup", "--print-conf"]
    for option in draw(st.lists(st.sampled_from(options), max_size=2, unique=True)):
        words += [option] if option in ("--speedup", "--print-conf") else [option, draw(VALUES)]
    return [command, *words, f"{MODELS.get(command, 'model')}=./nowhere"]  # nothing is computed


@settings(max_examples=180, **FIXED)
@given(command_lines())
def test_command_lines(words):
    ends(words)


READ_FIRST = {
    "conf.yaml": ["distill", "--print-conf", "--conf", "{}"],
    "prompts.txt": ["generate", "model=./nowhere", "--prompts", "{}"],
    "schedule.json": ["generate", "a red circle", "model=./nowhere", "predictor=predictor", "schedule={}"],
}
REAL = {
    "conf.yaml": (EARLIER / "conf" / "distill.yaml").read_bytes(),
    "prompts.txt": "a red circle\r\nein größeres Bild\n".encode(),
    "schedule.json": (EARLIER / "predictor" / "schedule.json").read_bytes(),
}


@st.composite
def damages(draw, content: bytes) -> bytes:
    """Another content: cut short, with other bytes in it, with another value, or none of it left."""
    at = draw(st.integers(0, max(0, len(content) - 1)))
    other = draw(st.binary(max_size=32))
    return draw(
        st.sampled_from(
            [
                content[:at],
                content[:at] + other + content[at + len(other) :],
                content[:at] + other + content[at:],
                other,
                b"[]",
                b'{"a": null}',
                b"[" * 5000,
                content.replace(b'": ', b'": [1, null], "a": ', 1 + at % 3),
            ]
        )
    )


@settings(max_examples=50, **FIXED)
@given(st.data())
def test_files_that_are_read_first(data):
    name = data.draw(st.sampled_from(sorted(REAL)))
    Path(name).write_bytes(data.draw(damages(REAL[name])))
    ends([word.format(name) for word in READ_FIRST[name]])


USED = {
    "teacher": ["collect-features", "--conf", "conf/collect-features.yaml", "-o", "out"],
    "clips": ["collect-features", "--conf", "conf/collect-features.yaml", "-o", "out", "max_bad_share=0.5"],
    "student": ["generate", "a red circle", "--conf", "conf/generate.yaml", "-o", "out.mp4"],
    "predictor": ["generate", "a red circle", "--conf", "conf/generate.yaml", "-o", "out.mp4"],
    "lora": ["generate", "a red circle", "model=lora", "steps=1", "-o", "out.mp4"],
    "features": ["distill", "--conf", "conf/distill-cfg.yaml", "-o", "out", "train.steps=1"],
    "distill-interrupted": ["distill", "--conf", "conf/distill.yaml", "-o", "distill-interrupted"],
    "features-interrupted": [
        "collect-features", "--conf", "conf/collect-features.yaml", "-o", "features-interrupted", "per_shard=4"
    ],
}  # fmt: skip
"""Folder -> a command that reads it."""


@settings(max_examples=40, **FIXED)
@given(st.data())
def test_files_of_models_and_trainings(place, data):
    folder = data.draw(st.sampled_from(sorted(USED)))
    files = sorted(file for file in (EARLIER / folder).rglob("*") if file.is_file())
    file = data.draw(st.sampled_from(files))
    damaged = place / file.relative_to(EARLIER)
    damaged.write_bytes(data.draw(damages(file.read_bytes())))
    try:
        ends(USED[folder])
    finally:
        shutil.rmtree(place / "out", ignore_errors=True)
        shutil.rmtree(place / folder)
        shutil.copytree(EARLIER / folder, place / folder)
        for run in (place / folder).glob("run.json"):
            run.write_text(json.dumps(json.loads(run.read_text()) | {"files": {}}))
