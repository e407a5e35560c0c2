"""Which shipped configuration a command takes where none is named: that of the shipped world, or of a model of one's
own."""

from collections.abc import Sequence

from vidaccel.worlds import WORLDS

CONFS = {
    "collect-features": ("model", "sprites", "clips"),
    "distill": ("teacher", "sprites/cfg", "cfg"),
    "train-predictor": ("student", "sprites", "trajectories"),
    "benchmark": ("model", "sprites", "untrained"),
}
"""Of each command: the setting that names its model, the configuration for the shipped one, that for another."""


def default_conf(command: str, words: Sequence[str]) -> str:
    """The configuration under the settings `words`, "key=value" each, which name the model or leave it out."""
    key, shipped, own = CONFS[command]
    named = [word.partition("=")[2].strip("'\"") for word in words if word.lstrip("+").startswith(f"{key}=")]
    return own if named and named[-1].split("/")[0] not in WORLDS else shipped
