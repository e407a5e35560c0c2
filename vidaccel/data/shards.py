"""A feature folder: tensors with a record each, in tar shards that are read by seeking and survive a killed writer.

    shard-00000.tar       samples one after the other, each 00000000.json + 00000000.safetensors: webdataset's layout
    shard-00001.tar.part  the shard being written: always the first bytes of the finished one
    index.json            per shard its SHA-256, bytes and samples; written last, so a folder without it is unfinished
    .settings.json        what the samples were computed from: a re-run that would compute others is refused

Samples are computed in batches, and a re-run keeps every whole batch it finds, and says which samples it makes again
because the end of a shard is cut off or damaged. It cuts back to the last whole batch rather than the last sample
because the last bits of what a GPU computes can depend on what else is in the batch.
"""

import copy
import io
import json
import logging
import os
import tarfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from vidaccel.artefacts import check_writable, differences, explained, read_json, sha256_file, write_json
from vidaccel.data.buckets import Buckets, Size
from vidaccel.data.order import index_at
from vidaccel.errors import UserError
from vidaccel.file_hashes import file_sha256
from vidaccel.processes import by_first, on_first, sharing, world
from vidaccel.progress import Progress
from vidaccel.ranks import share

INDEX_FILE = "index.json"
_UNREADABLE = (OSError, ValueError, RecursionError, tarfile.TarError, SafetensorError)
SETTINGS_FILE = ".settings.json"
_MEND = "copy the folder again, or remove what is damaged and run the command that made it"

log = logging.getLogger(__name__)

Sample = tuple[dict[str, Tensor], dict[str, Any]]
"""Tensors by name, and a record that JSON can hold."""


@dataclass(frozen=True)
class _Span:
    """Where a sample is: its members, with their headers, are the `length` bytes from `offset`, themselves a tar."""

    key: str
    offset: int
    length: int
    kind: str
    size: list[int] | None = None
    """Of its video, where the folder has several."""

    def __post_init__(self):
        whole = isinstance(self.size, list) and all(type(each) is int for each in self.size)
        _require(self.size is None or whole, "a size is no list of whole numbers")
        _require(isinstance(self.key, str) and isinstance(self.kind, str), "a key or kind is no text")
        _require(type(self.offset) is int and type(self.length) is int, "an offset or length is no whole number")


@dataclass(frozen=True)
class _Shard:
    """One entry of index.json."""

    file: str
    sha256: str
    bytes: int
    samples: list[_Span]

    def __post_init__(self):
        _require(isinstance(self.file, str) and isinstance(self.sha256, str), "a file or sha256 is no text")
        _require(type(self.bytes) is int, "a number of bytes is no whole number")
        inside = all(0 <= span.offset < span.offset + span.length <= self.bytes for span in self.samples)
        _require(inside, f"a sample lies outside {self.file}")


def write_shards(
    folder: str | os.PathLike,
    compute: Callable[[list[int]], list[Sample]],
    *,
    count: int,
    kind: str,
    settings: Mapping[str, Any],
    per_shard: int = 256,
    batch_size: int = 1,
    title: str = "writing features",
    sizes: Sequence[Size] | None = None,
) -> None:
    """Write samples 0 ... `count` - 1 to `folder`, `per_shard` a shard, and then index.json.

    `compute` maps at most `batch_size` consecutive indices to their samples; tensors may be of any device and dtype.
    What an earlier, killed run stored is kept and not computed again. Of many processes each writes whole shards, and
    they may be as many as they were before or not. `settings` (what JSON can hold) is all that the
    samples depend on. `sizes` are those of the videos, which the index has where there are several. run.json is left to
    the caller.

    Raises:
        UserError: the folder was begun with other settings, cannot be written, or holds a damaged shard.
        ValueError: `compute` returned more or fewer samples than it was given indices.
    """
    if min(count, per_shard, batch_size) < 1:
        raise ValueError(f"{count=}, {per_shard=} and {batch_size=} must be at least 1")
    folder = Path(folder)
    check_writable(folder / INDEX_FILE)
    shards = {
        folder / f"shard-{number:05d}.tar": range(first, min(first + per_shard, count))
        for number, first in enumerate(range(0, count, per_shard))
    }

    def begin() -> list[range]:
        _require_settings(folder, {"count": count, "per_shard": per_shard, "kind": kind, **settings})
        _refuse_changed(folder)
        (folder / INDEX_FILE).unlink(missing_ok=True)
        return [_missing(shard, indices, batch_size) for shard, indices in shards.items()]

    missing = dict(zip(shards, by_first(begin), strict=True))
    unfinished = on_first(lambda: [shard for shard in shards if not shard.exists()])
    if 0 < len(unfinished) < world():
        log.info(
            "%d processes share %d shards: more of them have work with a smaller per_shard", world(), len(unfinished)
        )
    with sharing(title, total=count, done=count - sum(map(len, missing.values()))) as advance:
        for shard in share().of(unfinished):
            indices = missing[shard]
            for first in indices[::batch_size]:
                batch = range(first, min(first + batch_size, indices.stop))
                _append(shard, batch, compute(list(batch)))
                for _ in batch:
                    advance()
            _finish(shard)
    by_first(lambda: _write_index(folder, shards, kind, sizes if len(set(sizes or ())) > 1 else None))


