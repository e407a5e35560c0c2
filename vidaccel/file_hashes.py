"""SHA-256 of files, read once: a hash is known again by the file's path, size and times of change.

Weights are tens of GB, and each load, distillation and attachment asks for their hashes. Those of large files are also
kept for later processes, in $XDG_CACHE_HOME/vidaccel/hashes.json (~/.cache without that variable); a cache that cannot
be read or written is done without. Deleting it has every file read again, which is also the way to find bytes that a
disk lost without a change of the file's times.
"""

import contextlib
import hashlib
import json
import os
import secrets
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

from vidaccel.errors import UserError

LARGE = 2**24
"""Bytes of a file whose hash is worth a place in the cache."""
SETTLED = 2.0
"""Seconds since a file's last change from which its hash is kept: times of file systems are as coarse as that, and a
second change in the same tick would not show."""

_known: dict[str, tuple[list[int], str]] = {}
"""(size and times in ns, SHA-256) by resolved path."""


def file_sha256(path: str | os.PathLike) -> str:
    """Hex SHA-256 of a file's bytes, which are read unless the file is as it was when they were read before."""
    resolved = os.path.realpath(path)
    state = _state(resolved)
    known = _known.get(resolved)
    if known is None and state[0] >= LARGE:
        known = _stored().get(resolved)
    if known is not None and list(known[0]) == state:
        _known[resolved] = known[0], known[1]
        return known[1]
    settled = time.time() - max(state[1:]) / 1e9 > SETTLED
    with open(resolved, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if settled and _state(resolved) == state:
        _known[resolved] = state, digest
        if state[0] >= LARGE:
            _store(resolved, state, digest)
    return digest


class FileHashes(Mapping[str, str]):
    """SHA-256 of files by name, each read when it is first asked for; `UserError` if the file has changed by then."""

    def __init__(self, files: Mapping[str, Path]):
        self._files = {name: (path, _state(path)) for name, path in files.items()}
        self._made: dict[str, str] = {}

    @property
    def files(self) -> dict[str, Path]:
        """The files themselves."""
        return {name: path for name, (path, _) in self._files.items()}

    def __getitem__(self, name: str) -> str:
        if name not in self._made:
            path, state = self._files[name]
            if not path.is_file() or _state(path) != state:
                raise UserError(f"{path} has changed since it was loaded", "load the model again")
            self._made[name] = file_sha256(path)
        return self._made[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)

    def __or__(self, other: Mapping[str, str]) -> dict[str, str]:
        return dict(self) | dict(other)


def cache_file() -> Path:
    """Where hashes are kept for later processes."""
    root = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(root) / "vidaccel" / "hashes.json"


def _state(path: str | os.PathLike) -> list[int]:
    """Size and times of change of a file."""
    found = os.stat(path)
    return [found.st_size, found.st_mtime_ns, found.st_ctime_ns]


def _stored() -> dict[str, tuple[list[int], str]]:
    """What the cache holds, without entries that make no sense; nothing if it cannot be read."""
    try:
        content = json.loads(cache_file().read_bytes())
        return {path: (state, digest) for path, (state, digest) in content.items() if len(digest) == 64}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


def _store(path: str, state: list[int], digest: str) -> None:
    """Add an entry; those of files that are gone leave. Of two processes at once one may lose its own."""
    entries = {old: kept for old, kept in _stored().items() if os.path.exists(old)} | {path: (state, digest)}
    target = cache_file()
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}")
    with contextlib.suppress(OSError):
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            temporary.write_text(json.dumps(entries), encoding="utf-8")
            temporary.replace(target)
        finally:
            temporary.unlink(missing_ok=True)
