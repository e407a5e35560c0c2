"""A folder of raw clips: videos of any size and frame rate, and their captions (captions.py says in which forms).

Every clip is checked once, when the folder is opened; bad ones are named in a warning and left out, and too large a
share of them is an error. Clips are decoded when asked for, so a folder of any length costs no memory.

C channels (3, RGB), T frames, H height, W width
"""

import json
import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vidaccel.artefacts import atomic_path, check_writable
from vidaccel.data.buckets import Size, nearest
from vidaccel.data.captions import CAPTIONS_FILE, read_captions
from vidaccel.data.video import BadClip, probe_video, read_video, write_video
from vidaccel.errors import UserError
from vidaccel.progress import Progress
from vidaccel.prompts import is_whole

_REASONS_SHOWN = 3
_LONGEST_NAME = 255

logger = logging.getLogger(__name__)


class ClipFolder:
    """The usable clips of a folder, each cut to the same frames, rate and size, or to one of a few sizes.

    `clips[i]` is (video float32 [C, T, H, W] in [-1, 1], caption), decoded from the start of the file at each call; it
    raises `BadClip` if a clip that passed the check fails further in. `skipped` holds the reasons why some of
    the captions were left out. Raises `UserError` if the folder has no captions, no usable clip, or a share of
    bad lines above `max_bad_share`.
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        *,
        num_frames: int,
        height: int,
        width: int,
        fps: float,
        max_bad_share: float = 0.1,
        sizes: Sequence[Size] = (),
    ):
        """Each clip is brought to num_frames, height and width, or to the nearest of `sizes` where there are some."""
        self.folder = Path(folder)
        self.num_frames, self.height, self.width, self.fps = num_frames, height, width, fps
        self._known = list(sizes) or [(num_frames, height, width)]
        self.sizes: list[Size] = []
        self.files: list[str] = []
        self.captions: list[str] = []
        self.skipped: list[str] = []
        lines = read_captions(self.folder)
        with Progress("checking clips", total=len(lines)) as bar:
            for place, line in lines:
                self._admit(place, line)
                bar.advance()
        self._require_enough(len(lines), max_bad_share)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, str]:
        path, (num_frames, height, width) = self.folder / self.files[index], self.sizes[index]
        try:
            frames = read_video(path, fps=self.fps, num_frames=num_frames, height=height, width=width)  # [T, H, W, C]
        except BadClip as error:
            raise BadClip(f"{path}: {error}") from error
        video = torch.from_numpy(frames).permute(3, 0, 1, 2).contiguous().float()
        return video / 127.5 - 1, self.captions[index]

    def _admit(self, named: str, line: bytes | Mapping[str, Any]) -> None:
        """Add the clip a line describes, or its fault to `skipped`."""
        try:
            file, caption = _parse(line)
            named += f" ({file})"
            self._require_order(file, caption)
            size = self._size(self.folder / file)
        except (BadClip, OSError, ValueError) as error:  # the last for a name that no file can have
            reason = error.strerror if isinstance(error, OSError) else error
            self.skipped.append(f"{named}: {reason}")
            logger.warning("skipped %s", self.skipped[-1])
        else:
            self.files.append(file)
            self.captions.append(caption)
            self.sizes.append(size)

    def _size(self, path: Path) -> Size:
        """The one of those known that a clip is brought to; `BadClip` if it has too few frames for any."""
        if len(self._known) == 1:
            probe_video(path, fps=self.fps, num_frames=self._known[0][0])
            return self._known[0]
        *longer, shortest = sorted({frames for frames, _, _ in self._known}, reverse=True)
        for frames in longer:
            try:
                height, width = probe_video(path, fps=self.fps, num_frames=frames)
            except BadClip:
                continue
            return nearest([size for size in self._known if size[0] <= frames], width / height, height)
        height, width = probe_video(path, fps=self.fps, num_frames=shortest)
        return nearest([size for size in self._known if size[0] == shortest], width / height, height)

    def _require_order(self, file: str, caption: str) -> None:
        if len(caption) < _LONGEST_NAME and not (self.folder / file).exists() and (self.folder / caption).is_file():
            raise BadClip('"file" and "caption" are swapped: its caption is the name of a file')

    def _require_enough(self, total: int, max_bad_share: float) -> None:
        if self.files and len(self.skipped) <= max_bad_share * total:
            if len(self.skipped) > 1:
                logger.warning("%d of %d clips in %s are left out", len(self.skipped), total, self.folder)
            return
        first = "; ".join(self.skipped[:_REASONS_SHOWN])
        fewest = min(frames for frames, _, _ in self._known)
        raise UserError(
            f"{len(self.skipped)} of {total} clips in {self.folder} cannot be used{': ' if first else ''}{first}",
            f"mend or remove them: at least one clip must be left, and at most {max_bad_share:.0%} may be bad; "
            f"of shorter clips less can be asked: num_frames= (now {fewest}) and fps= (now {self.fps:g})",
        )


def write_clips(folder: str | os.PathLike, clips: Iterable[tuple[np.ndarray, str]], fps: float) -> None:
    """Write (frames [T, H, W, C] uint8, caption) pairs as 00000.mp4 ... and captions.jsonl, which comes last.

    Without its captions.jsonl the folder is unfinished, so an old one is removed first. Raises what `write_video` does.
    """
    folder = Path(folder)
    check_writable(folder / CAPTIONS_FILE)
    (folder / CAPTIONS_FILE).unlink(missing_ok=True)
    lines = []
    for i, (frames, caption) in enumerate(clips):
        file = f"{i:05d}.mp4"
        write_video(frames, folder / file, fps)
        lines.append(json.dumps({"file": file, "caption": caption}, ensure_ascii=False) + "\n")
    with atomic_path(folder / CAPTIONS_FILE) as temporary:
        temporary.write_text("".join(lines), encoding="utf-8")


def _parse(line: bytes | Mapping[str, Any]) -> tuple[str, str]:
    """File and caption of one line of captions.jsonl, or of what other forms hold; raises `BadClip`."""
    try:
        record = json.loads(line) if isinstance(line, bytes) else dict(line)
    except (ValueError, RecursionError) as error:  # not JSON, or not UTF-8
        raise BadClip("the line is no JSON") from error
    if not isinstance(record, dict):
        raise BadClip("the line is no JSON object")
    for key in ("file", "caption"):
        if not isinstance(record.get(key), str) or not record[key].strip():
            raise BadClip(f'"{key}" is missing, empty or no text')
        if not is_whole(record[key]):
            raise BadClip(f'"{key}" has half of a character (a lone surrogate)')
    return record["file"], record["caption"].strip()
