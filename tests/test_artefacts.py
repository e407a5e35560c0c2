import errno
import hashlib
import json
import os
import stat
from datetime import UTC, datetime, timedelta, timezone
from importlib import metadata
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from typer.testing import CliRunner

from vidaccel import artefacts
from vidaccel.artefacts import (
    atomic_folder,
    atomic_path,
    check_output,
    check_writable,
    own_files,
    read_run,
    refuse_unfinished,
    sha256_file,
    verify_files,
    write_json,
    write_run,
)
from vidaccel.cli.main import app
from vidaccel.errors import UserError

STARTED = datetime(2025, 3, 1, 12, 0, tzinfo=timezone(timedelta(hours=2)))


def tree(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def failing(code):
    def fail(*arguments, **keywords):
        raise OSError(code, os.strerror(code))

    return fail


# Files


def test_a_file_appears_whole(tmp_path):
    target = tmp_path / "new" / "deep" / "a.json"
    with atomic_path(target) as temporary:
        assert (temporary.parent, temporary.suffix) == (target.parent, ".json")
        temporary.write_text("whole")
        assert not target.exists()
    assert tree(tmp_path) == {"new/deep/a.json": b"whole"}
    umask = os.umask(0)
    os.umask(umask)
    assert stat.S_IMODE(target.stat().st_mode) == 0o666 & ~umask


@pytest.mark.parametrize("exception", [ValueError, KeyboardInterrupt, SystemExit])
def test_a_file_keeps_its_old_content(tmp_path, exception):
    (tmp_path / "a.txt").write_text("old")
    with pytest.raises(exception), atomic_path(tmp_path / "a.txt") as temporary:
        temporary.write_text("new, half writ")
        raise exception
    with pytest.raises(exception), atomic_path(tmp_path / "new" / "deep" / "a.txt"):
        raise exception
    assert tree(tmp_path) == {"a.txt": b"old"}
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EDQUOT])
def test_the_disk_fails_in_the_block(tmp_path, code):
    with pytest.raises(UserError) as caught, atomic_path(tmp_path / "a.txt") as temporary:
        temporary.write_text("half")
        failing(code)()
    assert caught.value.message == f"cannot write {tmp_path / 'a.txt'}: {artefacts._REASONS[code][0]}"
    assert caught.value.hint
    assert tree(tmp_path) == {}


@pytest.mark.parametrize("call", ["os.fsync", "pathlib.Path.replace"])
def test_the_disk_fails_at_the_end(tmp_path, monkeypatch, call):
    (tmp_path / "a.txt").write_text("old")
    monkeypatch.setattr(call, failing(errno.ENOSPC))
    with pytest.raises(UserError, match="no space left on device"), atomic_path(tmp_path / "a.txt") as temporary:
        temporary.write_text("new")
    assert tree(tmp_path) == {"a.txt": b"old"}


def test_a_full_disk_under_safetensors(tmp_path, monkeypatch):
    """safetensors, written in Rust, has its own exception for it; the text is that of safetensors 0.8."""
    text = "Error while serializing: I/O error: No space left on device (os error 28)"
    with (
        pytest.raises(UserError, match="no space left on device"),
        atomic_path(tmp_path / "a.safetensors") as temporary,
    ):
        save_file({"a": torch.zeros(2)}, temporary)
        raise SafetensorError(text)
    assert tree(tmp_path) == {}


def test_errors_about_other_files_pass(tmp_path):
    with pytest.raises(FileNotFoundError), atomic_path(tmp_path / "here" / "a.txt"):
        Path("/nowhere/at/all").read_text()
    with pytest.raises(OSError, match="Bad file"), atomic_path(tmp_path / "here" / "a.txt"):
        failing(errno.EBADF)()
    with pytest.raises(FileNotFoundError), atomic_folder(tmp_path / "here"):
        (tmp_path / "beside" / "run.json").read_text()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("target", "reason"),
    [
        ("file/a.txt", "a part of its path is a file"),
        ("file/deep/a.txt", "a part of its path is a file"),
        ("folder", "a folder of that name exists"),
        ("a" * 300 + ".txt", "its name is too long"),
    ],
)
def test_places_that_cannot_be_written(tmp_path, target, reason):
    (tmp_path / "file").write_text("old")
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match=reason), atomic_path(tmp_path / target) as temporary:
        temporary.write_text("new")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_permission(tmp_path):
    tmp_path.chmod(0o500)
    for write in (check_writable, lambda path: write_json(path, {})):
        with pytest.raises(UserError, match="permission denied"):
            write(tmp_path / "a.txt")


