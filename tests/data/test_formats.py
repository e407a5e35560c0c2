"""What clips can be like beside their codec: pixels, orientation, times, streams, damage. cases/ has a README."""

import json
import os
import re
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from tests.data.conftest import noise
from vidaccel.data.clips import ClipFolder
from vidaccel.data.ffmpeg import list_frames
from vidaccel.data.video import BadClip, probe_video, read_video, write_video
from vidaccel.errors import UserError

CASES = Path(__file__).parent / "cases"
COUNTED = ["base.mp4", "mpeg4.avi", "mpeg4b.avi", "h264.avi", "xvid.avi", "mpg.mpg", "base.ts", "ts_nob.ts"]
COUNTED += ["av1.mp4", "anim.webp", "theora.ogv"]
X264 = ("-c:v", "libx264", "-bf", 2, "-crf", 8)


def counted(num_frames):
    """Frame i is gray of brightness 4 i."""
    return np.broadcast_to((4 * np.arange(num_frames, dtype=np.uint8))[:, None, None, None], (num_frames, 32, 32, 3))


def frame_numbers(path, **keywords):
    frames = read_video(path, height=16, width=16, **keywords)
    return (frames.mean((1, 2, 3)) / 4).round().astype(int).tolist()


def reason(path, *, fps=8, num_frames=9):
    """Why a clip is refused, which checking and reading agree on."""
    with pytest.raises(BadClip) as checked:
        probe_video(path, fps=fps, num_frames=num_frames)
    with pytest.raises(BadClip, match="^" + re.escape(str(checked.value))):
        read_video(path, fps=fps, num_frames=num_frames, height=16, width=16)
    return str(checked.value)


# Frames and their times


@pytest.mark.parametrize("case", COUNTED)
@pytest.mark.parametrize(("fps", "num_frames", "start"), [(8, 17, 0.0), (12, 25, 0.25), (5, 8, 1.0)])
def test_the_frame_of_that_time(case, fps, num_frames, start):
    frames = read_video(CASES / case, fps=fps, num_frames=num_frames, height=96, width=128, start=start)
    square = frames[:, 40:56, 56:72].mean((1, 2, 3))
    # 16 frames a second are up to 1/32 s off, or 2.5; mpg.mpg repeats some to make 25.
    assert square == pytest.approx(80 * (start + np.arange(num_frames) / fps), abs=6.5 if case == "mpg.mpg" else 3.6)


def test_our_own_gif():
    image = Image.open(CASES / "own.gif")
    frames = []
    for i in range(image.n_frames):
        image.seek(i)
        frames.append(np.asarray(image.convert("RGB")))
    read = read_video(CASES / "own.gif", fps=8, num_frames=17, height=64, width=64)
    assert np.array_equal(read, frames)


def test_a_folder_of_all_cases(tmp_path):
    names = [path.name for path in sorted(CASES.iterdir()) if path.suffix != ".md"]
    lines = [json.dumps({"file": name, "caption": name}) for name in [*names, "README.md"]]
    shutil.copytree(CASES, tmp_path / "clips")
    (tmp_path / "clips" / "captions.jsonl").write_text("\n".join(lines))
    clips = ClipFolder(tmp_path / "clips", num_frames=9, height=96, width=128, fps=4)
    assert clips.captions == names
    assert len(clips.skipped) == 1 and clips.skipped[0].endswith("(README.md): not a video, or cut off")
    for video, name in (clips[i] for i in range(len(clips))):
        if name in COUNTED:
            square = (video[:, :, 40:56, 56:72].mean((0, 2, 3)).numpy() + 1) * 127.5
            assert square == pytest.approx(20 * np.arange(9), abs=6.5), name


