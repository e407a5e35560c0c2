"""What a run leaves on disk: whole or not at all, and able to say how it was made.

Files and folders are written under a hidden temporary name in the folder they belong to (a rename is atomic only
within one file system) and renamed when complete, so a run that is killed, interrupted or out of disk leaves what was
there before. A finished folder ends with `run.json`: what made it, from what, and a SHA-256 of each file.
"""

import contextlib
import errno
import hashlib
import json
import logging
import os
import re
import secrets
import shutil
from collections.abc import Iterable, Iterator, Mapping
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path, PurePath, PurePosixPath
from typing import Any

from vidaccel import __version__
from vidaccel.errors import UserError
from vidaccel.file_hashes import file_sha256

log = logging.getLogger(__name__)

RUN_FILE = "run.json"
LOCK_FILE = ".lock"  # of a folder that is being written (locks.py), and hidden, so in no one's way
CHECKPOINTS = "checkpoints"  # resume state: changes while a run goes on
TRAJECTORIES = "trajectories"  # what a predictor learnt from: a folder that vouches for itself
_APART = (RUN_FILE, CHECKPOINTS, TRAJECTORIES)  # never part of what `files` vouches for; a copy may leave them out

LEFT_BY_SYSTEMS = {
    *("thumbs.db", "ehthumbs.db", "desktop.ini", "$recycle.bin", "system volume information"),  # Windows
    *(".ds_store", ".spotlight-v100", ".trashes", ".fseventsd", "__macosx"),  # macOS, which leaves ._NAME as well
    *("lost+found", ".directory", "@eadir", ".snapshot"),  # Linux and network storage
}
"""Names, in small letters, that operating systems put into any folder."""

_ELSEWHERE = "choose another place for it"
_ACCESS = "look at the path, its permissions and its disk"
_REASONS = {  # errno -> what was wrong, what to do
    errno.ENOSPC: ("no space left on device", "free some space, or choose a place on another disk"),
    errno.EDQUOT: ("the disk quota is used up", "free some space, or choose a place on another disk"),
    errno.EROFS: ("the file system is read-only", _ELSEWHERE),
    errno.EACCES: ("permission denied", _ELSEWHERE),
    errno.EPERM: ("permission denied", _ELSEWHERE),
    errno.ENOENT: ("its folder does not exist", _ELSEWHERE),
    errno.ENOTDIR: ("a part of its path is a file, not a folder", _ELSEWHERE),
    errno.EEXIST: ("a part of its path is a file, not a folder", _ELSEWHERE),
    errno.EISDIR: ("a folder of that name exists", _ELSEWHERE),
    errno.ENAMETOOLONG: ("its name is too long", "choose a shorter name"),
    errno.ELOOP: ("a link in its path leads back to itself", _ELSEWHERE),
    errno.ESTALE: ("the file system that it is on has gone", "mount it again"),
    errno.EIO: ("its disk or file system failed", "see what is wrong with it (dmesg)"),
}
_NOT_READ = {  # what another reason or hint is better for where a path is read
    errno.ENOENT: ("there is no such file or folder", "check its spelling"),
    errno.EISDIR: ("it is a folder", "give the path of a file"),
    errno.ENOTDIR: ("a part of its path is a file, not a folder", "check its spelling"),
    errno.EACCES: ("permission denied", "see who may read it (ls -l)"),
    errno.EPERM: ("permission denied", "see who may read it (ls -l)"),
    errno.ENAMETOOLONG: ("its name is too long", "check its spelling"),
    errno.ELOOP: ("a link in its path leads back to itself", "mend that link"),
}
_ABOUT_THE_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EROFS}
_RUST_ERRNO = re.compile(r"\(os error (\d+)\)")  # safetensors reports a full disk as its own exception, with this text


def check_writable(target: str | os.PathLike) -> None:
    """Raise the `UserError` that writing `target` would end in, as far as it can be told before any work is done."""
    target = _absolute(target)
    with explained(target):
        _require_no_loop(target)
        home = next(folder for folder in (target.parent, *target.parents) if folder.exists())  # `/` has no parents
        if not home.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(home))
        probe = home / _temporary_name(target)
        try:
            probe.touch(exist_ok=False)
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(home)) from error  # not about a name that is ours
        probe.unlink()