def test_check_writable(tmp_path, monkeypatch):
    check_writable(tmp_path / "new" / "deep" / "a.txt")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="a part of its path is a file"):
        check_writable(tmp_path / "file" / "deep" / "a.txt")
    monkeypatch.setattr(Path, "touch", failing(errno.EROFS))
    with pytest.raises(UserError, match="the file system is read-only"):
        check_writable(tmp_path / "a.txt")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_link_is_written_through(tmp_path):
    """Also one to nothing yet, to a folder, and one of another suffix; a temporary name keeps the one asked for."""
    (tmp_path / "disk").mkdir()
    (tmp_path / "a.json").symlink_to(tmp_path / "disk" / "real.txt")
    (tmp_path / "run").symlink_to("disk")
    for content in ("old", "new"):
        with atomic_path(tmp_path / "a.json") as temporary:
            assert (temporary.parent, temporary.suffix) == (tmp_path / "disk", ".json")
            temporary.write_text(content)
        assert (tmp_path / "disk" / "real.txt").read_text() == content
    with atomic_path(tmp_path / "run" / ".." / "run" / "b.txt") as temporary:
        temporary.write_text("b")
    assert tree(tmp_path / "disk") == {"real.txt": b"new", "b.txt": b"b"}
    with atomic_folder(tmp_path / "run") as temporary:
        (temporary / "c.txt").write_text("c")
    assert tree(tmp_path / "disk") == {"c.txt": b"c"}
    assert all((tmp_path / name).is_symlink() for name in ("a.json", "run"))


def test_a_link_to_itself_is_refused(tmp_path):
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    for write in (check_writable, lambda path: write_json(path, {})):
        with pytest.raises(UserError, match="a link in its path leads back to itself"):
            write(tmp_path / "a")


def test_a_place_where_nothing_can_be_made():
    with pytest.raises(UserError, match="cannot write /proc/run/a.txt"):
        check_writable("/proc/run/a.txt")


def test_names_that_are_no_unicode_are_written_and_read(tmp_path):
    write_json(tmp_path / "a.json", {"name": "caf\udce9 ☕"})
    assert json.loads((tmp_path / "a.json").read_text(encoding="utf-8")) == {"name": "caf\udce9 ☕"}


# What operating systems leave in folders


LEFT = (".DS_Store", "._model.safetensors", "Thumbs.db", "desktop.ini", "@eaDir/model.safetensors", "lost+found/x")


def test_what_systems_leave_in_folders_is_nobodys(tmp_path):
    run = read_run(finished(tmp_path), "model/1")
    names = [path.name for path in own_files(tmp_path)]
    for name in LEFT:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("")
    assert [path.name for path in own_files(tmp_path)] == names == ["config.json", "run.json", "weights"]
    assert own_files(tmp_path, "*.safetensors") == []
    assert read_run(finished(tmp_path), "model/1")["files"] == run["files"]
    verify_files(tmp_path, {"files": run["files"] | dict.fromkeys(["Thumbs.db", "weights/.DS_Store"], "0")})


# Folders


def test_a_folder_appears_whole(tmp_path):
    for content in ("old", "new"):
        with atomic_folder(tmp_path / "deep" / "run") as temporary:
            (temporary / content).mkdir()
            (temporary / content / "a.txt").write_text(content)
    assert tree(tmp_path) == {"deep/run/new/a.txt": b"new"}
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["run"]


@pytest.mark.parametrize("exception", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("target", ["run", "new/deep/run"])
def test_a_folder_keeps_its_old_content(tmp_path, target, exception):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "a.txt").write_text("old")
    with pytest.raises(exception), atomic_folder(tmp_path / target) as temporary:
        (temporary / "a.txt").write_text("new")
        raise exception
    assert tree(tmp_path) == {"run/a.txt": b"old"}
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


@pytest.mark.parametrize("exception", [OSError(errno.ENOSPC, ""), KeyboardInterrupt()])
def test_a_folder_that_cannot_be_replaced_is_put_back(tmp_path, monkeypatch, exception):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "a.txt").write_text("old")
    rename = Path.rename

    def second_fails(source, target):
        if target == tmp_path / "run" and (source / "new.txt").exists():
            raise exception
        return rename(source, target)

    monkeypatch.setattr(Path, "rename", second_fails)
    with pytest.raises((UserError, KeyboardInterrupt)), atomic_folder(tmp_path / "run") as temporary:
        (temporary / "new.txt").write_text("new")
    assert tree(tmp_path) == {"run/a.txt": b"old"}
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_folder_does_not_replace_a_file(tmp_path):
    (tmp_path / "run").write_text("old")
    with pytest.raises(UserError, match="a part of its path is a file"), atomic_folder(tmp_path / "run"):
        pass
    assert tree(tmp_path) == {"run": b"old"}


# run.json


def finished(folder, **changes):
    folder.mkdir(exist_ok=True)
    (folder / "weights").mkdir(exist_ok=True)
    (folder / "weights" / "model.safetensors").write_bytes(b"weights")
    (folder / "config.json").write_text("{}")
    arguments = {
        "format": "model/1",
        "command": "vidaccel distill",
        "config": {"model": Path("runs/teacher"), "steps": 20},
        "seed": 7,
        "started": STARTED,
        "parents": {"teacher": "ab" * 32},
    }
    write_run(folder, **arguments | changes)
    return folder


