"""The frames of a video file, through the ffmpeg of imageio-ffmpeg: which there are, then those that are wanted.

Both passes decode from the first frame on, on one thread, so frame n is the n-th that comes out, whatever the container
says: AVI and MPEG-PS hold no usable timestamps, a transport stream may start before its first key frame, so nothing
seeks. The first pass prints the frames' times and shape (`showinfo`; no ffprobe is bundled) and stops decoding at the
last wanted time; the rest of the file is read without decoding, so that one which was cut off is noticed. The second
converts the wanted frames and hands them over.

ffmpeg turns and mirrors frames as the display matrix says. Interlaced frames are deinterlaced, one for one; HDR is tone
mapped to BT.709.

N frames listed, H height, W width
"""

import functools
import re
import shutil
import signal
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np

from vidaccel.errors import UserError

_HDR = {"smpte2084", "arib-std-b67"}  # PQ and HLG, as ffmpeg calls them
# White of 203 cd/m2 (BT.2408) becomes SDR's 1; mobius leaves what is darker than 0.3 of that alone.
_TONE_MAP = (
    "zscale=tin={hdr}:pin=bt2020:min=2020_ncl:t=linear:npl=203,format=gbrpf32le,zscale=p=bt709,tonemap=mobius,"
    "zscale=t=bt709:m=bt709:r=limited,format=yuv444p"
)
_DEINTERLACE = "bwdif=mode=send_frame:deint=interlaced"
_SLACK = 0.001  # seconds: ffmpeg rounds the time at which it stops

# ffmpeg's threads write whole messages to one log; those of one line can have another thread's between them.
_FRAME = re.compile(
    r"n: *\d+ pts: *(?P<pts>\S+) +pts_time:\S+ +(?:duration: *(?P<duration>\d+) )?"
    r".*? sar:(?P<aspect>\d+/\d+) s:(?P<width>\d+)x(?P<height>\d+) i:(?P<scan>.)"
)
_CONFIGURED = re.compile(r"config in time_base: (\d+/\d+)")
_DECODED = re.compile(r"decoder -> ")
_DAMAGED = re.compile(r"Error (submitting|processing) packet (to|in) decoder|corrupt decoded frame")
_LOST = re.compile(r"partial file|File ended prematurely|CRC mismatch")
_NO_DECODER = re.compile(r"no decoder found|doesn't support hardware accelerated \w+ decoding")
_CODEC = re.compile(r"Stream #0:\d+.*?: Video: (?P<name>\w+)(?: \([^/()]*\))*(?: \((?P<tag>\S+) / 0x)?")
_TURNED = re.compile(r"[Dd]isplay ?[Mm]atrix: rotation of (-?\d+\.\d+) degrees")

_HINT = "install imageio-ffmpeg, which brings one, or let IMAGEIO_FFMPEG_EXE name an ffmpeg of version 7 or later"

DAMAGED = "its frames cannot be decoded: damaged or cut off"


class BadClip(Exception):
    """A video that cannot be used; the message is the reason, without the file's name."""


def executable() -> str:
    """The path of ffmpeg, or `UserError`."""
    import imageio_ffmpeg

    try:
        path = imageio_ffmpeg.get_ffmpeg_exe()
    except RuntimeError as error:  # what it raises where it brings none
        raise UserError("there is no ffmpeg, which reads and writes videos", _HINT) from error
    if shutil.which(path) is None:
        raise UserError(f"{path} is no program: it is to be ffmpeg", _HINT)
    return path


@dataclass(frozen=True)
class Listing:
    """The frames of a file, from the first on."""

    times: np.ndarray
    """When each begins, in seconds after the first: float64 [N], never decreasing."""
    end: float
    """When the last listed one ends, in seconds."""
    height: int
    width: int
    """Of a frame as `decode` gives it, in pixels."""
    pixel_aspect: float = 1.0
    """Width of a pixel divided by its height."""
    interlaced: bool = False
    hdr: str = ""
    """The transfer function of HDR, as ffmpeg calls it."""


def list_frames(path: Path, until: float) -> Listing:
    """The frames of a file that begin before `until` seconds, and the next one. Raises `BadClip`."""
    until += _SLACK
    # fmt: off
    done = subprocess.run(
        [
            *_decoder(path), "-debug_ts",
            "-map", "0:V:0", "-vf", f"showinfo=checksum=0,trim=duration={until:.6f}", "-f", "null", "-",
            "-map", "0:V:0", "-c", "copy", "-f", "null", "-",
        ],
        capture_output=True,
    )
    # fmt: on
    if done.returncode < 0:
        raise BadClip(f"ffmpeg crashes on it ({signal.Signals(-done.returncode).name}): convert it to another format")
    log = done.stderr.decode(errors="replace")
    opened, _, log = log.partition("Stream mapping:")  # names and titles stand before it
    _require_opened(opened)
    frames = list(_FRAME.finditer(log))
    if not frames:
        _require_decoder(opened + log)
        raise BadClip(DAMAGED)
    time_bases = _CONFIGURED.findall(log)  # one each time the frames' format changes
    times, end = _timed(frames, Fraction(time_bases[0]))
    _require_whole(log, len(frames), stopped=times[-1] >= until)
    _require_one_shape(frames, formats=len(time_bases))
    turned = _TURNED.search(opened)
    if turned and float(turned[1]) % 90:
        raise BadClip(f"it is to be shown turned by {float(turned[1]):g} degrees, which is no quarter turn")
    hdr = sorted(_HDR & set(re.findall(r"color_trc:([\w-]+)", log)))
    if hdr and not {"zscale", "tonemap"} <= _filters():
        raise BadClip("it is HDR, and this ffmpeg cannot tone map it (it has no zscale): convert it to SDR")
    last = frames[-1]
    return Listing(
        times=times,
        end=end,
        height=int(last["height"]),
        width=int(last["width"]),
        pixel_aspect=float(Fraction(last["aspect"])) if not last["aspect"].startswith("0/") else 1.0,
        interlaced=any(frame["scan"] in "TB" for frame in frames),
        hdr=hdr[0] if hdr else "",
    )