def _write_index(folder: Path, shards: Mapping[Path, range], kind: str, sizes: Sequence[Size] | None) -> None:
    with Progress("hashing shards", total=len(shards)) as bar:
        entries = []
        for shard, indices in shards.items():
            entry = asdict(_describe(shard, indices, kind))
            for span, index in zip(entry["samples"], indices, strict=True):
                del span["size"]
                span |= {} if sizes is None else {"size": list(sizes[index])}
            entries.append(entry)
            bar.advance()
    write_json(folder / INDEX_FILE, {"shards": entries})


def sample_bytes(sample: Sample) -> int:
    """Bytes that a sample takes in a shard."""
    return len(_pack(_key(0), *sample))


def kinds_in(folder: str | os.PathLike) -> set[str]:
    """The kinds of samples that index.json lists, of damaged shards too; errors as of `ShardFolder`."""
    return {span.kind for shard in _read_index(Path(folder)) for span in shard.samples}


class ShardFolder:
    """The samples of a finished feature folder.

    `folder[i]` is (tensors by name, record), read from the shard at each call by seeking; no file stays open, so an
    instance may be shared by forked processes. Opening compares the shards' sizes with the index, `verify` their
    contents. Raises `UserError`, naming the file, if a shard or index.json is missing or damaged, if there is no sample
    or, where a `kind` is asked for, one of another kind.

    With `on_damage="skip"` opening reads every byte, names the shards that are missing or damaged in a warning and goes
    on without them, as long as one is whole.
    """

    def __init__(self, folder: str | os.PathLike, kind: str | None = None, *, on_damage: str = "stop"):
        self.folder = Path(folder)
        self._shards = _read_index(self.folder)
        if on_damage == "skip":
            self._shards = self._whole_shards()
        self._samples = [(shard.file, span) for shard in self._shards for span in shard.samples]
        sizes = [tuple(span.size or ()) for _, span in self._samples]
        self.buckets = Buckets(sizes) if len(set(sizes)) > 1 else None
        """Of videos of several sizes."""
        for shard in self._shards:
            path = self.folder / shard.file
            if not path.is_file():
                raise _damaged(path, "it is missing")
            if path.stat().st_size != shard.bytes:
                raise _damaged(path, f"it has {path.stat().st_size} bytes where {INDEX_FILE} says {shard.bytes}")
        others = {span.kind for _, span in self._samples} - {kind}
        if kind is not None and others:
            raise UserError(
                f"{self.folder} holds samples of kind {', '.join(sorted(others))}, where {kind} is needed",
                f"give the path of a feature folder of kind {kind}",
            )

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, index: int) -> Sample:
        file, span = self._samples[index]
        path = self.folder / file
        try:
            return _read_sample(path, span.key, span.offset, span.length)
        except _UNREADABLE as error:
            raise _damaged(path, f"sample {span.key} cannot be read ({error})") from error

    def read(self, indices: Sequence[int]) -> list[Sample]:
        """Those samples, which a folder that computes its own makes together."""
        return [self[i] for i in indices]

    def at(self, position: int, seed: int) -> int:
        """The index of the sample drawn at `position`, counted from 0 over all epochs."""
        return index_at(position, len(self), seed)

    def commonest(self) -> "ShardFolder":
        """The samples of the size that most have; the folder itself where all have one."""
        if self.buckets is None:
            return self
        return self.part(self.buckets.commonest)

    def part(self, indices: Iterable[int]) -> "ShardFolder":
        """Those samples, which are of one size."""
        some = copy.copy(self)
        some._samples, some.buckets = [self._samples[i] for i in indices], None
        return some

    def verify(self) -> None:
        """Read every byte and compare with the index; raises `UserError` naming the shards that differ."""
        if bad := [shard.file for shard in self._bad_shards()]:
            raise UserError(f"shards of {self.folder} are damaged or missing: {', '.join(bad)}", _MEND)

    def _bad_shards(self) -> list[_Shard]:
        bad = []
        with Progress("verifying shards", total=len(self._shards)) as bar:
            for shard in self._shards:
                path = self.folder / shard.file
                if not path.is_file() or sha256_file(path) != shard.sha256:
                    bad.append(shard)
                bar.advance()
        return bad

    def _whole_shards(self) -> list[_Shard]:
        bad = self._bad_shards()
        for shard in bad:
            log.warning(
                "left out %s, damaged or missing, with its %d samples", self.folder / shard.file, len(shard.samples)
            )
        whole = [shard for shard in self._shards if shard not in bad]
        if not any(shard.samples for shard in whole):
            raise UserError(f"every shard of {self.folder} is damaged or missing", _MEND)
        return whole


