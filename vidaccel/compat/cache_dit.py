"""Private parts of cache-dit, and its import without what it logs to stdout."""

import os
from collections.abc import Iterable
from types import ModuleType
from typing import Any

from diffusers import DiffusionPipeline
from torch import nn


def cache_dit() -> ModuleType:
    """The package; `ImportError` where it is not installed. Its level of logging is read with the first import, and
    each of its many loggers writes to stdout."""
    quiet = {"CACHE_DIT_LOG_LEVEL": "error"}
    before = dict(os.environ)
    os.environ.update({name: value for name, value in quiet.items() if name not in before})
    try:
        import cache_dit
    finally:
        for name in quiet.keys() - before.keys():
            del os.environ[name]
    return cache_dit


def kept_by(transformer: nn.Module) -> Any:
    """Where it keeps what it remembers of a transformer's passes; None where it is not on it."""
    return getattr(transformer, "_context_manager", None)


def disable(pipe: DiffusionPipeline, transformers: Iterable[nn.Module]) -> None:
    """Its own way, but for the transformers' `forward`, which is the caller's to put back: it fails where that is no
    method, as under hooks of diffusers."""
    for transformer in transformers:
        vars(transformer).pop("_original_forward", None)
    cache_dit().disable_cache(pipe)
