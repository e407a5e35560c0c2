"""The frames of a WebP file, through pillow, since few builds of ffmpeg read animated ones. The same two functions as
data/ffmpeg.py."""

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from vidaccel.data.ffmpeg import DAMAGED, BadClip, Listing


def is_webp(head: bytes) -> bool:
    """Whether a file that begins so, with 12 bytes or more, is one."""
    return head[:4] == b"RIFF" and head[8:12] == b"WEBP"


def list_frames(path: Path, until: float) -> Listing:
    """All frames of a file, decoded to see that they can be. Raises `BadClip`."""
    begins = [0]  # milliseconds
    with _open(path) as image:
        for i in range(getattr(image, "n_frames", 1)):
            image.seek(i)
            image.load()
            begins.append(begins[-1] + image.info.get("duration", 0))
    seconds = np.array(begins) / 1000
    return Listing(times=seconds[:-1], end=float(seconds[-1]), height=image.height, width=image.width)


def decode(path: Path, listing: Listing, indices: Sequence[int]) -> Iterator[np.ndarray]:
    """Those frames of a file, [H, W, 3] uint8 RGB each. Raises `BadClip`."""
    with _open(path) as image:
        for index in indices:
            image.seek(index)
            yield np.asarray(image.convert("RGB"))


@contextlib.contextmanager
def _open(path: Path) -> Iterator[Image.Image]:
    try:
        with Image.open(path) as image:
            yield image
    except (OSError, EOFError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise BadClip(DAMAGED) from error
