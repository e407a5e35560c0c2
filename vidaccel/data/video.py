"""Video files to arrays and back: imageio-ffmpeg's ffmpeg reads (pillow: WebP) and writes mp4, pillow gif and png.

Frames are uint8 RGB, numpy [T, H, W, 3]. Writing is atomic, and the same frames give the same bytes: ffmpeg runs on
one thread and leaves versions and dates out of the file. imageio-ffmpeg is imported where it is used, so that training
on encoded features and timing do not need it.

T frames, H height, W width
"""

import contextlib
import errno
import functools
import os
import stat
import subprocess
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from types import ModuleType

import numpy as np
from PIL import Image, ImageDraw

from vidaccel.artefacts import atomic_folder, atomic_path, check_writable, own_files
from vidaccel.data import ffmpeg, webp
from vidaccel.data.ffmpeg import BadClip
from vidaccel.data.labels import drawable
from vidaccel.errors import UserError

GIF_MAX_FPS = 50  # a gif counts time in 1/100 s, and browsers play anything under 2 of those at a tenth of the speed
_SEPARATOR = 2  # pixels between the frames of a contact sheet
_LABEL_HEIGHT = 16  # pixels


def check_output(path: str | os.PathLike) -> None:
    """Raise the `UserError` that `write_video` to `path` would end in; to be called before the expensive work."""
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix not in ("", ".mp4", ".gif"):
        raise UserError(
            f"cannot write {path}: {suffix} is not a kind of video that can be written",
            "end the name in .mp4 or .gif, or give it no suffix for a folder of PNGs",
        )
    if suffix and path.is_dir():
        raise UserError(f"cannot write {path}: a folder of that name exists", "choose another name")
    if not suffix and path.exists() and not _is_frame_folder(path):
        raise UserError(
            f"cannot write {path}: it exists and is not a folder of frames, which may be replaced",
            "give the name of a new folder, or end it in .mp4 or .gif",
        )
    check_writable(path)


def write_video(frames: np.ndarray, path: str | os.PathLike, fps: float) -> None:
    """Write frames [T, H, W, 3] uint8 at `fps` frames/s as .mp4, .gif, or, without a suffix, a folder of 00000.png ...

    A folder of frames that is there already is replaced. Raises `UserError` for what `check_output` names, a full disk,
    an odd height or width in an mp4 and a frame rate a gif cannot hold.
    """
    _require_frames(frames)
    check_output(path)
    path = Path(path)
    write = {".mp4": _write_mp4, ".gif": _write_gif, "": _write_pngs}[path.suffix.lower()]
    write(frames, path, fps)


def check_sheet(path: str | os.PathLike) -> None:
    """Raise the `UserError` that `contact_sheet` to `path` would end in; to be called before the expensive work."""
    if Path(path).suffix.lower() != ".png":
        raise UserError(f"cannot write {path}: a contact sheet is a PNG", "end its name in .png")
    check_writable(path)


def contact_sheet(
    videos: Sequence[np.ndarray], path: str | os.PathLike, frames: int = 8, labels: Sequence[str] | None = None
) -> None:
    """Write one PNG with a row for each video [T, H, W, 3] uint8: `frames` of its frames, evenly spaced, first to last.

    A shorter video shows each frame it has. `labels`, one a video, stand above the rows. Raises `UserError` for another
    suffix than .png and for a place that cannot be written.
    """
    check_sheet(path)
    if not videos or (labels is not None and len(labels) != len(videos)):
        raise ValueError(f"a contact sheet needs videos and one label each, not {len(videos)} and {labels}")
    rows = []
    for video in videos:
        _require_frames(video)
        chosen = np.linspace(0, len(video) - 1, min(frames, len(video))).round().astype(int)
        padded = np.pad(video[chosen], [(0, 0), (0, _SEPARATOR), (0, _SEPARATOR), (0, 0)], constant_values=255)
        rows.append(np.concatenate(list(padded), axis=1))
    label_height = _LABEL_HEIGHT if labels is not None else 0
    height = sum(row.shape[0] + label_height for row in rows)
    sheet = Image.new("RGB", (max(row.shape[1] for row in rows), height), "white")
    draw, top = ImageDraw.Draw(sheet), 0
    for i, row in enumerate(rows):
        if labels is not None:
            label, font = drawable(labels[i])
            draw.text((_SEPARATOR, top + _SEPARATOR), label, fill="black", font=font)
        sheet.paste(Image.fromarray(row), (0, top + label_height))
        top += row.shape[0] + label_height
    with atomic_path(path) as temporary:
        sheet.save(temporary)