def _require(holds: bool, fault: str) -> None:
    if not holds:
        raise ValueError(fault)


def _damaged(path: Path, fault: str) -> UserError:
    return UserError(f"{path} is damaged: {fault}", _MEND)


def _require_settings(folder: Path, settings: dict[str, Any]) -> None:
    """Note `settings` in a new folder; raise `UserError` if this one was begun with others."""
    path = folder / SETTINGS_FILE
    if not path.exists():
        write_json(path, settings)
        return
    old, new = read_json(path, _MEND), json.loads(json.dumps(settings, default=os.fspath))
    if changed := differences(old, new):
        raise UserError(
            f"{folder} was begun with other settings ({'; '.join(changed)})",
            "give the same settings to continue it, or another folder to start afresh",
        )


def _part(shard: Path) -> Path:
    return shard.with_name(shard.name + ".part")


def _refuse_changed(folder: Path) -> None:
    """A finished shard has the bytes that index.json vouches for, or a new index would vouch for damaged ones. Shards
    that are cut short are found at the end."""
    try:
        shards = _read_index(folder)
    except UserError:
        return  # there is none, or it is to be made again
    for shard in shards:
        path = folder / shard.file
        if path.is_file() and path.stat().st_size == shard.bytes and file_sha256(path) != shard.sha256:
            raise _damaged(path, f"its bytes are not those that {INDEX_FILE} vouches for")


def _missing(shard: Path, indices: range, batch_size: int) -> range:
    """The `indices` still to be computed; cuts a part back to its last whole batch."""
    part = _part(shard)
    if shard.exists():
        return indices[:0]
    if not part.exists():
        return indices
    spans = _in_order(part, indices)
    kept = len(spans) // batch_size * batch_size
    end = sum(length for _, _, length in spans[:kept])
    if part.stat().st_size > end and kept < len(indices):
        log.warning("the end of %s is cut off or damaged: samples from %s on are made again", part, _key(indices[kept]))
    os.truncate(part, end)
    return indices[kept:]


def _in_order(part: Path, indices: range) -> list[tuple[str, int, int]]:
    """`_scan`, up to the first sample that is not the one to be there, and without those at the end that cannot be
    read: what was written last before a machine went down may be zeros."""
    found = zip(_scan(part), indices, strict=False)
    spans = [span for span, _ in takewhile(lambda pair: pair[0][0] == _key(pair[1]), found)]
    while spans:
        try:
            _read_sample(part, *spans[-1])
        except _UNREADABLE:
            spans.pop()
        else:
            break
    return spans