@contextlib.contextmanager
def atomic_path(target: str | os.PathLike) -> Iterator[Path]:
    """Yield a path (same folder, same suffix) for the caller to write; rename it to `target` if the block succeeds.

    A target that is a symbolic link stays one: what it leads to is written. Missing parent folders are made. On any
    exception, Ctrl-C included, the temporary file and the folders made for it are removed and `target` is as it was.
    Raises `UserError` when the place cannot be written or the disk is full.
    """
    asked, target = Path(target), _absolute(target)
    with explained(target), _parents_made(target):
        _require_no_loop(target)
        temporary = target.parent / _temporary_name(asked)
        try:
            yield temporary
            _flush_to_disk(temporary)
            temporary.replace(target)
        finally:
            temporary.unlink(missing_ok=True)


def remove_left(targets: Iterable[Path]) -> None:
    """Remove what killed processes left of files that they wrote by `atomic_path`. Nobody else may be writing them."""
    named = {(target.parent, target.stem[:64], target.suffix) for target in targets}
    for folder in {folder for folder, _, _ in named}:
        for path in folder.glob(".*"):
            left = re.fullmatch(r"\.(.*)\.[0-9a-f]{8}", path.stem)
            if left and (folder, left[1], path.suffix) in named:
                path.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_folder(target: str | os.PathLike) -> Iterator[Path]:
    """Yield an empty folder to fill; it takes the place of `target`, and of all that was in it, if the block succeeds.

    Promises and errors are those of `atomic_path`, save that a kill between the two renames that replace an existing
    folder leaves the old one under a hidden name beside it.
    """
    target = _absolute(target)
    with explained(target), _parents_made(target):
        _require_no_loop(target)
        temporary = target.parent / _temporary_name(target)
        replaced = target.parent / _temporary_name(target)
        temporary.mkdir()
        try:
            yield temporary
            for file in filter(Path.is_file, temporary.rglob("*")):
                _flush_to_disk(file)
            if target.is_dir():
                if (target / LOCK_FILE).exists():  # the lock is on the file, whatever its name
                    os.link(target / LOCK_FILE, temporary / LOCK_FILE)
                target.rename(replaced)
            try:
                temporary.rename(target)
            except BaseException:
                if replaced.exists():
                    replaced.rename(target)
                raise
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
            if target.exists():
                shutil.rmtree(replaced, ignore_errors=True)


@contextlib.contextmanager
def explained(target: str | os.PathLike) -> Iterator[None]:
    """Turn the failures a user can mend into a `UserError` about `target`; let every other exception through."""
    target = _absolute(target)
    try:
        yield
    except Exception as error:
        code = _errno(error)
        # A file the block merely reads may be missing or forbidden too: that is not about writing the target.
        if code is None or not (code in _ABOUT_THE_DISK or _is_about(error, target)):
            raise
        reason, hint = _REASONS.get(code, (os.strerror(code), _ELSEWHERE))
        raise UserError(f"cannot write {target}: {reason}", hint) from error


def told(error: OSError) -> UserError | None:
    """What the operating system says of a path, as a user is told it; None where it names no path."""
    if error.errno is None or not isinstance(error.filename, str | bytes):
        return None
    name = os.fsdecode(error.filename)
    reasons = _REASONS if error.errno in _ABOUT_THE_DISK else _NOT_READ
    reason, hint = reasons.get(error.errno) or _REASONS.get(error.errno) or (os.strerror(error.errno), _ACCESS)
    return UserError(f"cannot use {name}: {reason}", hint)


def own_files(folder: str | os.PathLike, pattern: str = "*") -> list[Path]:
    """What lies in `folder` and matches, sorted, without what operating systems leave in folders."""
    return sorted(path for path in Path(folder).glob(pattern) if not left_by_system(path.name))


def left_by_system(name: str) -> bool:
    """Whether a file or folder of this name is none of a user's: .DS_Store, Thumbs.db, macOS's doubles, ..."""
    return name.startswith("._") or name.lower() in LEFT_BY_SYSTEMS


def write_json(target: str | os.PathLike, data: Any) -> None:
    """Write `data` (paths in it become strings) as indented JSON, atomically."""
    text = json.dumps(data, indent=2, ensure_ascii=False, default=os.fspath)
    with atomic_path(target) as temporary:
        # A name that is no Unicode has half characters, which JSON writes as backslash escapes.
        temporary.write_text(text + "\n", encoding="utf-8", errors="backslashreplace")


