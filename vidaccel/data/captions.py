"""What the videos of a folder show, in whichever form that lies beside them; the first that is there is taken.

captions.jsonl              one {"file": "a.mp4", "caption": "..."} a line
NAME.csv or NAME.parquet    the only one of its kind: a column of files and one of captions
a.txt beside a.mp4          the caption of that one
"""

import codecs
import csv
import io
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from vidaccel.artefacts import own_files
from vidaccel.errors import UserError

CAPTIONS_FILE = "captions.jsonl"
COLUMNS = {
    "file": ("file", "file_name", "filename", "video", "path"),
    "caption": ("caption", "text", "prompt", "description"),
}
"""Names that a column may have, in the order in which they are looked for."""

Line = tuple[str, bytes | Mapping[str, Any]]
"""Where it stands, for messages; and a line of JSON, or a file and its caption."""


def read_captions(folder: Path) -> list[Line]:
    """One entry a video, unchecked.

    Raises:
        UserError: there are no captions in any form, or a table has no columns of that kind or cannot be read.
    """
    if (folder / CAPTIONS_FILE).is_file():
        return _lines(folder / CAPTIONS_FILE)
    for suffix, read in ((".csv", _csv), (".parquet", _parquet)):
        tables = own_files(folder, f"*{suffix}") if folder.is_dir() else []
        if len(tables) > 1:
            raise UserError(f"{folder} has {len(tables)} {suffix} files", "leave the one with the captions in it")
        if tables:
            return _rows(tables[0], read(tables[0]))
    if found := _beside(folder):
        return found
    raise UserError(
        f"{folder} is not a folder of clips: {f'it has no {CAPTIONS_FILE}' if folder.is_dir() else 'there is none'}",
        'write one line a video into it: {"file": "a.mp4", "caption": "..."}; a .csv or .parquet with columns file and '
        "caption is read as well, and a.txt beside a.mp4",
    )


def _lines(path: Path) -> list[Line]:
    """Numbered from 1, without the blank ones."""
    content = path.read_bytes().removeprefix(codecs.BOM_UTF8)
    lines = enumerate(content.splitlines(), start=1)
    return [(f"{path}, line {number}", line) for number, line in lines if line.strip()]


def _csv(path: Path) -> list[tuple[str, dict[str, Any]]]:
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is no UTF-8", "save it as UTF-8") from error
    reader = csv.DictReader(io.StringIO(text, newline=""))
    try:
        rows = [(f"line {reader.line_num}", row) for row in reader]
    except csv.Error as error:
        raise UserError(f"{path} is no table: {error}", "save it with commas between columns") from error
    return rows


def _parquet(path: Path) -> list[tuple[str, dict[str, Any]]]:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError as error:
        raise UserError(f"{path} is read by pyarrow, which is not installed", "pip install pyarrow") from error
    try:
        table = parquet.read_table(path)
    except (ArrowException, OSError) as error:
        raise UserError(f"{path} is no parquet file: {' '.join(str(error).split())}", "write it again") from error
    return [(f"row {number}", row) for number, row in enumerate(table.to_pylist(), start=1)]


def _rows(path: Path, rows: Iterable[tuple[str, Mapping[str, Any]]]) -> list[Line]:
    found: list[Line] = []
    for place, row in rows:
        chosen = {key: next((name for name in names if name in row), None) for key, names in COLUMNS.items()}
        for key, name in chosen.items():
            if name is None:
                raise UserError(
                    f"{path} has the columns {', '.join(map(str, row))}, and none of {key}s",
                    f"call one of them {', '.join(COLUMNS[key][:-1])} or {COLUMNS[key][-1]}",
                )
        found.append((f"{path}, {place}", {key: row[name] for key, name in chosen.items() if name}))
    return found


def _beside(folder: Path) -> list[Line]:
    """Of each file that has a text of its name beside it, by name."""
    files = own_files(folder) if folder.is_dir() else []
    texts = {path.stem: path for path in files if path.suffix.lower() == ".txt"}
    found: list[Line] = []
    for path in files:
        if path.suffix.lower() not in (".txt", ".json") and (text := texts.get(path.stem)) is not None:
            caption = text.read_bytes().decode("utf-8-sig", errors="surrogateescape")
            found.append((str(text), {"file": path.name, "caption": " ".join(caption.split())}))
    return found
