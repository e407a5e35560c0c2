"""Files are read once, and again when they have changed; the cache is never in the way."""

import hashlib
import json
import os
import time
from pathlib import Path

import pytest

from vidaccel import file_hashes
from vidaccel.artefacts import read_run, sha256_file, verify_files
from vidaccel.errors import UserError
from vidaccel.file_hashes import FileHashes, cache_file, file_sha256

LONG_AGO = 1_000_000_000


@pytest.fixture
def reads(monkeypatch, tmp_path) -> list[str]:
    """Names of the files whose bytes were read, in a process that knows none; every file is worth keeping."""
    seen: list[str] = []
    plain = file_hashes.hashlib.file_digest

    def counted(file, algorithm):
        seen.append(Path(file.name).name)
        return plain(file, algorithm)

    monkeypatch.setattr(file_hashes.hashlib, "file_digest", counted)
    monkeypatch.setattr(file_hashes, "_known", {})
    monkeypatch.setattr(file_hashes, "LARGE", 1)
    monkeypatch.setattr(file_hashes, "SETTLED", -1.0)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return seen


def forget(monkeypatch) -> None:
    """As a later process begins."""
    monkeypatch.setattr(file_hashes, "_known", {})


def test_a_file_is_read_once_in_a_process_and_by_later_ones(reads, tmp_path, monkeypatch):
    file = tmp_path / "a"
    file.write_bytes(b"abc")
    (tmp_path / "link").symlink_to(file)
    assert file_sha256(file) == file_sha256(tmp_path / "link") == sha256_file(file)
    assert reads == ["a", "a"]  # once by sha256_file, which remembers nothing
    forget(monkeypatch)
    assert file_sha256(file) == sha256_file(file) and reads == ["a"] * 3


@pytest.mark.parametrize("later_process", [False, True])
@pytest.mark.parametrize("keeps_time", [False, True])
def test_a_changed_file_is_read_again(reads, tmp_path, monkeypatch, later_process, keeps_time):
    """Also one of the same size, and one that was given its old time back, as `cp -p` and `rsync -t` do."""
    file = tmp_path / "a"
    file.write_bytes(b"abc")
    os.utime(file, (LONG_AGO, LONG_AGO))
    first = file_sha256(file)
    if later_process:
        forget(monkeypatch)
    time.sleep(0.02)  # a tick of the file system's clock
    file.write_bytes(b"abd")
    if keeps_time:
        os.utime(file, (LONG_AGO, LONG_AGO))
    assert file_sha256(file) == sha256_file(file) != first


def test_a_file_that_was_changed_a_moment_ago_is_not_remembered(reads, tmp_path, monkeypatch):
    monkeypatch.setattr(file_hashes, "SETTLED", 2.0)
    file = tmp_path / "a"
    file.write_bytes(b"abc")
    assert file_sha256(file) == file_sha256(file) and reads == ["a", "a"]
    assert not cache_file().exists()


@pytest.mark.parametrize("content", ["{", "[]", '{"a": 1}', '{"a": [[1], 2]}', "\x00"])
def test_a_damaged_cache_is_ignored_and_replaced(reads, tmp_path, monkeypatch, content):
    file = tmp_path / "a"
    file.write_bytes(b"abc")
    cache_file().parent.mkdir(parents=True)
    cache_file().write_text(content)
    assert file_sha256(file) == sha256_file(file)
    assert list(json.loads(cache_file().read_text())) == [str(file.resolve())]
    assert [path.name for path in cache_file().parent.iterdir()] == ["hashes.json"]


def test_a_cache_that_cannot_be_written_is_done_without(reads, tmp_path, monkeypatch):
    (tmp_path / "cache").write_text("a file in the place of the folder")
    file = tmp_path / "a"
    file.write_bytes(b"abc")
    assert file_sha256(file) == file_sha256(file) == sha256_file(file)
    assert reads == ["a", "a"]


def test_files_that_are_gone_leave_the_cache_and_small_ones_are_not_in_it(reads, tmp_path, monkeypatch):
    for name in "abc":
        (tmp_path / name).write_text(name * 4)
    file_sha256(tmp_path / "a")
    (tmp_path / "a").unlink()
    file_sha256(tmp_path / "b")
    monkeypatch.setattr(file_hashes, "LARGE", 5)
    file_sha256(tmp_path / "c")
    assert list(json.loads(cache_file().read_text())) == [str((tmp_path / "b").resolve())]


def test_hashes_by_name_are_made_when_asked_for(reads, tmp_path):
    for name in "ab":
        (tmp_path / name).write_text(name)
    hashes = FileHashes({f"part/{name}": tmp_path / name for name in "ab"})
    assert len(hashes) == 2 and list(hashes) == ["part/a", "part/b"] and reads == []
    assert hashes["part/b"] == sha256_file(tmp_path / "b") and reads == ["b", "b"]
    assert hashes.get("part/c") is None
    time.sleep(0.02)
    (tmp_path / "b").write_text("other")
    (tmp_path / "a").write_text("c")
    assert hashes["part/b"] == hashlib.sha256(b"b").hexdigest()  # as it was when it was loaded
    with pytest.raises(UserError, match="a has changed since it was loaded"):
        hashes["part/a"]


def test_hashes_by_name_can_be_added_to(tmp_path):
    for name in "ab":
        (tmp_path / name).write_text(name)
    hashes = FileHashes({f"part/{name}": tmp_path / name for name in "ab"})
    assert hashes | {"c": "0"} == {f"part/{name}": sha256_file(tmp_path / name) for name in "ab"} | {"c": "0"}


def test_what_run_json_vouches_for_is_read_when_it_has_changed(reads, tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "weights").write_bytes(b"abc")
    run = {"format": "model/1", "files": {"weights": sha256_file(folder / "weights")}}
    (folder / "run.json").write_text(json.dumps(run))
    reads.clear()
    for _ in range(2):
        verify_files(folder, read_run(folder, "model/1"))
    assert reads == ["weights"]
    time.sleep(0.02)
    (folder / "weights").write_bytes(b"abd")
    with pytest.raises(UserError, match="weights changed"):
        verify_files(folder, read_run(folder, "model/1"))