def decode(path: Path, listing: Listing, indices: Sequence[int]) -> Iterator[np.ndarray]:
    """Those frames of a listed file, [H, W, 3] uint8 RGB each; `indices` increase. Raises `BadClip`."""
    filters = [
        *([_DEINTERLACE] if listing.interlaced else []),
        "select=" + _one_of(indices),
        *([_TONE_MAP.format(hdr=listing.hdr)] if listing.hdr else []),
        "format=rgb24",
    ]
    # fmt: off
    command = [
        *_decoder(path), "-map", "0:V:0", "-vf", ",".join(filters), "-fps_mode", "passthrough",
        "-frames:v", str(len(indices)), "-threads", "1", "-f", "rawvideo", "-",
    ]
    # fmt: on
    size = listing.height * listing.width * 3
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        pipe = process.stdout
        assert pipe is not None
        try:
            for _ in indices:
                frame = pipe.read(size)
                if len(frame) < size:
                    raise BadClip(DAMAGED)
                yield np.frombuffer(frame, np.uint8).reshape(listing.height, listing.width, 3)
        finally:
            process.kill()


def _one_of(indices: Sequence[int]) -> str:
    """ffmpeg's expression for a frame's number being one of them: a tree, as ffmpeg refuses sums of a hundred terms."""
    if len(indices) == 1:
        return f"eq(n\\,{indices[0]})"
    half = len(indices) // 2
    return f"({_one_of(indices[:half])}+{_one_of(indices[half:])})"


def _decoder(path: Path) -> list[str]:
    """The beginning of a command that decodes a file."""
    # The prefix keeps names with a colon, a dash or a percent sign from meaning anything.
    # fmt: off
    return [
        executable(), "-nostdin", "-hide_banner", "-v", "info", "-filter_threads", "1",
        "-threads", "1", "-protocol_whitelist", "file", "-i", f"file:{path}",
    ]
    # fmt: on


def _timed(frames: Sequence[re.Match], time_base: Fraction) -> tuple[np.ndarray, float]:
    """When each frame begins, and the last ends, in seconds: float64 [N]."""
    durations = [int(frame["duration"] or 0) for frame in frames]
    ticks = []
    for i, frame in enumerate(frames):
        expected = ticks[-1] + durations[i - 1] if ticks else 0
        ticks.append(int(frame["pts"]) if frame["pts"] != "NOPTS" else expected)
    ticks = np.maximum.accumulate(np.array(ticks) - ticks[0])
    last = durations[-1] or (int(ticks[-1] - ticks[-2]) if len(ticks) > 1 else 0)
    seconds = np.append(ticks, ticks[-1] + last) * time_base.numerator / time_base.denominator
    return seconds[:-1], float(seconds[-1])


def _require_opened(log: str) -> None:
    """Raise `BadClip` for what ffmpeg could not open, by what it said of it."""
    if "Input #0" not in log:
        if "Error opening input" not in log:
            raise UserError(f"ffmpeg cannot read videos: it says {log.strip()[-1000:]!r}", _HINT)
        raise BadClip("not a video, or cut off")
    if "matches no streams" in log:
        cover = ": its picture is a cover" if "(attached pic)" in log else ""
        raise BadClip(f"no video stream can be found in it{cover}")
    _require_decoder(log)


def _require_decoder(log: str) -> None:
    if _NO_DECODER.search(log):
        codec = _CODEC.search(log)
        name = (codec["tag"] if codec["name"] == "none" else codec["name"]) if codec else None
        raise BadClip(
            f"its codec ({name or 'unknown'}) cannot be decoded by this ffmpeg: convert it, as an ffmpeg that can does "
            f"with ffmpeg -i IN -c:v libx264 OUT.mp4"
        )


def _require_whole(log: str, listed: int, *, stopped: bool) -> None:
    """Raise `BadClip` if the file was cut off, or a listed frame is damaged.

    A decoder that is `stopped` has gone on for some frames, more or fewer; what it said of those is no matter.
    """
    decoded = [match.start() for match in _DECODED.finditer(log)]
    last = decoded[listed - 1] if stopped and len(decoded) >= listed else len(log)
    if _DAMAGED.search(log, 0, last) or _LOST.search(log):
        raise BadClip(DAMAGED)


def _require_one_shape(frames: Sequence[re.Match], formats: int) -> None:
    """Raise `BadClip` if the frames change on the way, where ffmpeg would scale them to the first's size."""
    shapes = {f"{frame['width']} x {frame['height']}": None for frame in frames}
    if len(shapes) > 1:
        raise BadClip(f"its frames change their size midway: {', then '.join(shapes)}")
    if formats > 1 or len({frame["aspect"] for frame in frames}) > 1:
        raise BadClip("its frames change their colours or shape midway")


@functools.cache
def _filters() -> set[str]:
    """The names of the filters that ffmpeg has."""
    listed = subprocess.run([executable(), "-hide_banner", "-filters"], capture_output=True)
    return {line.split()[1] for line in listed.stdout.decode().splitlines() if "->" in line}
