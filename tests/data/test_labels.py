"""Labels in scripts that fonts have, and in those that they lack."""

import numpy as np
import pytest
from PIL import Image, ImageFont

from vidaccel.data.labels import drawable
from vidaccel.data.video import contact_sheet, write_video


@pytest.mark.parametrize(
    ("text", "shown", "family"),
    [
        ("a red circle", "a red circle", ImageFont.load_default().getname()[0]),
        ("ein größerer Kreis", "ein größerer Kreis", "DejaVu Sans"),
        ("красный круг →", "красный круг →", "DejaVu Sans"),
        ("猫 cat", r"\u732b cat", "DejaVu Sans"),
        ("a\u2028b\x0cc\nd", "a b c d", ImageFont.load_default().getname()[0]),
        ("half \ud83d", r"half \ud83d", "DejaVu Sans"),
    ],
)
def test_every_character_is_in_the_font_or_an_escape(text, shown, family):
    label, font = drawable(text)
    assert (label, font.getname()[0]) == (shown, family)


def test_a_sheet_with_labels_of_every_script(tmp_path):
    videos = [np.zeros((2, 16, 64, 3), np.uint8)] * 3
    contact_sheet(videos, tmp_path / "sheet.png", labels=["круг", "猫 🙂 قطة", "a\u2028b \ud800"])
    top = np.asarray(Image.open(tmp_path / "sheet.png").convert("L"))[:16]
    assert top.min() < 128  # something is written


def test_a_frame_folder_with_what_systems_leave_in_it_may_be_replaced(tmp_path):
    frames = np.zeros((2, 16, 16, 3), np.uint8)
    write_video(frames, tmp_path / "out", 8)
    for name in (".DS_Store", "Thumbs.db", "._00000.png"):
        (tmp_path / "out" / name).write_bytes(b"x")
    write_video(frames, tmp_path / "out", 8)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["00000.png", "00001.png"]