@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
def test_a_variable_rate(tmp_path, ffmpeg, suffix):
    write_video(counted(60), tmp_path / "a.mp4", 25)
    keep = "select='lt(n,10)+not(mod(n,6))'"  # 0 to 9, 12, 18, 24 ...
    ffmpeg("-i", tmp_path / "a.mp4", "-vf", keep, "-fps_mode", "vfr", *X264, tmp_path / f"b.{suffix}")
    # 8 frames a second are 3.125 of 25 apart: 0, 3.1, 6.25, 9.4, 12.5, 15.6, 18.75
    assert frame_numbers(tmp_path / f"b.{suffix}", fps=8, num_frames=7) == [0, 3, 6, 9, 12, 18, 18]
    assert frame_numbers(tmp_path / f"b.{suffix}", fps=8, num_frames=3, start=1.0) == [24, 30, 30]  # 25, 28.1, 31.25


def test_an_edit_list(tmp_path, ffmpeg):
    write_video(counted(60), tmp_path / "a.mp4", 25)
    ffmpeg("-i", tmp_path / "a.mp4", *X264, "-g", 300, tmp_path / "b.mp4")
    ffmpeg("-ss", 0.48, "-i", tmp_path / "b.mp4", "-c", "copy", tmp_path / "cut.mp4")
    assert b"elst" in (tmp_path / "cut.mp4").read_bytes()
    # All frames are in it, and it begins at 12.
    assert frame_numbers(tmp_path / "cut.mp4", fps=25, num_frames=5) == [12, 13, 14, 15, 16]


def test_more_frames_than_a_clip_has_are_not_made_up_from_longer_sound(tmp_path, ffmpeg):
    write_video(counted(8), tmp_path / "a.mp4", 8)
    ffmpeg("-i", tmp_path / "a.mp4", "-f", "lavfi", "-i", "sine=duration=4", "-c:v", "copy", tmp_path / "b.mp4")
    assert frame_numbers(tmp_path / "b.mp4", fps=8, num_frames=8) == list(range(8))
    assert reason(tmp_path / "b.mp4") == "too short: 1 s, which are 8 of 9 frames at 8 fps"


def test_many_frames(tmp_path):
    write_video(counted(4), tmp_path / "a.mp4", 4)
    assert len(frame_numbers(tmp_path / "a.mp4", fps=1000, num_frames=999)) == 999
    write_video(noise(400)[:, :16, :16], tmp_path / "b.mp4", 50)
    assert read_video(tmp_path / "b.mp4", fps=50, num_frames=400, height=2, width=2).shape == (400, 2, 2, 3)


# Shape and colour


def test_pixels_that_are_not_square():
    frame = read_video(CASES / "anamorphic.mp4", fps=8, num_frames=9, height=96, width=96)[0].mean(-1)
    disc = frame > frame.max() / 2
    height, width = disc.any(1).sum(), disc.any(0).sum()
    assert height == pytest.approx(59, abs=1) and width == pytest.approx(59, abs=1)
    wide = read_video(CASES / "anamorphic.mp4", fps=8, num_frames=9, height=48, width=128)[0].mean(-1) > 90
    assert wide.any(1).sum() == pytest.approx(29.5, abs=1.5) and wide.any(0).sum() == pytest.approx(29.5, abs=1.5)


# What x and y on screen are of x and y in the file.
ORIENTATIONS = [(a, 0, 0, d) for a in (1, -1) for d in (1, -1)] + [(0, b, c, 0) for b in (1, -1) for c in (1, -1)]
CORNERS = {(-1, -1): (255, 0, 0), (1, -1): (0, 255, 0), (-1, 1): (0, 0, 255), (1, 1): (255, 255, 255)}


