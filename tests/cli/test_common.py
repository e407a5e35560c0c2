"""How commands end."""

import errno
import logging
import os
import subprocess
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import typer
from typer.testing import CliRunner

from vidaccel.cli import together
from vidaccel.cli.common import Debug, is_setting, quiet_libraries, reported, split_settings
from vidaccel.errors import FailedAlone, TrainingFailed, UserError


def alone(cause: Exception) -> FailedAlone:
    """As `by_all` raises it."""
    error = FailedAlone("process 1 failed, and the others wait for it")
    error.__cause__ = cause
    return error


def end(error: BaseException, *args: str):
    app = typer.Typer()

    @app.command()
    @reported
    def command(debug: Debug = False) -> None:
        logging.getLogger("vidaccel.somewhere").warning("careful")
        raise error

    return CliRunner().invoke(app, list(args))


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (UserError("it is wrong", "mend it"), 2, "error: it is wrong\nhint: mend it\n"),
        (TrainingFailed("ten in a row"), 1, "error: ten in a row\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
        (alone(UserError("it is wrong", "mend it")), 2, "error: it is wrong\nhint: mend it\n"),
    ],
)
def test_status_and_words(error, status, said):
    result = end(error)
    assert result.exit_code == status
    assert result.stderr == f"warning: careful\n{said}"
    assert end(error, "--debug").exception is error or status == 130


def test_without_a_store_a_process_says_once_that_it_ends(monkeypatch):
    """The main thread hears of a process that has gone, and another of SIGTERM."""

    def gone():
        raise RuntimeError("connection refused")

    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "TORCHELASTIC_USE_AGENT_STORE": "True"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(together, "_connection", gone)
    monkeypatch.setattr(together, "_said", set())
    monkeypatch.setattr(together, "ROOT_CAUSE", 0.0)
    with together.one_of_many() as heard:
        assert [heard(together.LOST, True) for _ in range(2)] == [True, False]


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ([], "interrupted"),
        (["shard-00000.tar"], "interrupted; the same command goes on from what is collected"),
        ([".made/0000.json"], "interrupted; the same command goes on from the videos that are made"),
        (
            ["checkpoints/step-00000400/state.json", "checkpoints/step-00000420/state.json"],
            "interrupted; the same command goes on from step 420",
        ),
        (["checkpoints/mse/step-00000010/state.json"], "interrupted; the same command goes on from step 10 of mse"),
    ],
)
def test_where_what_was_interrupted_goes_on_from(files, said, tmp_path):
    app = typer.Typer()
    for age, name in enumerate(reversed(files)):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (1000 - age, 1000 - age))

    @app.command()
    @reported
    def command(output: Path = tmp_path, debug: Debug = False) -> None:
        raise KeyboardInterrupt

    result = CliRunner().invoke(app, ["--output", str(tmp_path)])
    assert (result.exit_code, result.stderr) == (130, f"{said}\n")


def test_a_bug_is_a_line_too_and_has_its_traceback_with_debug():
    result = end(ZeroDivisionError("ours,\nand long: " + "x" * 1000))
    assert result.exit_code == 1
    _, error, hint = result.stderr.splitlines()
    assert error.startswith("error: ZeroDivisionError: ours, and long: xxx") and len(error) < 600
    assert "--debug shows where" in hint
    assert isinstance(end(ZeroDivisionError("ours"), "--debug").exception, ZeroDivisionError)


def test_how_a_command_ends_itself_is_let_be():
    assert end(typer.Exit(3)).exit_code == 3
    assert end(typer.Abort()).exit_code == 1


@pytest.mark.parametrize(
    ("code", "said"),
    [
        (errno.EACCES, "permission denied"),
        (errno.EISDIR, "it is a folder"),
        (errno.ENAMETOOLONG, "its name is too long"),
        (errno.ENOENT, "there is no such file or folder"),
        (errno.ESTALE, "the file system that it is on has gone"),
        (errno.ENOTCONN, os.strerror(errno.ENOTCONN)),
        (errno.ENOSPC, "no space left on device"),
    ],
)
def test_what_the_operating_system_says_of_a_path_is_a_line_and_a_hint(code, said):
    result = end(OSError(code, os.strerror(code), "clips/a.mp4"))
    assert result.exit_code == 2
    assert f"error: cannot use clips/a.mp4: {said}\nhint: " in result.stderr
    assert end(OSError(code, os.strerror(code))).exit_code == 1


PRINTING = """
import sys
from vidaccel.cli.common import reported
from vidaccel.errors import UserError

@reported
def command(debug):
    print("\\u0441 \\udcff")
    raise UserError("\\u0441", "\\u0441")

command(debug=False)
"""


@pytest.mark.parametrize("own", [{"PYTHONIOENCODING": "ascii"}, {"LC_ALL": "C"}, {"LC_ALL": "C", "PYTHONUTF8": "0"}])
def test_a_console_that_lacks_a_character_shows_an_escape(own):
    variables = {"PYTHONCOERCECLOCALE": "0"} | own
    done = subprocess.run([sys.executable, "-c", PRINTING], capture_output=True, env=os.environ | variables)
    assert b"\\udcff" in done.stdout
    assert b"UnicodeEncodeError" not in done.stderr and b"hint: " in done.stderr


@pytest.mark.parametrize("command", [["--help"], ["generate", "--help"], ["generate", "--print-conf", "model=стол"]])
def test_commands_print_on_an_ascii_console(command):
    variables = {"PYTHONIOENCODING": "ascii", "LC_ALL": "C"}
    subprocess.run([sys.executable, "-m", "vidaccel", *command], env=os.environ | variables, check=True)


@pytest.mark.parametrize("word", ["steps=3", "+steps=3", "prediction.steps=3", "old=1", "group.x=1"])
def test_a_setting_is_one_by_its_name(word):
    @dataclass
    class Config:
        RENAMED = {"old": "new"}
        steps: int = 1
        new: int = 1
        group: int = 1

    assert is_setting(word, Config) == (not word.startswith("prediction"))


def test_settings_are_told_from_the_prompt():
    words = ["a red circle = round", "steps=3", "+a.b=c", "x = y", "seed="]
    assert split_settings(words) == (["a red circle = round", "x = y"], ["steps=3", "+a.b=c", "seed="])


def test_norms_under_autocast_are_not_warned_of():
    """Their float32 weights beside bfloat16 input: what comes out is what float32 gives, rounded."""
    before = torch.is_warn_always_enabled()
    torch.set_warn_always(True)  # torch says it once a process
    try:
        with warnings.catch_warnings(record=True) as said:
            quiet_libraries()
            x = torch.randn(4, 8, dtype=torch.bfloat16)
            with torch.autocast("cpu", torch.bfloat16):
                made = torch.nn.RMSNorm(8)(x)
    finally:
        torch.set_warn_always(before)
    assert said == [] and torch.equal(made, torch.nn.RMSNorm(8)(x.float()).to(made.dtype))
