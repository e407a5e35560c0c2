"""Training-free caches by the names in the configuration, to check, calibrate and switch on for a row.

`config.benchmark.CACHES` says which exist, and where the class of each is: a configuration of diffusers', which
diffusers_caches.py switches on, the settings of cache-dit, which cache_dit.py does, or a `PartsCache` in a file of its
own here.
"""

import importlib.util
import inspect
import pkgutil
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

from vidaccel.bench.baselines import cache_dit, diffusers_caches
from vidaccel.bench.baselines.parts import PartsCache
from vidaccel.config.benchmark import CACHES, MethodConfig
from vidaccel.errors import UserError, nearest
from vidaccel.models.loading import LoadedPipeline

_NOT_SETTINGS = {"pipe", "family", "indicator", "current_timestep_callback", "raw_vision_callback"}


def class_of(cache: str) -> type:
    """What does it: a `PartsCache`, or the settings of a cache of diffusers or of cache-dit."""
    return pkgutil.resolve_name(CACHES[cache])


def lacks(cache: str | None) -> str | None:
    """How to install the package that the cache is of, where it is not there."""
    if cache != "cache_dit" or importlib.util.find_spec("cache_dit") is not None:
        return None
    return "cache-dit is not installed: pip install vidaccel[peers]"


def check_settings(name: str, method: MethodConfig) -> None:
    """`UserError` for a setting that the row's cache has not, or that it refuses."""
    cls = class_of(method.cache)
    known = inspect.signature(cls).parameters.keys() - _NOT_SETTINGS
    for key in (*method.settings, *method.sweep):
        if key not in known:
            raise UserError(f'{name}: {method.cache} has no setting "{key}"', nearest(key, known))
    try:
        if issubclass(cls, PartsCache):
            cls(_Unattached(), family=_Unattached(), **method.settings)
        else:
            cls(**method.settings | ({"calibrate": True} if method.cache == "magcache" else {}))
    except (UserError, TypeError, ValueError) as error:
        reason = " ".join(str(getattr(error, "message", error)).split())
        raise UserError(f"{name}: {reason}", f"mend its settings: {dict(method.settings)}") from error


class _Unattached:
    """In the place of a pipeline, for settings that are only looked at."""


def one_at_a_time(method: MethodConfig) -> bool:
    """Whether the row's cache decides by what it sees: videos of one batch would share its decisions."""
    if method.cache is None:
        return False
    cls = class_of(method.cache)
    if issubclass(cls, cache_dit.DBCache):
        return not cls(**method.settings).static
    return cls.one_at_a_time if issubclass(cls, PartsCache) else method.cache in diffusers_caches.ONE_AT_A_TIME


def calibrate(loaded: LoadedPipeline, method: MethodConfig, generate: Callable[[], None]) -> dict[str, Any]:
    """The settings of the row with the one that is the model's own, found in one generation unless it was given."""
    if method.cache is None:
        return method.settings
    cls = class_of(method.cache)
    if issubclass(cls, PartsCache):
        return cls.calibrated(loaded, method.settings, generate)
    if issubclass(cls, cache_dit.DBCache):
        return method.settings
    return diffusers_caches.calibrated(loaded, method, generate)


def switched_on(
    loaded: LoadedPipeline, method: MethodConfig, settings: Mapping[str, Any]
) -> AbstractContextManager[Any]:
    """The row's cache on the pipeline, for the time of a `with` block.

    Raises:
        Unsupported: it would not be the method that its name says.
        Exception: whatever the cache itself raises.
    """
    cls = class_of(method.cache)
    if issubclass(cls, PartsCache):
        return cls(loaded.pipe, family=loaded.family, **settings)
    if issubclass(cls, cache_dit.DBCache):
        return cache_dit.enabled(loaded, method, settings)
    return diffusers_caches.enabled(cls, loaded, method, settings)
