"""The forecasters that have a name, each imported when it is first asked for: a new one is a file, and a line here.

Its class is what base.py calls a `NamedForecaster`: it says how it is made and what it costs. With its line it can be
attached, generated with and measured by name, and planned.
"""

import pkgutil
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Entry:
    """Where a forecaster is, and what its settings are checked against before it is imported."""

    where: str
    """module:Class."""
    by_name: bool = True
    """Whether its name is all that `attach` has to be told; else it wants a folder, or a generation to be fitted to."""
    one_pass: bool = False
    """Whether it is for one pass a step only, without the second one of classifier-free guidance."""


FORECASTERS: dict[str, Entry] = {
    "reuse": Entry("vidaccel.forecasters.reuse:Reuse"),
    "taylor": Entry("vidaccel.forecasters.taylor:Taylor"),
    "linear": Entry("vidaccel.forecasters.linear:LinearMap", by_name=False, one_pass=True),
    "multistep": Entry("vidaccel.forecasters.multistep:Multistep", by_name=False),
    "predictor": Entry("vidaccel.forecasters.learned:Predictor", by_name=False),
}


def forecaster_class(name: str) -> Any:
    """The class of that name, a `NamedForecaster`."""
    return pkgutil.resolve_name(FORECASTERS[name].where)


def attachable() -> list[str]:
    """The names that `attach(predictor=...)` takes."""
    return [name for name, entry in FORECASTERS.items() if entry.by_name]
