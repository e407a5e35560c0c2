"""`read_video` on plain clips: time, space, and what cannot be read. test_formats.py has the others."""

import numpy as np
import pytest

from tests.data.conftest import drifting, noise
from vidaccel.data import ffmpeg
from vidaccel.data.ffmpeg import decode, list_frames
from vidaccel.data.video import BadClip, probe_video, read_video, write_video


@pytest.mark.parametrize("fps", [8, 23.976, 29.97])
def test_times_are_those_of_the_frames(tmp_path, fps):
    write_video(drifting(9), tmp_path / "a.mp4", fps)
    listing = list_frames(tmp_path / "a.mp4", until=60)
    assert np.abs(listing.times - np.arange(9) / fps).max() < 1e-4 and listing.end == pytest.approx(9 / fps, abs=1e-4)
    assert len(list_frames(tmp_path / "a.mp4", until=3.5 / fps).times) == 5  # those before, and the next


def test_reading_ends_with_the_last_frame_that_is_asked_for(tmp_path):
    path = tmp_path / "a.mp4"
    write_video(drifting(17), path, 8)
    listing = list_frames(path, until=60)
    frames = decode(path, listing, [1, 2])
    assert next(frames).shape == (64, 64, 3)
    frames.close()  # which leaves no process behind: a second one reads as well
    assert len(list(decode(path, listing, [1, 2]))) == 2


def test_a_file_is_listed_once_until_it_changes(tmp_path, monkeypatch):
    path, listed = tmp_path / "a.mp4", []
    write_video(drifting(9), path, 8)
    monkeypatch.setattr(ffmpeg, "list_frames", lambda *given: listed.append(given) or list_frames(*given))
    wanted = {"fps": 8, "num_frames": 5}
    probe_video(path, **wanted)
    first = read_video(path, **wanted, height=64, width=64)
    assert np.array_equal(read_video(path, **wanted, height=64, width=64), first) and len(listed) == 1
    write_video(drifting(9)[::-1], path, 8)
    assert not np.array_equal(read_video(path, **wanted, height=64, width=64), first) and len(listed) == 2
    path.write_bytes(path.read_bytes()[:-500])
    with pytest.raises(BadClip, match="cut off"):
        read_video(path, **wanted, height=64, width=64)


# Reading: time


def counted(num_frames):
    """Frame i is gray of brightness 3 i."""
    return np.broadcast_to((3 * np.arange(num_frames, dtype=np.uint8))[:, None, None, None], (num_frames, 32, 32, 3))


def frame_numbers(path, **keywords):
    frames = read_video(path, height=16, width=16, **keywords)
    return (frames.mean((1, 2, 3)) / 3).round().astype(int).tolist()


@pytest.mark.parametrize(
    ("source", "fps", "start", "expected"),
    [
        (24, 24, 0.0, [0, 1, 2, 3, 4]),
        (24, 8, 0.0, [0, 3, 6, 9, 12]),
        (24, 8, 0.5, [12, 15, 18, 21, 24]),
        (30, 9, 0.0, [0, 3, 7, 10, 13]),  # 0, 3.33, 6.67, 10, 13.33
        (4, 8, 0.0, [0, 0, 1, 1, 2]),
    ],
)
def test_the_nearest_frame_is_taken(tmp_path, source, fps, start, expected):
    write_video(counted(60), tmp_path / "a.mp4", source)
    assert frame_numbers(tmp_path / "a.mp4", fps=fps, num_frames=5, start=start) == expected


def test_uneven_time_stamps(tmp_path, ffmpeg):
    write_video(counted(60), tmp_path / "a.mp4", 24)
    # Frames 0 to 9 stay, then every sixth: what a screen recorder makes.
    keep = "select='lt(n,10)+not(mod(n,6))'"
    ffmpeg("-i", tmp_path / "a.mp4", "-vf", keep, "-fps_mode", "vfr", "-crf", 8, tmp_path / "b.mp4")
    # The second is at 0, 4.8, 9.6, 14.4 and 19.2 twenty-fourths of a second.
    assert frame_numbers(tmp_path / "b.mp4", fps=8, num_frames=5) == [0, 3, 6, 9, 12]
    assert frame_numbers(tmp_path / "b.mp4", fps=5, num_frames=5) == [0, 5, 9, 12, 18]


