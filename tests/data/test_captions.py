"""Captions in other forms than captions.jsonl."""

import sys

import pytest

from tests.data.conftest import drifting
from vidaccel.data.captions import read_captions
from vidaccel.data.clips import ClipFolder
from vidaccel.data.video import write_video
from vidaccel.errors import UserError

SIZE = {"num_frames": 2, "height": 32, "width": 32, "fps": 8}


@pytest.fixture
def folder(tmp_path):
    for name in "ab":
        write_video(drifting(2), tmp_path / f"{name}.mp4", 8)
    return tmp_path


def found(folder) -> dict[str, str]:
    clips = ClipFolder(folder, **SIZE, max_bad_share=0.9)
    return dict(zip(clips.files, clips.captions, strict=True))


def test_a_text_beside_each_video(folder):
    (folder / "a.txt").write_text("a cat\non a surfboard\n", encoding="utf-8-sig")
    assert found(folder) == {"a.mp4": "a cat on a surfboard"}
    (folder / "b.TXT").write_bytes(b"\xff")
    (folder / "c.txt").write_text("of no video")
    assert found(folder) == {"a.mp4": "a cat on a surfboard"}
    (folder / "b.TXT").write_text("ein Bär", encoding="utf-8")
    assert found(folder) == {"a.mp4": "a cat on a surfboard", "b.mp4": "ein Bär"}


@pytest.mark.parametrize("header", ["file,caption", "id,file_name,text", "\ufeffpath,prompt"])
def test_columns_of_a_table(folder, header):
    more = "7," if header.startswith("id") else ""
    rows = [f'{more}b.mp4,"a dog, ""wet"""', f"{more}a.mp4,a cat", f"{more}none.mp4,nothing", f"{more}a.mp4"]
    (folder / "metadata.csv").write_text("\n".join([header, *rows]), encoding="utf-8")
    (folder / "a.txt").write_text("the table comes first")
    assert found(folder) == {"b.mp4": 'a dog, "wet"', "a.mp4": "a cat"}
    skipped = ClipFolder(folder, **SIZE, max_bad_share=0.9).skipped
    assert "metadata.csv, line 4 (none.mp4)" in skipped[0] and 'line 5: "caption" is missing' in skipped[1]


def test_a_table_that_is_none_is_refused(folder, monkeypatch):
    table = folder / "clips.csv"
    for content, why in (
        (b"file,label\na.mp4,x\n", "columns file, label, and none of captions"),
        (b"\xff", "no UTF-8"),
    ):
        table.write_bytes(content)
        with pytest.raises(UserError, match=why):
            read_captions(folder)
    (folder / "others.csv").write_bytes(b"")
    with pytest.raises(UserError, match="has 2 .csv files"):
        read_captions(folder)
    table.unlink()
    (folder / "others.csv").rename(folder / "clips.parquet")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UserError, match="pyarrow, which is not installed\nhint: pip install pyarrow"):
        read_captions(folder)


def test_columns_of_parquet(folder):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.table({"video": ["a.mp4", "b.mp4"], "text": ["a cat", None]}), folder / "x.parquet")
    assert found(folder) == {"a.mp4": "a cat"}


def test_captions_jsonl_comes_first(folder):
    (folder / "x.csv").write_text("file,caption\na.mp4,of the table\n")
    (folder / "captions.jsonl").write_text('{"file": "a.mp4", "caption": "of the lines"}\n')
    assert found(folder) == {"a.mp4": "of the lines"}
