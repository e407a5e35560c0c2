"""The distillation methods, by the name that settings give them. This table imports none of them, and no torch.

Everything that is particular to a method lies in its own module or folder, and a line here is how the rest finds it:
`vidaccel distill` its `Method` (base.py), `vidaccel.config.distill` the group of settings that bears the method's name.
"""

import pkgutil
from collections.abc import Mapping
from typing import Any, NamedTuple


class Entry(NamedTuple):
    """Where a method is, as "module:name"."""

    method: str
    """Its `Method`."""
    settings: str | None = None
    """The dataclass of its own settings, in a module that imports no torch; None for a method that has none."""
    unread: Mapping[str, tuple[str, ...]] = {}
    """Settings that mean nothing to it, those of a group as "train.lora_rank", by the reason; besides them the groups
    of other methods."""


METHODS = {
    "cfg": Entry("vidaccel.train.methods.cfg:METHOD", unread={"its gates are computed on clips alone": ("gate_runs",)}),
    "decoder": Entry(
        "vidaccel.train.methods.decoder.method:METHOD",
        "vidaccel.train.methods.decoder:DecoderTraining",
        unread={
            "a decoder has no part in a transformer": ("lora", "denoiser", "merge_lora"),
            "a decoder is trained whole": ("train.lora_rank",),
            "a decoder is told neither times nor scales": (
                *("guidance_range", "guidance", "negative_prompt", "embedding_rate"),
                *("times", "train_shift", "shift", "sample_steps"),
            ),
            "a decoder keeps what it learns from as decoder.kept says": ("bank",),
            "a decoder is held against its teacher on clips that are kept out of its training in any case": (
                *("gate_samples", "gate_runs", "train.gates_every"),
            ),
            "a decoder is taught by clips of one size": ("sizes",),
            "sheets of a decoder show clips that it was not trained on": ("prompts",),
        },
    ),
    "mean_velocity": Entry(
        "vidaccel.train.methods.mean_velocity.method:METHOD",
        "vidaccel.train.methods.mean_velocity.settings:MeanVelocityTraining",
    ),
}


def method_settings() -> dict[str, type]:
    """The dataclass of each method that has settings of its own."""
    return {name: pkgutil.resolve_name(entry.settings) for name, entry in METHODS.items() if entry.settings}


def why_unread(method: str, key: str) -> str | None:
    """Why the setting `key` means nothing to that method; None where it means something."""
    group = key.partition(".")[0]
    if group in METHODS and group != method:
        return f"{group} holds settings of method={group}"
    return next((reason for reason, keys in METHODS[method].unread.items() if key in keys), None)


def method_of(name: str) -> Any:
    """The `Method` of that name."""
    return pkgutil.resolve_name(METHODS[name].method)