@pytest.mark.parametrize(("num_frames", "enough"), [(16, True), (17, True), (18, False)])
def test_long_enough_or_not(tmp_path, num_frames, enough):
    write_video(counted(51), tmp_path / "a.mp4", 24)  # the last frame ends at 2.125 s
    if enough:
        assert len(frame_numbers(tmp_path / "a.mp4", fps=8, num_frames=num_frames)) == num_frames
    else:
        with pytest.raises(BadClip, match="too short: 2.12 s, which are 17 of 18 frames at 8 fps"):
            frame_numbers(tmp_path / "a.mp4", fps=8, num_frames=num_frames)


# Reading: space


def centred_square():
    """A white square of 32 in the middle of black 96 x 128."""
    frames = np.zeros((3, 96, 128, 3), np.uint8)
    frames[:, 32:64, 48:80] = 255
    return frames


@pytest.mark.parametrize(
    ("height", "width", "side"),
    [(96, 128, 32), (48, 64, 16), (48, 48, 16), (96, 96, 32), (24, 96, 24), (96, 24, 32), (192, 256, 64), (33, 33, 11)],
)
def test_scaled_to_cover_and_cropped_at_the_centre(tmp_path, height, width, side):
    write_video(centred_square(), tmp_path / "a.mp4", 8)
    frame = read_video(tmp_path / "a.mp4", fps=8, num_frames=3, height=height, width=width)[0].mean(-1) / 255
    assert frame.shape == (height, width)
    y, x = np.arange(height) + 0.5, np.arange(width) + 0.5
    assert (frame.sum(1) * y).sum() / frame.sum() == pytest.approx(height / 2, abs=0.1)
    assert (frame.sum(0) * x).sum() / frame.sum() == pytest.approx(width / 2, abs=0.1)
    assert np.sqrt(frame.sum()) == pytest.approx(np.sqrt(min(side, height) * min(side, width)), rel=0.04)


def test_shrinking_is_antialiased(tmp_path):
    stripes = np.zeros((1, 64, 64, 3), np.uint8)
    stripes[:, :, ::2] = 255
    write_video(stripes, tmp_path / "a.mp4", 8)
    frame = read_video(tmp_path / "a.mp4", fps=8, num_frames=1, height=16, width=16)
    assert np.abs(frame[:, :, 2:-2].astype(int) - 127).max() < 16  # picking pixels would give 0 or 255


# Reading: what cannot be read


def truncated(path, share):
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])


def test_bad_clips_name_their_fault(tmp_path, ffmpeg):
    def reason(name, make):
        make(tmp_path / name)
        found = []
        for read in (probe_video, lambda path, **k: read_video(path, height=64, width=64, **k)):
            with pytest.raises(BadClip) as caught:
                read(tmp_path / name, fps=8, num_frames=17)
            found.append(str(caught.value))
        assert found[0] == found[1]
        return found[0]

    def cut_start(path):  # the index stands first, so the file opens and breaks when decoded
        write_video(noise(), path, 8)
        truncated(path, 0.5)

    def cut_end(path):  # the index stands last and is lost
        ffmpeg("-f", "lavfi", "-i", "testsrc=size=64x64:rate=8:duration=3", path)
        truncated(path, 0.5)

    def garbled(path):
        write_video(noise(17), path, 8)
        content = bytearray(path.read_bytes())
        content[20_000:25_000] = bytes(5000)
        path.write_bytes(content)

    assert reason("cut_start.mp4", cut_start).startswith("its frames cannot be decoded")
    assert reason("cut_end.mp4", cut_end) == "not a video, or cut off"
    assert reason("garbled.mp4", garbled).startswith("its frames cannot be decoded")
    assert reason("empty.mp4", lambda path: path.write_bytes(b"")) == "the file is empty"
    assert reason("text.mp4", lambda path: path.write_text("a red circle")) == "not a video, or cut off"
    assert reason("missing.mp4", lambda path: None) == "no such file"
    assert reason("folder.mp4", lambda path: path.mkdir()) == "no such file"
    assert reason("one.mp4", lambda path: write_video(drifting(1), path, 8)).startswith("too short: 0.125 s")
    assert (
        reason("audio.mp4", lambda path: ffmpeg("-f", "lavfi", "-i", "sine=duration=3", path))
        == "no video stream can be found in it"
    )
    no_frames = ("-f", "lavfi", "-i", "testsrc=size=64x64:rate=8", "-frames:v", 0)
    assert reason("none.mp4", lambda path: ffmpeg(*no_frames, path)) == "no video stream can be found in it"
