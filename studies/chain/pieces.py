"""What a chain made, as few files of limited size, and those put together again.

pieces.json     names of the parts with their SHA-256, and of files that were left out because the teacher has them
part-00 ...     an archive (tar) of the rest, cut up
"""

import hashlib
import io
import json
import shutil
import tarfile
from collections.abc import Iterable, Sequence
from pathlib import Path

from vidaccel.artefacts import CHECKPOINTS, TRAJECTORIES, atomic_folder, atomic_path, sha256_file
from vidaccel.errors import UserError

INDEX = "pieces.json"
LEFT_OUT = (CHECKPOINTS, TRAJECTORIES)
"""Folders that do not travel."""


def pack(folders: dict[str, Path], teacher: Path, output: Path, piece_bytes: int) -> list[Path]:
    """Write the pieces of `folders`, by the names that they are to have, into `output`; those of before are replaced.

    Files that lie in `teacher` as well, byte for byte, under the same name, are only named.
    """
    output.mkdir(parents=True, exist_ok=True)
    known = {path.relative_to(teacher).as_posix(): path for path in teacher.rglob("*") if path.is_file()}
    same: dict[str, str] = {}
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w") as tar:
        for name, folder in folders.items():
            for path in sorted(_files(folder)):
                inner = path.relative_to(folder).as_posix()
                if inner in known and sha256_file(known[inner]) == sha256_file(path):
                    same[f"{name}/{inner}"] = inner
                else:
                    tar.add(path, f"{name}/{inner}")
    content = archive.getvalue()
    parts = [content[first : first + piece_bytes] for first in range(0, len(content), piece_bytes)]
    written = []
    for number, part in enumerate(parts):
        written.append(output / f"part-{number:02d}")
        with atomic_path(written[-1]) as temporary:
            temporary.write_bytes(part)
    hashes = {path.name: hashlib.sha256(part).hexdigest() for path, part in zip(written, parts, strict=True)}
    with atomic_path(output / INDEX) as temporary:
        temporary.write_text(json.dumps({"parts": hashes, "of_teacher": same}, indent=1))
    for old in set(output.glob("part-*")) - set(written):
        old.unlink()
    return [output / INDEX, *written]


def join(files: Sequence[Path], teacher: Path, output: Path) -> list[str]:
    """Put what `pack` wrote into the folder `output`, which is new; returns the names of the folders in it.

    Raises:
        UserError: a piece is missing or damaged, or a file that the teacher should have is not there.
    """
    by_name = {path.name: path for path in files}
    if INDEX not in by_name:
        raise UserError(f"{INDEX} is not among the pieces", "name all files that the chain wrote")
    index = json.loads(by_name[INDEX].read_text(encoding="utf-8"))
    content = b"".join(_part(by_name, name, digest) for name, digest in index["parts"].items())
    with atomic_folder(output) as folder:
        with tarfile.open(fileobj=io.BytesIO(content)) as tar:
            tar.extractall(folder, filter="data")
        for name, inner in index["of_teacher"].items():
            if not (teacher / inner).is_file():
                raise UserError(f"{teacher} has no {inner}", "unpack where the teacher of the chain is")
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(teacher / inner, folder / name)
        return sorted(path.name for path in folder.iterdir())


def ship(made: Path, weights: Path, machine: str | None) -> list[str]:
    """Put what `join` made into the folder of the sprites world's weights, in place of what is there; returns the names
    of the parts. They are made whole beside their places first.

    Raises:
        UserError: a part is not finished, or of another teacher than the one in `weights`.
    """
    from vidaccel.worlds.sprites import ship as sprites

    distilled = made / "cfg" if (made / "cfg").exists() else None
    parts = {
        "student": lambda to: sprites.ship_student(made / "student", distilled, None, "", to, machine),
        "predictor": lambda to: sprites.ship_predictor(made / "predictor", None, to),
        "scalars": lambda to: sprites.ship_scalars(made / "scalars", to),
    }
    there = [name for name in parts if (made / name).exists()]
    for name in there:
        parts[name](made / "shipped" / name)
    for name in there:
        shutil.rmtree(weights / name, ignore_errors=True)
        shutil.move(made / "shipped" / name, weights / name)
    return there


def _part(by_name: dict[str, Path], name: str, digest: str) -> bytes:
    if name not in by_name:
        raise UserError(f"the piece {name} is missing", "name all files that the chain wrote")
    content = by_name[name].read_bytes()
    if hashlib.sha256(content).hexdigest() != digest:
        raise UserError(f"the piece {by_name[name]} is damaged", "copy it again from where it was made")
    return content


def _files(folder: Path) -> Iterable[Path]:
    for path in folder.rglob("*"):
        inner = path.relative_to(folder).parts
        if path.is_file() and not set(inner) & set(LEFT_OUT) and not path.name.startswith("."):
            yield path