@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_all_orientations(tmp_path, orientation):
    a, b, c, d = orientation  # as in the matrix of ISO 14496-12: x' = a x + c y, y' = b x + d y
    frames = np.zeros((3, 48, 64, 3), np.uint8)
    for (x, y), colour in CORNERS.items():
        frames[:, slice(24) if y < 0 else slice(24, 48), slice(32) if x < 0 else slice(32, 64)] = colour
    write_video(frames, tmp_path / "a.mp4", 8)
    content = bytearray((tmp_path / "a.mp4").read_bytes())
    matrix = content.index(b"tkhd") + 44
    assert content[matrix : matrix + 4] == struct.pack(">i", 1 << 16)
    content[matrix : matrix + 36] = struct.pack(">9i", a << 16, b << 16, 0, c << 16, d << 16, 0, 0, 0, 1 << 30)
    (tmp_path / "a.mp4").write_bytes(content)
    height, width = (48, 64) if a else (64, 48)
    frame = read_video(tmp_path / "a.mp4", fps=8, num_frames=3, height=height, width=width)[0].astype(int)
    for (x, y), colour in CORNERS.items():
        shown = frame[8 if b * x + d * y < 0 else -8, 8 if a * x + c * y < 0 else -8]
        assert np.abs(shown - colour).max() < 12


def test_a_turn_that_is_no_quarter(tmp_path):
    write_video(counted(9), tmp_path / "a.mp4", 8)
    content = bytearray((tmp_path / "a.mp4").read_bytes())
    matrix = content.index(b"tkhd") + 44
    side = round(0.5**0.5 * (1 << 16))
    content[matrix : matrix + 20] = struct.pack(">5i", side, side, 0, -side, side)
    (tmp_path / "a.mp4").write_bytes(content)
    assert "turned by -45 degrees" in reason(tmp_path / "a.mp4")


BAR = "geq=lum='if(between(X,mod(N*4,100),mod(N*4,100)+16),235,16)':cb=128:cr=128"


@pytest.mark.parametrize(
    ("suffix", "codec"), [("mp4", (*X264, "-x264opts", "tff=1")), ("mpg", ("-c:v", "mpeg2video", "-q:v", 2))]
)
def test_interlaced(tmp_path, ffmpeg, suffix, codec):
    source = f"color=c=black:size=128x96:rate=50:duration=1,{BAR},tinterlace=mode=interleave_top"
    ffmpeg("-f", "lavfi", "-i", source, *codec, "-flags", "+ildct+ilme", tmp_path / f"a.{suffix}")
    frames = read_video(tmp_path / f"a.{suffix}", fps=25, num_frames=12, height=96, width=128).mean(-1)
    assert np.abs(2 * frames[:, 1:-1] - frames[:, :-2] - frames[:, 2:]).mean() < 1  # 36 in the file
    middle = [np.flatnonzero(frame[48] > 128).mean() for frame in frames]
    assert middle == pytest.approx([8 + 8 * i for i in range(12)], abs=1.5)  # of the first field of each frame


def gray(ffmpeg, path, code, transfer):
    """10 bits of one gray, in HEVC."""
    source = f"color=size=64x64:rate=8:duration=2,format=yuv420p10le,geq=lum={code}:cb=512:cr=512"
    colours = f":colorprim=bt2020:transfer={transfer}:colormatrix=bt2020nc" if transfer else ""
    options = ("-c:v", "libx265", "-crf", 4, "-x265-params", "log-level=none" + colours, "-threads", 1)
    ffmpeg("-f", "lavfi", "-i", source, *options, path)
    frames = read_video(path, fps=8, num_frames=3, height=16, width=16)
    assert np.ptp(frames) <= 2
    return frames.mean()


def test_hdr_is_tone_mapped(tmp_path, ffmpeg):
    # By BT.2100: 203 cd/m2, the white of a page, is 58% of PQ's range and 75% of HLG's.
    white = gray(ffmpeg, tmp_path / "pq.mp4", 572, "smpte2084")
    assert 210 < white < 245
    assert gray(ffmpeg, tmp_path / "hlg.mp4", 721, "arib-std-b67") == pytest.approx(white, abs=4)
    assert white < gray(ffmpeg, tmp_path / "bright.mp4", 723, "smpte2084") <= 255  # 1000 cd/m2
    # 16.9 cd/m2, 34% of PQ's range, are to be the same share of white on a display of gamma 2.4 (BT.1886).
    assert gray(ffmpeg, tmp_path / "dark.mp4", 364, "smpte2084") == pytest.approx(
        255 * (16.9 / 203) ** (1 / 2.4), abs=3
    )
    assert gray(ffmpeg, tmp_path / "sdr.mp4", 502, "") == pytest.approx(128, abs=2)  # ten bits alone are no HDR


