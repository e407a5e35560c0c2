"""One writer a folder: a lock that dies with the process that holds it.

The lock is the operating system's (flock) on a hidden file in the folder, so a killed process leaves none behind; the
file says who holds it. Where there are no such locks, on Windows and on some network file systems, a log line says so
and nothing is locked.
"""

import contextlib
import errno
import json
import logging
import os
import shlex
import socket
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

from vidaccel.artefacts import LOCK_FILE, explained
from vidaccel.errors import UserError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

_NO_LOCKS_HERE = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL}
_SHOWN = 200
"""Characters of the other process's command that a refusal repeats."""
log = logging.getLogger(__name__)


@contextlib.contextmanager
def locked(folder: str | os.PathLike) -> Iterator[None]:
    """Keep `folder` for this process for the time of a `with` block; it is made where it is missing.

    The file, and the folders that were made and stayed empty, leave with the block. Two blocks in one process shut each
    other out as well.

    Raises:
        UserError: another process has it, which the message names, or the folder cannot be written.
    """
    folder = Path(os.path.realpath(folder))
    if fcntl is None:
        log.info("this system has no file locks: nothing keeps two commands from writing to %s at once", folder)
        yield
        return
    made = [place for place in (folder, *folder.parents) if not os.path.lexists(place)]
    file = folder / LOCK_FILE
    try:
        handle = _acquired(file)
        try:
            yield
        finally:
            if handle is not None:
                if _names(file, handle):
                    file.unlink()
                os.close(handle)
    finally:
        for place in made:
            with contextlib.suppress(OSError):  # not empty: what was to be made is there
                place.rmdir()


def _acquired(file: Path) -> int | None:
    """An open handle that holds the lock; None where the file system has no locks."""
    assert fcntl is not None
    while True:
        with explained(file):
            file.parent.mkdir(parents=True, exist_ok=True)
            try:
                handle = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
            except FileNotFoundError:  # another process took its folder away between the two lines
                continue
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(handle, 65536, 0)
            os.close(handle)
            raise _refusal(file.parent, holder) from None
        except OSError as error:
            os.close(handle)
            if error.errno not in _NO_LOCKS_HERE:
                raise
            file.unlink(missing_ok=True)
            log.info(
                "the file system has no locks (%s): nothing keeps two commands from writing to %s at once",
                error.strerror,
                file.parent,
            )
            return None
        if _names(file, handle):
            break
        os.close(handle)  # its holder removed the file before this process had the lock
    with contextlib.suppress(OSError):  # a full disk: the lock holds, and no one is named
        os.truncate(handle, 0)
        os.pwrite(handle, json.dumps(_this_process()).encode(), 0)
    return handle


def _names(file: Path, handle: int) -> bool:
    """Whether the file of that name is the open one."""
    try:
        return os.path.samestat(os.stat(file), os.fstat(handle))
    except FileNotFoundError:
        return False


def _this_process() -> dict[str, str | int]:
    since = datetime.now(UTC).isoformat(timespec="seconds")
    return {"pid": os.getpid(), "host": socket.gethostname(), "since": since, "command": shlex.join(sys.orig_argv)}


def _refusal(folder: Path, holder: bytes) -> UserError:
    try:
        who = json.loads(holder)
        said = f"process {who['pid']} on {who['host']} since {who['since']}: {who['command'][:_SHOWN]}"
    except (ValueError, KeyError, TypeError):
        said = "a process that has not said who it is"
    return UserError(
        f"{folder} is being written by {said}", "wait until it has ended, or choose another folder with -o"
    )