def read_json(path: str | os.PathLike, hint: str) -> dict[str, Any]:
    """The object in a JSON file; `UserError` with this hint if the file is missing, damaged or holds anything else."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path} is missing", hint)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # no UTF-8, no JSON, or brackets in brackets in brackets ...
        raise UserError(f"{path} is damaged, and no JSON: {error}", hint) from error
    if not isinstance(content, dict):
        raise UserError(f"{path} is damaged: it holds a {type(content).__name__}, not a JSON object", hint)
    return content


def sha256_file(path: str | os.PathLike) -> str:
    """Hex SHA-256 of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_run(
    folder: str | os.PathLike,
    *,
    format: str,
    command: str,
    config: Mapping[str, Any],
    seed: int | None,
    started: datetime,
    parents: Mapping[str, str] | None = None,
    **extra: Any,
) -> None:
    """Declare `folder` finished by writing its run.json, the last file of a run.

    `format` is "<name>/<version>"; `config` the resolved configuration; `started` an aware time; `parents` maps a role
    ("student", "features") to the SHA-256 of that folder's run.json; `extra` holds what only this format has.
    Hidden files and resume state are not hashed. Raises `UserError` if the folder cannot be written.
    """
    folder = Path(folder)
    record = {
        "format": format,
        "vidaccel": __version__,  # which a source tree that is not installed has as well
        **{package: metadata.version(package) for package in ("torch", "diffusers")},
        "command": command,
        "config": dict(config),
        "seed": seed,
        "started": _iso(started),
        "finished": _iso(datetime.now(UTC)),
        "parents": dict(parents or {}),
        "files": {name: sha256_file(folder / name) for name in _artefacts(folder)},
    }
    if clash := record.keys() & extra.keys():
        raise ValueError(f"run.json has its own meaning for {sorted(clash)}")
    write_json(folder / RUN_FILE, record | extra)


def read_run(folder: str | os.PathLike, format: str) -> dict[str, Any]:
    """The run.json of a finished folder of this `format`; raises `UserError` for anything else."""
    folder = Path(folder)
    name = format.partition("/")[0]
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}", f"give the path of a finished {name} folder")
    path = folder / RUN_FILE
    if not path.is_file():
        refuse_unfinished(folder)
        raise UserError(f"{folder} is not a finished {name} folder: it has no {RUN_FILE}", "run its command again")
    again = "run the command that makes it again"
    run = read_json(path, again)
    if not isinstance(run.get("files"), dict) or "format" not in run:
        raise UserError(f"{path} is damaged: it has no format or no files", again)
    if run["format"] != format:
        raise UserError(
            f"{folder} is of format {run['format']}, where {format} is needed",
            f"give the path of a {name} folder, or make it again with this version of vidaccel",
        )
    return run


def last_checkpoint(folder: str | os.PathLike) -> str | None:
    """The newest of a training in `folder`: "step 420" or, of one in stages, "step 20 of mse"; None where none is."""
    saved = list((Path(folder) / CHECKPOINTS).glob("**/step-*/state.json"))
    if not saved:
        return None
    last = max(saved, key=lambda file: file.stat().st_mtime).parent
    stage = "" if last.parent.name == CHECKPOINTS else f" of {last.parent.name}"
    return f"step {int(last.name.removeprefix('step-'))}{stage}"


def refuse_unfinished(folder: str | os.PathLike) -> None:
    """`UserError`, which says where it stands, if `folder` is of a run of ours that has begun and not ended."""
    folder = Path(folder)
    if (folder / RUN_FILE).exists():
        return
    step, shards = last_checkpoint(folder), len(list(folder.glob("shard-*.tar")))
    begun = step or shards or any(folder.glob("metrics.jsonl")) or any((folder / CHECKPOINTS).glob("*/metrics.jsonl"))
    if not begun:
        return
    stands = f"its training stands at {step}" if step else "its training has no checkpoint yet"
    raise UserError(
        f"{folder} is not finished: {f'{shards} of its shards are written' if shards else stands}",
        "run its command again, which goes on from there",
    )


