"""vidaccel: make video diffusion transformers an order of magnitude faster, and measure honestly what it cost."""

import importlib
from typing import Any

__version__ = "0.1.0"

_LAZY = {"attach": "vidaccel.cache.attach", "load_pipeline": "vidaccel.models.loading"}
"""What is imported when it is first asked for, so that importing the package loads no torch."""


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_LAZY[name]), name)
