import signal
import subprocess
import sys
import time

import imageio_ffmpeg
import numpy as np
import pytest
from PIL import Image

from tests.data.conftest import drifting, noise
from vidaccel.data import video as video_module
from vidaccel.data.ffmpeg import list_frames
from vidaccel.data.video import check_output, contact_sheet, read_video, write_video
from vidaccel.errors import UserError

NAMES = ["out.mp4", "out.gif", "out"]


def error_between(a, b):
    return np.abs(a.astype(int) - b.astype(int)).mean()


# Writing


@pytest.mark.parametrize(("height", "width"), [(64, 64), (48, 80), (66, 34)])
def test_mp4_keeps_frames_size_and_rate(tmp_path, height, width):
    frames = drifting(17, height, width)
    write_video(frames, tmp_path / "a.mp4", 8)
    assert imageio_ffmpeg.count_frames_and_secs(tmp_path / "a.mp4") == (17, pytest.approx(17 / 8, abs=0.01))
    back = read_video(tmp_path / "a.mp4", fps=8, num_frames=17, height=height, width=width)
    assert back.shape == frames.shape
    assert back.dtype == np.uint8
    assert error_between(back, frames) < 4  # nearly all of it from chroma at half resolution


@pytest.mark.parametrize("fps", [8, 24, 23.976, 29.97, 12.5])
def test_mp4_frame_rate(tmp_path, fps):
    write_video(drifting(5), tmp_path / "a.mp4", fps)
    assert list_frames(tmp_path / "a.mp4", 5).times == pytest.approx(np.arange(5) / fps, rel=1e-4)


def test_mp4_keeps_pure_colours(tmp_path):
    palette = np.array(
        [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0), (255, 0, 255), (0, 255, 255), (0, 0, 0), (128, 128, 128)]
    )
    frames = np.repeat(palette.astype(np.uint8), 16, axis=0)[None, None].repeat(32, axis=1).repeat(3, axis=0)
    write_video(frames, tmp_path / "a.mp4", 8)
    back = read_video(tmp_path / "a.mp4", fps=8, num_frames=3, height=32, width=128)
    assert np.abs(back[:, :, 8::16].astype(int) - frames[:, :, 8::16]).max() <= 6


@pytest.mark.parametrize(("height", "width"), [(63, 64), (64, 65)])
def test_odd_sizes(tmp_path, height, width):
    frames = drifting(3, height, width)
    with pytest.raises(UserError, match=f"even height and width, not {height} x {width}"):
        write_video(frames, tmp_path / "a.mp4", 8)
    assert list(tmp_path.iterdir()) == []
    write_video(frames, tmp_path / "a.gif", 8)
    write_video(frames, tmp_path / "a", 8)
    assert Image.open(tmp_path / "a.gif").size == (width, height)
    assert np.array_equal(np.asarray(Image.open(tmp_path / "a" / "00002.png")), frames[2])


def test_frames_need_not_be_contiguous(tmp_path):
    frames = drifting(5).transpose(0, 2, 1, 3)[:, ::-1]
    write_video(frames, tmp_path / "a.mp4", 8)
    assert error_between(read_video(tmp_path / "a.mp4", fps=8, num_frames=5, height=64, width=64), frames) < 4


@pytest.mark.parametrize("fps", [8, 24, 30, 50])
def test_gif(tmp_path, fps):
    frames = drifting(17)
    write_video(frames, tmp_path / "a.gif", fps)
    image = Image.open(tmp_path / "a.gif")
    assert image.n_frames == 17
    assert image.info["loop"] == 0
    back, milliseconds = [], []
    for i in range(17):
        image.seek(i)
        back.append(np.asarray(image.convert("RGB")))
        milliseconds.append(image.info["duration"])
    assert error_between(np.stack(back), frames) < 4
    assert sum(milliseconds) == pytest.approx(17000 / fps, abs=5)
    assert max(milliseconds) - min(milliseconds) <= 10


def test_gif_faster_than_a_gif_can_be(tmp_path):
    with pytest.raises(UserError, match="at most 50 frames a second, not 60"):
        write_video(drifting(3), tmp_path / "a.gif", 60)


def test_png_folder(tmp_path):
    frames = drifting(11)
    write_video(frames, tmp_path / "deep" / "frames", 8)
    files = sorted(file.name for file in (tmp_path / "deep" / "frames").iterdir())
    assert files == [f"{i:05d}.png" for i in range(11)]
    back = np.stack([np.asarray(Image.open(tmp_path / "deep" / "frames" / name)) for name in files])
    assert np.array_equal(back, frames)


def test_a_folder_of_frames_is_replaced_and_no_other(tmp_path):
    write_video(drifting(11), tmp_path / "frames", 8)
    write_video(drifting(5), tmp_path / "frames", 8)
    assert len(list((tmp_path / "frames").iterdir())) == 5
    (tmp_path / "frames" / "thesis.txt").write_text("precious")
    with pytest.raises(UserError, match="not a folder of frames"):
        write_video(drifting(5), tmp_path / "frames", 8)
    assert (tmp_path / "frames" / "thesis.txt").read_text() == "precious"