def _append(shard: Path, batch: range, samples: list[Sample]) -> None:
    if len(samples) != len(batch):
        raise ValueError(f"{len(samples)} samples were computed for {len(batch)} indices")
    with explained(shard), open(_part(shard), "ab") as part:
        part.writelines(_pack(_key(index), *sample) for index, sample in zip(batch, samples, strict=True))


def _finish(shard: Path) -> None:
    with explained(shard), open(_part(shard), "ab") as part:
        part.write(bytes(2 * tarfile.BLOCKSIZE))  # a tar's end
        part.flush()
        os.fsync(part.fileno())
        _part(shard).replace(shard)


def _describe(shard: Path, indices: range, kind: str) -> _Shard:
    spans = [_Span(*span, kind) for span in _scan(shard)]
    if [span.key for span in spans] != [_key(index) for index in indices]:
        raise _damaged(shard, f"its samples are not {_key(indices[0])} to {_key(indices[-1])}")
    return _Shard(shard.name, sha256_file(shard), shard.stat().st_size, spans)


def _key(index: int) -> str:
    return f"{index:08d}"


def _pack(key: str, tensors: dict[str, Tensor], record: dict[str, Any]) -> bytes:
    """A sample as it stands in a shard: a tar without its end. The same sample gives the same bytes."""
    from webdataset import TarWriter

    sample = {
        "__key__": key,
        "json": json.dumps(record).encode(),
        "safetensors": safetensors.torch.save({name: tensor.contiguous() for name, tensor in tensors.items()}),
    }
    buffer = io.BytesIO()
    writer = TarWriter(buffer, encoder=False, mtime=0, format="GNU_FORMAT")  # the default ends at 8 GiB a sample
    writer.write(sample)
    length = writer.tarstream.offset
    writer.close()
    return buffer.getvalue()[:length]


def _scan(path: Path) -> list[tuple[str, int, int]]:
    """(key, offset, length) of each whole sample of a shard or part; reads headers only."""
    size, spans, start = path.stat().st_size, [], 0
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                end = member.offset_data + -(-member.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
                key, _, suffix = member.name.partition(".")
                if suffix == "safetensors" and end <= size:
                    spans.append((key, start, end - start))
                    start = end
    except tarfile.ReadError:  # the end is missing
        pass
    return spans


def _read_sample(path: Path, key: str, offset: int, length: int) -> Sample:
    """Raises one of `_UNREADABLE` where that sample is not there, whole."""
    with open(path, "rb") as shard:
        shard.seek(offset)
        whole = io.BytesIO(shard.read(length))
    record, tensors = (_read_member(whole, f"{key}.{end}") for end in ("json", "safetensors"))
    return safetensors.torch.load(tensors), json.loads(record)


def _read_index(folder: Path) -> list[_Shard]:
    path = folder / INDEX_FILE
    if not path.is_file():
        raise UserError(
            f"{folder} is not a finished feature folder: it has no {INDEX_FILE}",
            "run the command that makes it (again, to continue it), or give the path of another",
        )
    try:
        index = json.loads(path.read_bytes())
        shards = [
            _Shard(**entry | {"samples": [_Span(**span) for span in entry["samples"]]}) for entry in index["shards"]
        ]
        _require(any(shard.samples for shard in shards), "it lists no sample")
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise _damaged(path, str(error)) from error
    return shards


def _read_member(whole: io.BytesIO, name: str) -> bytes:
    """Bytes of the next member, which must have this name. Opening a tar would take ten times as long."""
    member = tarfile.TarInfo.frombuf(whole.read(tarfile.BLOCKSIZE), "utf-8", "strict")
    _require(member.name == name, f"{name} is not where {INDEX_FILE} says")
    data = whole.read(member.size)
    _require(len(data) == member.size, f"{name} is cut short")
    whole.seek(-member.size % tarfile.BLOCKSIZE, io.SEEK_CUR)
    return data