def test_hdr_without_the_means(tmp_path, ffmpeg, monkeypatch):
    gray(ffmpeg, tmp_path / "pq.mp4", 572, "smpte2084")
    monkeypatch.setattr("vidaccel.data.ffmpeg._filters", lambda: {"scale"})
    assert reason(tmp_path / "pq.mp4").startswith("it is HDR, and this ffmpeg cannot tone map it")


def test_a_size_that_changes_midway(tmp_path, ffmpeg):
    for offset, size in enumerate(["64x64", "32x48"]):
        source = f"testsrc=size={size}:rate=8:duration=1"
        ffmpeg("-f", "lavfi", "-i", source, *X264, "-output_ts_offset", offset, tmp_path / f"{size}.ts")
    joined = (tmp_path / "64x64.ts").read_bytes() + (tmp_path / "32x48.ts").read_bytes()
    (tmp_path / "a.ts").write_bytes(joined)
    probe_video(tmp_path / "a.ts", fps=8, num_frames=7)
    assert reason(tmp_path / "a.ts", num_frames=12) == "its frames change their size midway: 64 x 64, then 32 x 48"


# Streams


def test_the_first_video_of_several_is_taken(tmp_path, ffmpeg):
    write_video(counted(9), tmp_path / "a.mp4", 8)
    write_video(np.full((9, 64, 64, 3), 200, np.uint8), tmp_path / "larger.mp4", 8)
    both = ("-i", tmp_path / "a.mp4", "-i", tmp_path / "larger.mp4", "-map", 0, "-map", 1, "-c", "copy")
    ffmpeg(*both, tmp_path / "b.mp4")
    assert frame_numbers(tmp_path / "b.mp4", fps=8, num_frames=9) == list(range(9))


def test_a_cover_is_no_video(tmp_path, ffmpeg):
    Image.new("RGB", (64, 64), "red").save(tmp_path / "cover.png")
    write_video(counted(9), tmp_path / "a.mp4", 8)
    cover = ("-i", tmp_path / "cover.png", "-map", 1, "-map", 0, "-c:v", "copy", "-disposition:v:0", "attached_pic")
    ffmpeg("-i", tmp_path / "a.mp4", *cover, tmp_path / "b.mp4")
    assert frame_numbers(tmp_path / "b.mp4", fps=8, num_frames=9) == list(range(9))
    ffmpeg("-f", "lavfi", "-i", "sine=duration=2", *cover, tmp_path / "song.mp3")
    assert reason(tmp_path / "song.mp3") == "no video stream can be found in it: its picture is a cover"


# What cannot be read


def test_a_codec_without_a_decoder_is_named(tmp_path):
    write_video(counted(9), tmp_path / "a.mp4", 8)
    content = (tmp_path / "a.mp4").read_bytes()
    (tmp_path / "a.mp4").write_bytes(content.replace(b"avc1", b"zzzz").replace(b"avcC", b"zzzC"))
    assert reason(tmp_path / "a.mp4").startswith("its codec (zzzz) cannot be decoded by this ffmpeg: convert it")


@pytest.mark.parametrize(
    ("raised", "said"),
    [(PermissionError(13, "Permission denied"), "Permission denied"), (OSError(5, "Input/output error"), "Input/out")],
)
def test_a_file_that_may_not_be_read(tmp_path, monkeypatch, raised, said):
    write_video(counted(9), tmp_path / "a.mp4", 8)

    def refuse(*arguments, **keywords):
        raise raised

    monkeypatch.setattr(Path, "open", refuse)
    assert reason(tmp_path / "a.mp4").startswith(f"it cannot be read: {said}")


