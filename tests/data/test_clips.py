import json
import subprocess
import sys

import numpy as np
import pytest
import torch

from tests.data.conftest import drifting
from vidaccel.data import clips as clips_module
from vidaccel.data.clips import ClipFolder, write_clips
from vidaccel.data.video import BadClip, write_video
from vidaccel.errors import UserError

SIZE = {"num_frames": 9, "height": 32, "width": 32, "fps": 8}


@pytest.fixture
def folder(tmp_path):
    """Ten good clips of 64 x 64."""
    write_clips(tmp_path, ((drifting(9), f"clip {i}") for i in range(10)), fps=8)
    return tmp_path


def append(folder, *lines):
    with open(folder / "captions.jsonl", "ab") as file:
        for line in lines:
            file.write((line if isinstance(line, bytes) else json.dumps(line).encode()) + b"\n")


def test_what_is_written_is_read(folder):
    clips = ClipFolder(folder, **SIZE | {"height": 64, "width": 64})
    assert len(clips) == 10
    assert clips.skipped == []
    video, caption = clips[3]
    assert caption == "clip 3"
    assert video.shape == (3, 9, 64, 64)
    assert video.dtype == torch.float32
    assert video.is_contiguous()
    expected = torch.from_numpy(drifting(9)).permute(3, 0, 1, 2) / 127.5 - 1
    assert (video - expected).abs().mean() < 4 / 127.5


def test_range(tmp_path):
    black_and_white = np.zeros((9, 32, 32, 3), np.uint8)
    black_and_white[4:] = 255
    write_clips(tmp_path, [(black_and_white, "flash")], fps=8)
    video, _ = ClipFolder(tmp_path, **SIZE)[0]
    assert (video.min(), video.max()) == (-1, 1)


def test_clips_of_any_size_and_rate(tmp_path):
    write_video(drifting(40, 96, 128), tmp_path / "wide.mp4", 30)
    write_video(drifting(9, 48, 32), tmp_path / "tall.mp4", 8)
    captions = [{"file": "wide.mp4", "caption": " weit "}, {"file": "tall.mp4", "caption": "ein größeres Bild"}]
    append(tmp_path, captions[0], b"", captions[1])
    clips = ClipFolder(tmp_path, **SIZE)
    assert [(video.shape, caption) for video, caption in clips] == [
        ((3, 9, 32, 32), "weit"),
        ((3, 9, 32, 32), "ein größeres Bild"),
    ]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"a red circle", "the line is no JSON"),
        (b'{"file": "00000.mp4", "caption": "caf\xe9"}', "the line is no JSON"),
        (["00000.mp4", "a red circle"], "the line is no JSON object"),
        ({"caption": "a red circle"}, '"file" is missing, empty or no text'),
        ({"file": "00000.mp4"}, '"caption" is missing, empty or no text'),
        ({"file": "00000.mp4", "caption": " "}, '"caption" is missing, empty or no text'),
        ({"file": "00000.mp4", "caption": 7}, '"caption" is missing, empty or no text'),
        ({"file": "gone.mp4", "caption": "a red circle"}, "(gone.mp4): no such file"),
        ({"file": "text.mp4", "caption": "a red circle"}, "(text.mp4): not a video, or cut off"),
        ({"file": "short.mp4", "caption": "a red circle"}, "(short.mp4): too short"),
    ],
)
def test_a_bad_line_is_named_skipped_and_counted(folder, caplog, line, reason):
    (folder / "text.mp4").write_text("a red circle")
    write_video(drifting(8), folder / "short.mp4", 8)
    append(folder, line, {"file": "00001.mp4", "caption": "the last"})
    clips = ClipFolder(folder, **SIZE)
    assert len(clips) == 11
    assert clips[10][1] == "the last"
    assert len(clips.skipped) == 1
    assert "captions.jsonl, line 11" in clips.skipped[0]
    assert reason in clips.skipped[0]
    assert caplog.messages == [f"skipped {clips.skipped[0]}"]


def test_too_many_bad_lines(folder):
    append(folder, b"one", b"two", b"three", b"four")
    assert len(ClipFolder(folder, **SIZE, max_bad_share=0.3)) == 10
    with pytest.raises(UserError) as caught:
        ClipFolder(folder, **SIZE)
    assert "4 of 14 clips" in caught.value.message
    assert caught.value.message.count("the line is no JSON") == 3
    assert "10%" in caught.value.hint


def test_no_usable_clip(tmp_path):
    with pytest.raises(UserError, match="it has no captions.jsonl"):
        ClipFolder(tmp_path, **SIZE)
    append(tmp_path, b"")
    with pytest.raises(UserError, match="0 of 0 clips"):
        ClipFolder(tmp_path, **SIZE)
    append(tmp_path, b"one")
    with pytest.raises(UserError, match="1 of 1 clips"):
        ClipFolder(tmp_path, **SIZE, max_bad_share=1)


def test_a_clip_that_breaks_later_is_named(folder):
    clips = ClipFolder(folder, **SIZE)
    (folder / "00002.mp4").unlink()
    with pytest.raises(BadClip, match=r"00002\.mp4: no such file"):
        clips[2]


def test_an_interrupted_folder_has_no_captions(folder):
    def clips():
        yield drifting(9), "new"
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_clips(folder, clips(), fps=8)
    assert not (folder / "captions.jsonl").exists()


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="not a folder"):
        write_clips(tmp_path / "file", [(drifting(9), "a")], fps=8)


def test_ffmpeg_is_not_imported_before_it_is_needed():
    script = "import sys, vidaccel.data.clips; sys.exit('imageio_ffmpeg' in sys.modules)"
    subprocess.run([sys.executable, "-c", script], check=True)


def test_file_and_caption_that_are_swapped_are_told(folder):
    append(folder, {"file": "clip 3", "caption": "00003.mp4"})
    clips = ClipFolder(folder, **SIZE)
    assert len(clips) == 10
    assert '"file" and "caption" are swapped' in clips.skipped[0]


def test_a_byte_order_mark_is_no_part_of_the_first_line(folder):
    path = folder / "captions.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert ClipFolder(folder, **SIZE).skipped == []


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"file": "x" * 300 + ".mp4", "caption": "long"}, "File name too long"),
        ({"file": "a\0b.mp4", "caption": "null"}, "no such file"),
        ({"file": "\ud800.mp4", "caption": "half a name"}, '"file" has half of a character'),
        ({"file": "00000.mp4", "caption": "half \ud83d"}, '"caption" has half of a character'),
        ({"file": ".", "caption": "a folder"}, "no such file"),
        ({"file": "00000.mp4/x.mp4", "caption": "under a file"}, "no such file"),
    ],
)
def test_a_line_that_names_nothing_readable_is_skipped_named_and_counted(folder, record, reason, caplog):
    append(folder, record, {"file": "gone.mp4", "caption": "gone"})
    clips = ClipFolder(folder, **SIZE, max_bad_share=0.2)
    assert len(clips) == 10
    assert "captions.jsonl, line 11" in clips.skipped[0] and reason in clips.skipped[0]
    assert f"2 of 12 clips in {folder} are left out" in caplog.text


def test_a_clip_that_may_not_be_read_is_skipped(folder, monkeypatch):
    plain = clips_module.probe_video

    def forbidden(path, **size):
        if path.name == "00004.mp4":
            raise PermissionError(13, "Permission denied", str(path))
        plain(path, **size)

    monkeypatch.setattr(clips_module, "probe_video", forbidden)
    assert "line 5 (00004.mp4): Permission denied" in ClipFolder(folder, **SIZE).skipped[0]