def say_finished(folder: str | os.PathLike) -> None:
    """That a command was given again whose run is done, in which nothing changes."""
    finished = read_json(Path(folder) / RUN_FILE, "run its command again").get("finished", "")
    log.info(
        "already finished%s: %s stays as it is; for another one remove it, or choose another folder with -o",
        f" ({finished[:16].replace('T', ' ')})" if finished else "",
        folder,
    )


def check_output(folder: str | os.PathLike, format: str) -> None:
    """`check_writable` for a folder of this `format`, new or begun or finished before.

    Raises:
        UserError: it cannot be written, or what is in it is finished and of another format.
    """
    run_file = Path(folder) / RUN_FILE
    check_writable(run_file)
    try:
        found = json.loads(run_file.read_bytes())["format"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return  # nothing that is finished
    if found != format:
        raise UserError(f"{folder} is of format {found}, and this makes {format}", "choose another folder with -o")


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """What a refusal says of settings that are not those an artefact was begun with: "key was 1, now 2", key by key."""
    changed = [key for key in sorted(old.keys() | new.keys()) if old.get(key) != new.get(key)]
    return [f"{key} was {old.get(key)!r}, now {new.get(key)!r}" for key in changed]


def verify_files(folder: str | os.PathLike, run: Mapping[str, Any]) -> None:
    """Compare each file of `folder` with its hash in `run` (from `read_run`); files `run` does not list are let be, and
    so are trajectories, which earlier versions listed for a predictor.

    Reads every byte, except of files that are as they were when they were last read (file_hashes.py). Raises
    `UserError` naming the files that are missing or changed.
    """
    folder = Path(folder)
    listed = {name: digest for name, digest in run["files"].items() if _vouched(PurePosixPath(name))}
    missing = [name for name in listed if not (folder / name).is_file()]
    changed = [name for name, digest in listed.items() if name not in missing and file_sha256(folder / name) != digest]
    faults = [f"{', '.join(names)} {what}" for names, what in ((missing, "missing"), (changed, "changed")) if names]
    if faults:
        raise UserError(
            f"{folder} is not what its {RUN_FILE} describes: {'; '.join(faults)}",
            "copy the folder again from where it was made, or run its command again",
        )


def is_finished(folder: str | os.PathLike, format: str) -> bool:
    """Whether a run.json of this `format` vouches for all that `folder` holds of it."""
    try:
        verify_files(folder, read_run(folder, format))
    except UserError:
        return False
    return True


def _artefacts(folder: Path) -> list[str]:
    """Sorted names, relative and with forward slashes, of the files a finished folder vouches for."""
    paths = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return sorted(path.as_posix() for path in paths if _vouched(path))


def _vouched(path: PurePath) -> bool:
    hidden = any(part.startswith(".") or left_by_system(part) for part in path.parts)
    return not hidden and path.parts[:1] not in [(part,) for part in _APART]


def _iso(time: datetime) -> str:
    return time.astimezone(UTC).isoformat(timespec="seconds")


def _absolute(target: str | os.PathLike) -> Path:
    """What links lead to, without `..` and `.`, so that the last part is a name and `parents` reaches a folder."""
    return Path(os.path.realpath(target))


def _require_no_loop(target: Path) -> None:
    if target.is_symlink():  # followed already, as far as it leads anywhere
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(target))


def _temporary_name(target: Path) -> str:
    return f".{target.stem[:64]}.{secrets.token_hex(4)}{target.suffix}"


def _flush_to_disk(path: Path) -> None:
    """Before the rename, so that a power cut cannot leave the new name on empty contents."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def _parents_made(target: Path) -> Iterator[None]:
    made = [folder for folder in target.parents if not folder.exists()]
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        yield
    except BaseException:
        for folder in made:
            with contextlib.suppress(OSError):  # not empty: someone else uses it by now
                folder.rmdir()
        raise


def _errno(error: Exception) -> int | None:
    if isinstance(error, OSError):
        return error.errno
    match = _RUST_ERRNO.search(str(error))
    return int(match[1]) if match else None


def _is_about(error: Exception, target: Path) -> bool:
    """Whether it names the target, what is written on the way to it, or a folder that it is to lie in."""
    name = getattr(error, "filename", None)
    if not isinstance(name, str):
        return False
    path = _absolute(name)
    if not path.is_relative_to(target.parent) or path == target.parent:
        return target.is_relative_to(path)
    beside = path.relative_to(target.parent).parts[0]
    return beside == target.name or beside.startswith((".", f"{target.name}."))
