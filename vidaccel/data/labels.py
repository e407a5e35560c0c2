"""Labels in any script: ASCII in pillow's own font, all else in DejaVu Sans, with escapes for what that lacks."""

import functools
from pathlib import Path
from typing import Any

from PIL import ImageFont


def drawable(text: str) -> tuple[str, Any]:
    """One line of text and a font that has every character of it."""
    text = " ".join(text.split())
    if text.isascii() and text.isprintable():
        return text, ImageFont.load_default()
    font, known = _dejavu()
    shown = (c if ord(c) in known and c.isprintable() else c.encode("ascii", "backslashreplace").decode() for c in text)
    return "".join(shown), font


@functools.cache
def _dejavu() -> tuple[Any, frozenset[int]]:
    """The font that matplotlib brings, and the characters it has."""
    import matplotlib
    from matplotlib.ft2font import FT2Font

    file = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"
    return ImageFont.truetype(str(file), size=10), frozenset(FT2Font(str(file)).get_charmap())
