"""The distillation methods, by the name that settings give them. This table imports none of them, and no torch.

Everything that is particular to a method lies in its own module or folder, and a line here is how the rest finds it:
`vidaccel distill` its `Method` (base.py), `vidaccel.config.distill` the group of settings that bears the method's name.
"""

import pkgutil
from typing import Any, NamedTuple


class Entry(NamedTuple):
    """Where a method is, as "module:name"."""

    method: str
    """Its `Method`."""
    settings: str | None = None
    """The dataclass of its own settings, in a module that imports no torch; None for a method that has none."""


METHODS = {
    "cfg": Entry("vidaccel.train.methods.cfg:METHOD"),
    "decoder": Entry("vidaccel.train.methods.decoder.method:METHOD", "vidaccel.train.methods.decoder:DecoderTraining"),
    "mean_velocity": Entry(
        "vidaccel.train.methods.mean_velocity.method:METHOD",
        "vidaccel.train.methods.mean_velocity.settings:MeanVelocityTraining",
    ),
}


def method_settings() -> dict[str, type]:
    """The dataclass of each method that has settings of its own."""
    return {name: pkgutil.resolve_name(entry.settings) for name, entry in METHODS.items() if entry.settings}


def method_of(name: str) -> Any:
    """The `Method` of that name."""
    return pkgutil.resolve_name(METHODS[name].method)