def side_by_side(videos: Sequence[np.ndarray], labels: Sequence[str]) -> np.ndarray:
    """Videos [T, H, W, 3] uint8 of one size as one, [T, H + a line for labels, ..., 3], from left to right."""
    drawn = []
    for video, text in zip(videos, labels, strict=True):
        _require_frames(video)
        strip = Image.new("RGB", (video.shape[2], _LABEL_HEIGHT), "white")
        label, font = drawable(text)
        ImageDraw.Draw(strip).text((_SEPARATOR, _SEPARATOR), label, fill="black", font=font)
        line = np.broadcast_to(np.asarray(strip), (len(video), *np.asarray(strip).shape))
        drawn.append(np.concatenate([line, video], axis=1))
    gap = np.full((*drawn[0].shape[:2], _SEPARATOR, 3), 255, dtype=np.uint8)
    return np.concatenate([part for each in drawn for part in (gap, each)][1:], axis=2)


def read_video(
    path: str | os.PathLike, *, fps: float, num_frames: int, height: int, width: int, start: float = 0.0
) -> np.ndarray:
    """Decode `num_frames` frames at `fps` frames/s from `start` seconds on: [num_frames, height, width, 3] uint8.

    Frame i is the source's frame nearest in time to start + i / fps, as it is shown: upright, with square pixels,
    deinterlaced, HDR tone mapped to SDR. It is scaled, antialiased, until it just covers height x width, and cropped at
    the centre. The source is decoded from its first frame on, wherever `start` is. Raises `BadClip` with the reason.
    """
    path = Path(path)
    source, listing, indices = _plan(path, fps, num_frames, start)
    needed, inverse = np.unique(indices, return_inverse=True)
    frames = source.decode(path, listing, needed.tolist())
    with contextlib.closing(frames):
        return np.stack([cover(frame, height, width, listing.pixel_aspect) for frame in frames])[inverse]


def probe_video(path: str | os.PathLike, *, fps: float, num_frames: int, start: float = 0.0) -> tuple[float, float]:
    """Height and width of the picture as it is shown, in its lines.

    Raises:
        BadClip: that which `read_video` would, found by decoding the source up to the last frame that it needs.
    """
    _, listing, _ = _plan(Path(path), fps, num_frames, start)
    return listing.height, listing.width * listing.pixel_aspect


def _plan(path: Path, fps: float, num_frames: int, start: float) -> tuple[ModuleType, ffmpeg.Listing, np.ndarray]:
    """The module that reads the file, the frames it has found, and which of them are wanted: int [num_frames]."""
    source = webp if webp.is_webp(_head(path)) else ffmpeg
    wanted = start + np.arange(num_frames) / fps
    state = path.stat()
    key = (state.st_ino, state.st_size, state.st_mtime_ns)
    listing = _listed(source is webp, path.absolute(), float(wanted[-1]), key)
    begin = listing.times
    if wanted[-1] > begin[-1] and wanted[-1] >= listing.end:
        held = int(((wanted <= begin[-1]) | (wanted < listing.end)).sum())
        raise BadClip(f"too short: {listing.end:.3g} s, which are {held} of {num_frames} frames at {fps:g} fps")
    return source, listing, np.searchsorted((begin[1:] + begin[:-1]) / 2, wanted)


@functools.lru_cache(maxsize=4096)
def _listed(by_pillow: bool, path: Path, until: float, state: tuple[int, int, int]) -> ffmpeg.Listing:
    """The frames of a file, listed once while its `state` stays: that costs as much as reading them does."""
    return (webp if by_pillow else ffmpeg).list_frames(path, until)


