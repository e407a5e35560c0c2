"""Clips whose frames carry their own number as brightness, through every pair of container and codec that people have:
whatever rate and beginning is asked for, the frames are those that decoding from first to last gives at that time."""

import subprocess
from fractions import Fraction

import imageio_ffmpeg
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vidaccel.data.video import read_video

FRAMES = 50
RATE = Fraction(25)
NTSC = Fraction(30000, 1001)
X264 = ("libx264", "-bf", 3, "-g", 12, "-crf", 10)
PAIRS = [  # suffix, encoder and its options, frames a second
    ("mp4", X264, RATE),
    ("mp4", X264, NTSC),
    ("mp4", ("libx264", "-bf", 0, "-g", 300, "-crf", 10), RATE),
    ("mp4", ("libx265", "-x265-params", "log-level=none:bframes=4", "-crf", 10), RATE),
    ("mp4", ("mpeg4", "-bf", 2, "-q:v", 2), RATE),
    ("mp4", ("libvpx-vp9", "-cpu-used", 8, "-crf", 10, "-b:v", 0), RATE),
    ("mp4", ("libsvtav1", "-preset", 12, "-crf", 10), RATE),
    ("mov", X264, NTSC),
    ("mov", ("prores_ks",), RATE),
    ("mov", ("mjpeg", "-q:v", 2), RATE),
    ("mov", ("qtrle",), RATE),
    ("mkv", X264, NTSC),
    ("mkv", ("libx264", "-x264opts", "open-gop=1:keyint=10:bframes=3", "-crf", 10), RATE),
    ("mkv", ("ffv1",), NTSC),
    ("mkv", ("mpeg2video", "-bf", 2, "-q:v", 2), RATE),
    ("mkv", ("libtheora", "-q:v", 10, "-g", 1), RATE),
    ("webm", ("libvpx", "-b:v", "2M", "-auto-alt-ref", 1, "-lag-in-frames", 16), NTSC),
    ("webm", ("libvpx-vp9", "-cpu-used", 8, "-crf", 10, "-b:v", 0), NTSC),
    ("avi", X264, RATE),
    ("avi", ("mpeg4", "-bf", 2, "-q:v", 2), NTSC),
    ("avi", ("libxvid", "-bf", 2, "-q:v", 2), RATE),
    ("avi", ("msmpeg4", "-q:v", 2), RATE),
    ("avi", ("mjpeg", "-q:v", 2), RATE),
    ("avi", ("huffyuv",), RATE),
    ("ts", X264, RATE),
    ("ts", ("libx265", "-x265-params", "log-level=none:bframes=4", "-crf", 10), RATE),
    ("ts", ("mpeg2video", "-bf", 2, "-q:v", 2), NTSC),
    ("m2ts", X264, RATE),
    ("mpg", ("mpeg1video", "-bf", 2, "-q:v", 2), RATE),
    ("vob", ("mpeg2video", "-bf", 2, "-q:v", 2), RATE),
    ("mxf", ("mpeg2video", "-bf", 2, "-q:v", 2), RATE),
    ("flv", X264, RATE),
    ("flv", ("flv", "-q:v", 2), RATE),
    ("wmv", ("wmv2", "-q:v", 2), RATE),
    ("ogv", ("libtheora", "-q:v", 10, "-g", 1), RATE),
    ("3gp", ("mpeg4", "-q:v", 2), RATE),
    ("nut", ("ffv1",), RATE),
    ("ivf", ("libvpx-vp9", "-cpu-used", 8, "-crf", 10, "-b:v", 0), RATE),
    ("gif", ("gif",), RATE),
    ("y4m", ("rawvideo",), RATE),
]
PIXELS = {"prores_ks": "yuv422p10", "qtrle": "rgb24", "huffyuv": "yuv422p", "gif": "gray"}  # where not yuv420p


def run(*arguments, data=None):
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-y", *map(str, arguments)]
    return subprocess.run(command, input=data, capture_output=True, check=True).stdout


@pytest.fixture(scope="session")
def encoders():
    return {line.split()[1] for line in run("-encoders").decode().splitlines() if line.startswith(" V")}


def test_enough_of_them_can_be_written(encoders):
    assert sum(codec[0] in encoders for _, codec, _ in PAIRS) >= 30


@pytest.fixture(scope="module")
def clip(request, tmp_path_factory, encoders):
    """(file, brightness of each frame as decoding from first to last gives it, frames a second)."""
    suffix, (encoder, *options), rate = request.param
    if encoder not in encoders:
        pytest.skip(f"this ffmpeg has no {encoder}")
    path = tmp_path_factory.mktemp("clip") / f"a.{suffix}"
    levels = (20 + 4 * np.arange(FRAMES)).astype(np.uint8)
    frames = np.broadcast_to(levels[:, None, None], (FRAMES, 96, 128)).tobytes()
    source = ("-f", "rawvideo", "-pix_fmt", "gray", "-s", "128x96", "-r", rate, "-i", "-")
    pixels = PIXELS.get(encoder, "yuv420p")
    run(*source, "-pix_fmt", pixels, "-c:v", encoder, *options, "-threads", 1, path, data=frames)
    decoded = run("-i", path, "-map", "0:v", "-fps_mode", "passthrough", "-f", "rawvideo", "-pix_fmt", "rgb24", "-")
    return path, np.frombuffer(decoded, np.uint8).reshape(-1, 96, 128, 3).mean((1, 2, 3)), float(rate)


@pytest.mark.parametrize("clip", PAIRS, ids=lambda pair: f"{pair[0]}-{pair[1][0]}", indirect=True)
@settings(max_examples=4, deadline=None, derandomize=True)
@given(fps=st.sampled_from([6, 8, 12.5, 15, 23.976, 24, 25, 30, 60]), start=st.integers(0, 10), n=st.integers(1, 21))
def test_the_frames_are_those_of_decoding_from_first_to_last(clip, fps, start, n):
    path, levels, rate = clip
    assert len(levels) >= FRAMES - 2 and (np.diff(levels) > 2).all()
    start = start / 10
    num_frames = min(n, int((len(levels) / rate - start) * fps))
    shown = read_video(path, fps=fps, num_frames=num_frames, height=32, width=32, start=start).mean((1, 2, 3))
    wanted = start + np.arange(num_frames) / fps
    distance = np.abs(np.arange(len(levels)) / rate - wanted[:, None])  # seconds: [wanted, frames]
    nearest = distance <= distance.min(1, keepdims=True) + 0.0021  # most containers round times to 1/1000 s
    right = np.abs(levels - shown[:, None]) < 1.5
    assert (nearest & right).any(1).all()
