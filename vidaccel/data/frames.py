"""Frames of video files by number: through decord where it is installed, else through the ffmpeg of imageio-ffmpeg.

decord has no wheel for macOS or for ARM. ffmpeg is run twice: once for the time stamps, without decoding, and once for
the frames that are wanted.

N frames of the source, H height, W width
"""

import contextlib
import importlib.util
import subprocess
from collections.abc import Iterable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Protocol

import numpy as np

from vidaccel.compat.decord import decoding_errors

NO_STREAM = "no video stream can be found in it"
NO_VIDEO = "not a video, or cut off"
DAMAGED = "its frames cannot be decoded: damaged or cut off"


class BadClip(Exception):
    """A video that cannot be used; the message is the reason, without the file's name."""


class Frames(Protocol):
    """An open video file."""

    times: np.ndarray
    """[N, 2] seconds when each frame begins and ends."""

    def read(self, numbers: Iterable[int]) -> Iterator[np.ndarray]:
        """The frames of these numbers, which ascend, uint8 [H, W, 3]; raises `BadClip` for what is damaged."""
        ...


def open_frames(path: Path) -> Frames:
    """Raises `BadClip` if there is no such file, or it is no video."""
    if not path.is_file():
        raise BadClip("no such file")
    if path.stat().st_size == 0:
        raise BadClip("the file is empty")
    return DecordFrames(path) if have_decord() else FfmpegFrames(path)


def have_decord() -> bool:
    return importlib.util.find_spec("decord") is not None


class DecordFrames:
    """A file read by decord."""

    def __init__(self, path: Path):
        import decord

        decord.logging.set_level(decord.logging.QUIET)  # what libav would print is said by BadClip
        with _decoding():
            self._reader = decord.VideoReader(str(path), num_threads=1)
            self.times = self._reader.get_frame_timestamp(range(len(self._reader)))

    def read(self, numbers: Iterable[int]) -> Iterator[np.ndarray]:
        for number in numbers:
            with _decoding():
                frame = self._reader[int(number)].asnumpy()
            yield frame


@contextlib.contextmanager
def _decoding() -> Iterator[None]:
    """Turn what decord raises into `BadClip`; its texts are C++ source lines, so the reason is told apart here."""
    try:
        yield
    except decoding_errors() as error:
        if "cannot find video stream" in str(error):
            raise BadClip(NO_STREAM) from error
        if "Error reading" in str(error):
            raise BadClip(NO_VIDEO) from error
        raise BadClip(DAMAGED) from error


class FfmpegFrames:
    """A file read by ffmpeg."""

    def __init__(self, path: Path):
        self._path = path
        # One line a packet: stream, decoding time, time, duration, ...; in units of "#tb 0: 1/11988" seconds.
        done = subprocess.run(self._command("-c", "copy", "-f", "framecrc"), capture_output=True, text=True)
        if "matches no streams" in done.stderr:
            raise BadClip(NO_STREAM)
        lines = done.stdout.splitlines()
        packets = [[int(word) for word in line.split(",")[2:4]] for line in lines if line[:1].isdigit()]
        if not packets:
            raise BadClip(NO_VIDEO if done.returncode else NO_STREAM)
        if done.returncode:
            raise BadClip(DAMAGED)
        unit = next(Fraction(line.split()[-1]) for line in lines if line.startswith("#tb 0:"))
        begin, duration = np.array(sorted(packets)).T * float(unit)
        self.times = np.stack([begin, np.append(begin[1:], begin[-1] + duration[-1])], axis=1)

    def _command(self, *output: str) -> list[str]:
        import imageio_ffmpeg

        # -xerror: at the first fault, rather than with what can be guessed of the frame.
        strict = ("-v", "error", "-nostdin", "-xerror", "-err_detect", "explode", "-threads", "1")
        return [imageio_ffmpeg.get_ffmpeg_exe(), *strict, "-i", str(self._path), "-map", "0:v:0", *output, "-"]

    def read(self, numbers: Iterable[int]) -> Iterator[np.ndarray]:
        wanted = [int(number) for number in numbers]
        chosen = "select='" + "+".join(f"eq(n,{number})" for number in wanted) + "'"
        output = ("-vf", chosen, "-fps_mode", "passthrough", "-frames:v", str(len(wanted)))
        command = self._command(*output, "-pix_fmt", "rgb24", "-c:v", "ppm", "-f", "image2pipe")
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as ffmpeg:
            try:
                for _ in wanted:
                    yield _ppm(ffmpeg.stdout)
            finally:
                ffmpeg.kill()


def _ppm(stream) -> np.ndarray:
    """The next picture, a header of three lines before its bytes."""
    kind, size, _ = stream.readline(), stream.readline(), stream.readline()
    if kind != b"P6\n":
        raise BadClip(DAMAGED)
    width, height = map(int, size.split())
    content = stream.read(3 * width * height)
    if len(content) < 3 * width * height:
        raise BadClip(DAMAGED)
    return np.frombuffer(content, np.uint8).reshape(height, width, 3)