def _head(path: Path) -> bytes:
    """The first bytes of a file; raises `BadClip` if it is none, or may not be read."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise BadClip("no such file")
        with path.open("rb") as file:
            head = file.read(12)
    except (FileNotFoundError, NotADirectoryError, ValueError) as error:  # the last for a name that no file can have
        raise BadClip("no such file") from error
    except OSError as error:
        raise BadClip(f"it cannot be read: {error.strerror}") from error
    if not head:
        raise BadClip("the file is empty")
    return head


def cover(frame: np.ndarray, height: int, width: int, pixel_aspect: float = 1.0) -> np.ndarray:
    """The largest centred part of frame [H, W, 3] that has the shape height : width on screen, scaled to it."""
    source_height, source_width = frame.shape[:2]
    crop_width = min(source_width, source_height * width / height / pixel_aspect)
    crop_height = min(source_height, source_width * height / width * pixel_aspect)
    left, right = (source_width - crop_width) / 2, (source_width + crop_width) / 2
    top, bottom = (source_height - crop_height) / 2, (source_height + crop_height) / 2
    image = Image.fromarray(frame).resize(
        (width, height), Image.Resampling.BICUBIC, box=(left, top, right, bottom)
    )  # pillow widens the filter when it shrinks, which is the antialiasing
    return np.asarray(image)


def _write_mp4(frames: np.ndarray, path: Path, fps: float) -> None:
    """H.264, 4:2:0, as every player takes it; converted to and tagged as BT.709, since players guess when not told."""
    height, width = frames.shape[1:3]
    if height % 2 or width % 2:
        raise UserError(
            f"cannot write {path}: an mp4 needs an even height and width, not {height} x {width}",
            "make the video a pixel larger or smaller, or write a .gif or a folder of PNGs",
        )
    # fmt: off
    options = [
        "-v", "error", "-y", "-threads", "1",
        "-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{width}x{height}", "-r", _rate(fps), "-i", "pipe:",
        "-vf", "scale=out_color_matrix=bt709:out_range=tv:flags=bicubic+accurate_rnd+full_chroma_int",
        "-colorspace", "bt709", "-color_primaries", "bt709", "-color_trc", "bt709", "-color_range", "tv",
        "-c:v", "libx264", "-crf", "12", "-pix_fmt", "yuv420p", "-threads", "1",
        "-fflags", "+bitexact", "-flags:v", "+bitexact", "-movflags", "+faststart", "-f", "mp4",
    ]
    # fmt: on
    with atomic_path(path) as temporary:
        # On any exception `subprocess.run` kills ffmpeg before it lets the exception through.
        done = subprocess.run(
            [ffmpeg.executable(), *options, str(temporary)],
            input=np.ascontiguousarray(frames).reshape(-1).data,
            capture_output=True,
        )
        if done.returncode:
            said = done.stderr.decode(errors="replace").strip()
            if os.strerror(errno.ENOSPC) in said:
                raise OSError(errno.ENOSPC, said)
            raise RuntimeError(f"ffmpeg failed with status {done.returncode} on {path}: {said}")


def _write_gif(frames: np.ndarray, path: Path, fps: float) -> None:
    """Endless loop; each frame has its own palette of 256, and lasts a whole number of 1/100 s without drift."""
    if fps > GIF_MAX_FPS:
        raise UserError(
            f"cannot write {path}: a gif plays at most {GIF_MAX_FPS} frames a second, not {fps:g}", "write an .mp4"
        )
    ends = np.round(np.arange(len(frames) + 1) * 100 / fps).astype(int)
    # On smooth colours this method errs half as much as pillow's default.
    images = [Image.fromarray(frame).quantize(256, Image.Quantize.MAXCOVERAGE) for frame in frames]
    with atomic_path(path) as temporary:
        images[0].save(
            temporary, save_all=True, append_images=images[1:], duration=(np.diff(ends) * 10).tolist(), loop=0
        )


def _write_pngs(frames: np.ndarray, path: Path, fps: float) -> None:
    with atomic_folder(path) as temporary:
        for i, frame in enumerate(frames):
            Image.fromarray(frame).save(temporary / f"{i:05d}.png")


def _is_frame_folder(path: Path) -> bool:
    return path.is_dir() and all(file.suffix == ".png" and file.stem.isdecimal() for file in own_files(path))


def _require_frames(frames: np.ndarray) -> None:
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] != 3 or 0 in frames.shape:
        raise ValueError(f"frames must be uint8 [T, H, W, 3] and not empty, not {frames.dtype} {list(frames.shape)}")


def _rate(fps: float) -> str:
    """As ffmpeg's exact fraction: 23.976 is 24000/1001 and 8.0 is 8/1."""
    fraction = Fraction(fps).limit_denominator(1001)
    return f"{fraction.numerator}/{fraction.denominator}"
