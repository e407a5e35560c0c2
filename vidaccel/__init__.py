"""vidaccel: make video diffusion transformers an order of magnitude faster, and measure honestly what it cost.

    import vidaccel

    frames = vidaccel.generate("a red circle moving right on black")
    with vidaccel.attach(pipe, predictor="runs/predictor", steps=20, every=3):
        video = pipe("a cat on a surfboard", num_inference_steps=20).frames[0]

What is public is imported when it is first asked for, so that `import vidaccel` loads no torch.
"""

import importlib
from typing import Any

__version__ = "0.1.0"

_MODULES = {
    "attach": "vidaccel.cache.attach",
    "load_pipeline": "vidaccel.models.loading",
    "load_student": "vidaccel.models.loading",
    "load_predictor": "vidaccel.forecasters.learned",
    "save_model": "vidaccel.models.saving",
    "generate": "vidaccel.api",
    "export_model": "vidaccel.api",
    "collect_features": "vidaccel.api",
    "distill": "vidaccel.api",
    "train_predictor": "vidaccel.api",
    "benchmark": "vidaccel.api",
    "plan": "vidaccel.api",
    "Predictor": "vidaccel.forecasters.learned",
    "Schedule": "vidaccel.cache.schedule",
    "UserError": "vidaccel.errors",
}
"""Where each public name lives; __init__.pyi says the same to type checkers (test)."""

__all__ = ["__version__", *_MODULES]  # noqa: PLE0604


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(_MODULES[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES})