def test_names_that_no_file_can_have(tmp_path):
    assert "too long" in reason(tmp_path / ("a" * 300 + ".mp4"))
    assert reason(tmp_path / "a\0.mp4") == "no such file"
    os.mkfifo(tmp_path / "pipe.mp4")
    assert reason(tmp_path / "pipe.mp4") == "no such file"


@pytest.mark.parametrize("name", ["http://a.mp4", "a%03d.mp4", "-i.mp4", "a b'c\"d.mp4", "partial file.mp4", "ü.mp4"])
def test_names_mean_nothing(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    write_video(counted(9), tmp_path / "a.mp4", 8)
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    Path("a.mp4").rename(name)
    assert frame_numbers(name, fps=8, num_frames=9) == list(range(9))


def test_damage_counts_where_frames_are_wanted(tmp_path):
    write_video(noise(40), tmp_path / "a.mp4", 8)
    content = bytearray((tmp_path / "a.mp4").read_bytes())
    half = len(content) // 2
    content[half : half + 5000] = bytes(5000)
    (tmp_path / "a.mp4").write_bytes(content)
    probe_video(tmp_path / "a.mp4", fps=8, num_frames=9)
    # ffmpeg's threads run ahead, more or less; what is refused does not depend on that.
    verdicts = [[refused(tmp_path / "a.mp4", n) for n in range(14, 24)] for _ in range(3)]
    assert verdicts[0] == verdicts[1] == verdicts[2] == sorted(verdicts[0])
    assert not verdicts[0][0] and verdicts[0][-1]


def refused(path, num_frames):
    try:
        probe_video(path, fps=8, num_frames=num_frames)
    except BadClip:
        return True
    return False


@pytest.mark.parametrize("case", ["base.mp4", "theora.ogv", "anim.webp"])
def test_a_clip_that_was_cut_off(tmp_path, case):
    content = (CASES / case).read_bytes()
    (tmp_path / case).write_bytes(content[: len(content) // 2])
    assert "cut off" in reason(tmp_path / case, num_frames=2)


@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from(COUNTED), st.floats(0.02, 1), st.lists(st.floats(0, 0.99), max_size=20), st.randoms())
def test_damaged_files_are_read_or_refused(tmp_path, case, share, places, random):
    content = bytearray((CASES / case).read_bytes())
    content = content[: int(len(content) * share)]
    for place in places:
        content[int(len(content) * place)] = random.randrange(256)
    (tmp_path / case).write_bytes(content)
    if refused(tmp_path / case, 9):
        assert reason(tmp_path / case)
    else:
        assert read_video(tmp_path / case, fps=8, num_frames=9, height=8, width=8).shape == (9, 8, 8, 3)


def test_an_ffmpeg_that_crashes(tmp_path, monkeypatch):
    (tmp_path / "ffmpeg").write_text("#!/bin/sh\nkill -SEGV $$\n")
    (tmp_path / "ffmpeg").chmod(0o755)
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", str(tmp_path / "ffmpeg"))
    assert reason(CASES / "base.mp4") == "ffmpeg crashes on it (SIGSEGV): convert it to another format"


@pytest.mark.parametrize(("program", "said"), [("false", "it says ''"), ("/nowhere/ffmpeg", "ffmpeg is no program")])
def test_an_ffmpeg_that_cannot_run_is_no_bad_clip(monkeypatch, program, said):
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", program)
    with pytest.raises(UserError, match=said) as caught:
        probe_video(CASES / "base.mp4", fps=8, num_frames=3)
    assert "imageio-ffmpeg" in caught.value.hint


def test_the_end_of_the_last_frame():
    assert list_frames(CASES / "base.mp4", until=60).end == 3
    assert list_frames(CASES / "mpeg4b.avi", until=60).end == 3
