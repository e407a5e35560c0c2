"""Beside videos a hidden folder that has a file for each, which says what it was made of: so a command that makes many
knows which are there.

videos/0003.mp4
videos/.made/0003.json     {"made_of": ..., "sha256": of the video, "record": what is said of it}
"""

import json
from pathlib import Path
from typing import Any

from vidaccel.artefacts import sha256_file, write_json


def note_of(video: Path) -> Path:
    return video.parent / ".made" / f"{video.stem}.json"


def noted(video: Path, made_of: dict[str, Any]) -> dict[str, Any] | None:
    """The record of a video that is there, whole, and was made of this; else None."""
    try:
        note = json.loads(note_of(video).read_bytes())
        same = note["made_of"] == json.loads(json.dumps(made_of)) and note["sha256"] == sha256_file(video)
        return note["record"] if same else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def forget(video: Path) -> None:
    """Before another one is written in its place."""
    note_of(video).unlink(missing_ok=True)


def note(video: Path, made_of: dict[str, Any], record: dict[str, Any]) -> None:
    """Say of a video that was just written what it was made of."""
    write_json(note_of(video), {"made_of": made_of, "sha256": sha256_file(video), "record": record})
