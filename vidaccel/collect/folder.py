"""A feature folder that is trained on: whole, of the right kind, and made for this model."""

import logging
from collections.abc import Mapping
from pathlib import Path

from vidaccel.artefacts import read_run
from vidaccel.data.shards import ShardFolder
from vidaccel.errors import UserError

FORMAT = "features/1"
log = logging.getLogger(__name__)


def open_features(folder: str | Path, kind: str, hashes: Mapping[str, str], on_damage: str = "stop") -> ShardFolder:
    """A feature folder to train on, every byte of it checked.

    Args:
        folder: as `vidaccel collect-features` wrote it.
        kind: `encoded` or `trajectory`.
        hashes: those of the model that will be trained on it, as `LoadedPipeline` has them.
        on_damage: `stop`, or `skip` to go on without the shards that are damaged, which a warning names.

    Raises:
        UserError: it is unfinished, of another kind, made with another model, or damaged.
    """
    check_made_for(folder, hashes)
    features = ShardFolder(folder, kind, on_damage=on_damage)
    if on_damage == "stop":
        features.verify()
    return features


def check_made_for(folder: str | Path, hashes: Mapping[str, str]) -> None:
    """Refuse a feature folder that was made with other weights than those of `hashes`.

    Encoded clips are those of an autoencoder and text encoders, and serve every transformer beside these; trajectories
    are those of one student in all its weights. Warns where one side has no hashes, as models from the hub have none.
    """
    run = read_run(folder, FORMAT)
    made_with = run.get("made_with")
    if not made_with or not hashes:
        log.warning("%s does not say what it was made with, or the model has no hashes: they may not fit", folder)
        return
    compared = made_with.keys() | (hashes.keys() if run["kind"] == "trajectory" else set())
    others = sorted(name for name in compared if made_with.get(name) != hashes.get(name))
    if others:
        raise UserError(
            f"{folder} was made with another model: its {', '.join(others)} differ",
            "collect features with this model, or train the one that they were made with",
        )