def test_run_json_has_the_layout_of_its_format(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "state.json").write_text("{}")
    (tmp_path / ".DS_Store").write_text("")
    run = json.loads((finished(tmp_path, pipeline="tiny/teacher") / "run.json").read_text())
    assert abs(datetime.now(UTC) - datetime.fromisoformat(run.pop("finished"))) < timedelta(minutes=1)
    assert run == {
        "format": "model/1",
        **{package: metadata.version(package) for package in ("vidaccel", "torch", "diffusers")},
        "command": "vidaccel distill",
        "config": {"model": "runs/teacher", "steps": 20},
        "seed": 7,
        "started": "2025-03-01T10:00:00+00:00",
        "parents": {"teacher": "ab" * 32},
        "files": {
            "config.json": hashlib.sha256(b"{}").hexdigest(),
            "weights/model.safetensors": hashlib.sha256(b"weights").hexdigest(),
        },
        "pipeline": "tiny/teacher",
    }


def test_a_run_written_again_does_not_hash_itself(tmp_path):
    first = read_run(finished(tmp_path), "model/1")["files"]
    assert read_run(finished(tmp_path), "model/1")["files"] == first


def test_extra_fields_do_not_shadow(tmp_path):
    with pytest.raises(ValueError, match="'files', 'torch'"):
        finished(tmp_path, files={}, torch="3.0")


def test_sha256_of_the_standard(tmp_path):
    (tmp_path / "a").write_bytes(b"abc")  # FIPS 180-2, appendix B.1
    assert sha256_file(tmp_path / "a") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "is not a finished model folder: it has no run.json"),
        ("", "run.json is damaged"),
        ('{"format": "model/1", "fi', "run.json is damaged"),
        ("[]", "run.json is damaged"),
        ('{"format": "model/1"}', "run.json is damaged"),
        ('{"files": {}}', "run.json is damaged"),
        ('{"format": "predictor/1", "files": {}}', "is of format predictor/1, where model/1 is needed"),
        ('{"format": "model/2", "files": {}}', "is of format model/2, where model/1 is needed"),
    ],
)
def test_a_folder_that_cannot_be_read(tmp_path, content, reason):
    if content is not None:
        (tmp_path / "run.json").write_text(content)
    with pytest.raises(UserError, match=reason):
        read_run(tmp_path, "model/1")


@pytest.mark.parametrize(
    ("files", "stands"),
    [
        (["metrics.jsonl"], "its training has no checkpoint yet"),
        (["checkpoints/mse/metrics.jsonl"], "its training has no checkpoint yet"),
        (["metrics.jsonl", "checkpoints/step-00000420/state.json"], "its training stands at step 420"),
        (["checkpoints/mse/step-00000020/state.json"], "its training stands at step 20 of mse"),
        (["shard-00000.tar", "shard-00001.tar"], "2 of its shards are written"),
    ],
)
def test_what_was_begun_and_not_ended_says_where_it_stands(tmp_path, files, stands):
    refuse_unfinished(tmp_path)
    for name in files:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    for refused in (refuse_unfinished, lambda folder: read_run(folder, "model/1")):
        with pytest.raises(UserError, match=f"is not finished: {stands}\nhint: run its command again"):
            refused(tmp_path)
    (tmp_path / "run.json").touch()
    refuse_unfinished(tmp_path)


def test_a_place_where_something_else_is_finished_is_refused(tmp_path):
    check_output(tmp_path / "new", "model/1")
    check_output(finished(tmp_path), "model/1")
    (tmp_path / "run.json").write_text("{")
    check_output(tmp_path, "features/1")
    finished(tmp_path)
    with pytest.raises(UserError, match="is of format model/1, and this makes features/1"):
        check_output(tmp_path, "features/1")


@pytest.mark.parametrize(
    ("command", "makes"),
    [("collect-features", "features/1"), ("distill", "model/1"), ("train-predictor", "predictor/1")],
)
def test_no_command_writes_over_what_another_made(tmp_path, command, makes):
    before = tree(finished(tmp_path, format="benchmark/1"))
    conf = "sprites/cfg" if command == "distill" else "sprites"
    result = CliRunner().invoke(app, [command, "--conf", conf, "-o", str(tmp_path)])
    assert result.exit_code == 2
    assert f"is of format benchmark/1, and this makes {makes}" in result.stderr
    assert tree(tmp_path) == before


def test_no_folder(tmp_path):
    with pytest.raises(UserError, match="there is no folder"):
        read_run(tmp_path / "nowhere", "model/1")


def test_verify_files(tmp_path):
    run = read_run(finished(tmp_path), "model/1")
    (tmp_path / "notes.txt").write_text("mine")
    verify_files(tmp_path, run)
    (tmp_path / "weights" / "model.safetensors").write_bytes(b"weight")
    with pytest.raises(UserError, match=r"run.json describes: weights/model.safetensors changed"):
        verify_files(tmp_path, run)
    (tmp_path / "config.json").unlink()
    with pytest.raises(UserError, match=r"config.json missing; weights/model.safetensors changed"):
        verify_files(tmp_path, run)