@pytest.mark.parametrize("name", NAMES)
def test_same_bytes_in_two_processes(tmp_path, name):
    script = (
        "import sys; from tests.data.conftest import drifting; from vidaccel.data.video import write_video; "
        "write_video(drifting(), sys.argv[1], 8)"
    )
    for run in "ab":
        subprocess.run([sys.executable, "-c", script, str(tmp_path / run / name)], check=True)
    files = sorted(file.relative_to(tmp_path / "a") for file in (tmp_path / "a").rglob("*") if file.is_file())
    assert files
    for file in files:
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


@pytest.mark.parametrize(
    "frames", [drifting().astype(np.float32), drifting()[0], drifting()[:0], drifting()[..., :2]], ids=lambda f: f.shape
)
def test_what_is_no_video_is_refused(tmp_path, frames):
    with pytest.raises(ValueError, match="uint8"):
        write_video(frames, tmp_path / "a.mp4", 8)


# Where it may be written


@pytest.mark.parametrize("name", ["a.avi", "a.png", "a.webm", "a.MP5"])
def test_suffix_nobody_writes(tmp_path, name):
    with pytest.raises(UserError) as caught:
        check_output(tmp_path / name)
    assert name.partition(".")[2].lower() in caught.value.message
    assert ".mp4 or .gif" in caught.value.hint


def test_places_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "folder.mp4").mkdir()
    for path in ("file/a.mp4", "file/deep/a", "file", "folder.mp4", ".", "/proc/a.mp4"):
        with pytest.raises(UserError, match="cannot write"):
            check_output(tmp_path / path)


@pytest.mark.parametrize("name", [*NAMES, "new/deep/a.mp4", "A.MP4"])
def test_check_leaves_nothing(tmp_path, name):
    check_output(tmp_path / name)
    assert list(tmp_path.iterdir()) == []


# Whole or not at all


@pytest.mark.parametrize("exception", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("name", NAMES)
def test_an_exception_midway_leaves_nothing(tmp_path, monkeypatch, name, exception):
    original = Image.Image.save

    def encode(*arguments, **keywords):
        subprocess.Popen([*arguments[0][:-1], "-y", arguments[0][-1]], stdin=subprocess.DEVNULL).wait()
        raise exception

    def save(image, target, **keywords):
        original(image, target, **keywords)
        raise exception

    monkeypatch.setattr(video_module.subprocess, "run", encode)
    monkeypatch.setattr(Image.Image, "save", save)
    with pytest.raises(exception):
        write_video(drifting(), tmp_path / "new" / name, 8)
    assert list(tmp_path.iterdir()) == []


def test_ctrl_c_while_ffmpeg_runs(tmp_path):
    script = (  # a shell that starts a job in the background has it ignore the signal
        "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); "
        "from tests.data.conftest import noise; from vidaccel.data.video import write_video; "
        "write_video(noise(6000), sys.argv[1], 8)"
    )
    writer = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path / "new" / "a.mp4")], stderr=subprocess.PIPE, text=True
    )
    while not any(file.stat().st_size for file in tmp_path.glob("new/.a.*.mp4")):
        assert writer.poll() is None, writer.stderr.read()
        time.sleep(0.01)
    writer.send_signal(signal.SIGINT)
    assert "KeyboardInterrupt" in writer.communicate(timeout=120)[1]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", NAMES)
def test_a_full_disk(full_disk, name):
    with pytest.raises(UserError, match="no space left on device"):
        write_video(noise(), full_disk / "new" / name, 8)
    assert list(full_disk.iterdir()) == []


def test_ffmpeg_without_libx264_says_so(tmp_path, monkeypatch):
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", "false")
    with pytest.raises(RuntimeError, match="ffmpeg failed with status 1"):
        write_video(drifting(), tmp_path / "a.mp4", 8)
    assert list(tmp_path.iterdir()) == []


# Contact sheets


def test_contact_sheet(tmp_path):
    videos = [drifting(17), drifting(3, 32, 48)]
    contact_sheet(videos, tmp_path / "sheet.png", frames=5)
    sheet = np.asarray(Image.open(tmp_path / "sheet.png"))
    assert sheet.shape == (66 + 34, 5 * 66, 3)
    for column, frame in enumerate([0, 4, 8, 12, 16]):
        assert np.array_equal(sheet[:64, 66 * column : 66 * column + 64], videos[0][frame])
    assert np.array_equal(sheet[66:98, 100:148], videos[1][2])
    assert (sheet[66:, 150:] == 255).all()


def test_contact_sheet_labels(tmp_path):
    contact_sheet([drifting(), drifting()], tmp_path / "sheet.png", frames=4, labels=["a red circle", "a cross"])
    sheet = np.asarray(Image.open(tmp_path / "sheet.png"))
    assert sheet.shape == (2 * (16 + 66), 4 * 66, 3)
    for top in (0, 82):
        assert (sheet[top : top + 16] < 128).any()
        assert np.array_equal(sheet[top + 16 : top + 80, :64], drifting()[0])


def test_contact_sheet_refusals(tmp_path):
    with pytest.raises(UserError, match="a contact sheet is a PNG"):
        contact_sheet([drifting()], tmp_path / "sheet.jpg")
    with pytest.raises(ValueError, match="one label each"):
        contact_sheet([drifting()], tmp_path / "sheet.png", labels=["a", "b"])
    with pytest.raises(ValueError, match="needs videos"):
        contact_sheet([], tmp_path / "sheet.png")
