"""One writer a folder, whatever happens to it."""

import errno
import logging
import os
import signal
import subprocess
import sys
from datetime import UTC, datetime

import pytest
from typer.testing import CliRunner

from vidaccel import locks
from vidaccel.artefacts import atomic_folder, write_run
from vidaccel.cli.main import app
from vidaccel.errors import UserError
from vidaccel.locks import locked

HOLDER = """
import sys, time
from vidaccel.locks import locked

with locked(sys.argv[1]):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def holder(tmp_path):
    """Another process, which holds the lock of tmp_path/out."""
    with subprocess.Popen([sys.executable, "-c", HOLDER, tmp_path / "out"], stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"held\n"
        yield process
        process.kill()


def test_a_second_writer_is_told_who_the_first_is(tmp_path, holder):
    (tmp_path / "alias").symlink_to(tmp_path / "out")
    for name in ("out", "out/../out", "alias"):
        with pytest.raises(UserError) as caught, locked(tmp_path / name):
            pass
        today = datetime.now(UTC).date().isoformat()
        assert (
            f"is being written by process {holder.pid} on {os.uname().nodename} since {today}" in caught.value.message
        )
        assert "time.sleep" in caught.value.message and "choose another folder" in caught.value.hint
    with locked(tmp_path / "other"):
        pass


def test_a_killed_process_leaves_no_lock(tmp_path, holder):
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    with locked(tmp_path / "out"):
        pass
    assert os.listdir(tmp_path / "out") == []


def test_nothing_stays_behind_but_what_was_written(tmp_path):
    with pytest.raises(KeyError), locked(tmp_path / "deep" / "out"):
        assert os.listdir(tmp_path / "deep" / "out") == [".lock"]
        raise KeyError
    assert os.listdir(tmp_path) == []
    with locked(tmp_path / "deep" / "out"):
        write_run(tmp_path / "deep" / "out", format="a/1", command="", config={}, seed=0, started=datetime.now(UTC))
    assert os.listdir(tmp_path / "deep" / "out") == ["run.json"]
    assert '"files": {}' in (tmp_path / "deep" / "out" / "run.json").read_text()


def test_a_folder_that_is_replaced_keeps_its_lock(tmp_path):
    with locked(tmp_path / "out"):
        for _ in range(2):
            with atomic_folder(tmp_path / "out") as temporary:
                (temporary / "a.txt").write_text("new")
            with pytest.raises(UserError, match=f"process {os.getpid()} on"), locked(tmp_path / "out"):
                pass
    assert os.listdir(tmp_path / "out") == ["a.txt"]


def test_a_lock_whose_file_was_removed_meanwhile_is_asked_for_again(tmp_path, monkeypatch):
    """The holder removed the file after it was opened here: what was locked is no longer of that name."""
    plain, calls = locks.fcntl.flock, []

    def slow(handle, how):
        if not calls:
            (tmp_path / ".lock").unlink()
        calls.append(how)
        plain(handle, how)

    monkeypatch.setattr(locks.fcntl, "flock", slow)
    with locked(tmp_path):
        assert len(calls) == 2
        with pytest.raises(UserError), locked(tmp_path):
            pass


@pytest.mark.parametrize("system", ["windows", "network"])
def test_where_there_are_no_locks_it_is_said(tmp_path, monkeypatch, caplog, system):
    def fail(handle, how):
        raise OSError(errno.ENOLCK, "No locks available")

    if system == "windows":
        monkeypatch.setattr(locks, "fcntl", None)
    else:
        monkeypatch.setattr(locks.fcntl, "flock", fail)
    with caplog.at_level(logging.INFO, "vidaccel"), locked(tmp_path / "out"):
        (tmp_path / "out").mkdir(exist_ok=True)
        (tmp_path / "out" / "a.txt").write_text("")
    assert "nothing keeps two commands from writing to" in caplog.text
    assert os.listdir(tmp_path / "out") == ["a.txt"]


def test_a_place_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"), locked(tmp_path / "file"):
        pass


@pytest.mark.parametrize(
    "command",
    [
        ["collect-features", "clips=1"],
        ["distill", "train.steps=0"],
        ["train-predictor", "clips=1"],
        ["benchmark", "--speedup"],
    ],
    ids=lambda command: command[0],
)
def test_every_command_that_goes_on_where_it_was_stopped_has_its_folder_alone(tmp_path, command):
    with locked(tmp_path / "out"):
        result = CliRunner().invoke(app, [*command, "-o", str(tmp_path / "out")])
    assert result.exit_code == 2
    assert f"is being written by process {os.getpid()}" in result.stderr
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("command", ["score", "make"])
def test_the_commands_of_the_sprites_world_have_theirs(tmp_path, command):
    from vidaccel.worlds.sprites.__main__ import app

    with locked(tmp_path):
        result = CliRunner().invoke(app, [command, "-o", str(tmp_path)])
    assert result.exit_code == 2
    assert "is being written by process" in result.stderr
