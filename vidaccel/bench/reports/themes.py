"""Colours of the pictures, on a white page and on a dark one."""

from typing import Any

_SHARED: dict[Any, Any] = {"font.size": 10, "axes.spines.top": False, "axes.spines.right": False}
_INK, _PAPER = "#d8dadd", "#16181c"
LIGHT: dict[Any, Any] = _SHARED
DARK: dict[Any, Any] = _SHARED | {
    "figure.facecolor": _PAPER,
    "axes.facecolor": _PAPER,
    "savefig.facecolor": _PAPER,
    "legend.facecolor": _PAPER,
    "text.color": _INK,
    "axes.labelcolor": _INK,
    "axes.edgecolor": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
}
"""Settings of matplotlib."""
