"""A feature folder that is trained on: whole, of the right kind, and made for this model."""

import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from vidaccel.artefacts import read_run
from vidaccel.collect.encode import IMAGE, LATENT, encode_texts, is_mask
from vidaccel.data.shards import ShardFolder
from vidaccel.errors import UserError
from vidaccel.families.registry import FAMILIES
from vidaccel.families.walk import conditions_of, denoisers_of, latent_channels, stored_inputs
from vidaccel.models.calling import video_size
from vidaccel.models.loading import LoadedPipeline

FORMAT = "features/1"
NOT_TEXT = {LATENT, IMAGE, "times", "x", "velocity", "cache", "cache_text"}
"""Tensors of a sample that are made from neither its caption nor its image."""
SAID = ("guidance", "negative_prompt")
"""Settings of collect-features that say how whoever is trained on the features is called, besides the videos' size."""
log = logging.getLogger(__name__)


def open_features(
    folder: str | Path,
    kind: str | None,
    hashes: Mapping[str, str],
    on_damage: str = "stop",
    several_sizes: bool = False,
) -> ShardFolder:
    """A feature folder to train on, every byte of it checked.

    Args:
        folder: as `vidaccel collect-features` wrote it.
        kind: `encoded` or `trajectory`; None takes both.
        hashes: those of the model that will be trained on it, as `LoadedPipeline` has them.
        on_damage: `stop`, or `skip` to go on without the shards that are damaged, which a warning names.
        several_sizes: whether whoever trains takes videos of several; else it gets those of the commonest, and a line
            says so.

    Raises:
        UserError: it is unfinished, of another kind, made with another model, or damaged.
    """
    check_made_for(folder, hashes)
    features = ShardFolder(folder, kind, on_damage=on_damage)
    if on_damage == "stop":
        features.verify()
    if several_sizes or features.buckets is None:
        return features
    some = features.commonest()
    log.info("%d of %d samples: those of the size that most have", len(some), len(features))
    return some


def check_tensors(features: ShardFolder, loaded: LoadedPipeline) -> None:
    """Refuse samples whose latents, texts or conditions are not those that this model's transformer takes.

    Hashes say so sooner, but features that an older vidaccel made with a model of the hub have none.
    """
    tensors, empty = features[0][0], encode_texts(loaded, [""])
    transformer = denoisers_of(loaded.pipe, loaded.family)[0]
    check_conditions(features, loaded)
    known = empty.keys() | set(stored_inputs(transformer, loaded.family))
    others = tensors.keys() - known - NOT_TEXT or empty.keys() - tensors.keys()
    wanted = {text.stored: empty[text.stored].shape[-1] for text in loaded.family.text_tensors if not is_mask(text)}
    wanted["latent"] = latent_channels(transformer)
    latent = tensors[LATENT] if LATENT in tensors else tensors["x"]
    found = {name: tensors[name].shape[-1] for name in tensors.keys() & wanted} | {"latent": latent.shape[-4]}
    others = others or {name for name in wanted if found[name] != wanted[name]}
    if others:
        raise UserError(
            f"{features.folder} was made with another model: {', '.join(sorted(others))} do not fit {loaded.source}",
            "collect features with this model, or train the one that they were made with",
        )


def check_conditions(features: ShardFolder, loaded: LoadedPipeline) -> None:
    """Refuse features without what the model makes of an image, and those with more than it takes."""
    every = {condition.stored for family in FAMILIES.values() for condition in family.conditions} | {IMAGE}
    conditions = conditions_of(denoisers_of(loaded.pipe, loaded.family)[0], loaded.family)
    wanted = {condition.stored for condition in conditions} | ({IMAGE} if conditions else set())
    found = set(features[0][0])
    if missing := sorted(wanted - found):
        raise UserError(
            f"{features.folder} has no {', '.join(missing)}, which {loaded.source} needs: it begins with an image",
            "collect features with this model",
        )
    if surplus := sorted((every & found) - wanted):
        raise UserError(
            f"{features.folder} has {', '.join(surplus)}, which {loaded.source} does not take",
            "collect features with this model, or train the one that they were made with",
        )


def called_like(features: ShardFolder, loaded: LoadedPipeline) -> LoadedPipeline:
    """The model with what these features say of its call in place of its own: the videos' size (that which most have)
    and rate, and what was said of guidance when they were collected. A student keeps its own scale, which it was given
    by a training."""
    tensors, record = features.commonest()[0]
    latent = tensors[LATENT] if LATENT in tensors else tensors["x"]
    said: dict[str, Any] = video_size(loaded, latent.shape)
    config = read_run(features.folder, FORMAT)["config"]
    if fps := record.get("fps") or config.get("fps"):
        said["fps"] = fps
    if loaded.call.get("two_pass") is not False:  # which every student's says
        said |= {name: config[name] for name in SAID if config.get(name) is not None}
    return replace(loaded, call=loaded.call | said)


def check_made_for(folder: str | Path, hashes: Mapping[str, str]) -> None:
    """Refuse a feature folder that was made with other weights than those of `hashes`.

    Encoded clips are those of an autoencoder and text encoders, and serve every transformer beside these; trajectories
    are those of one student in all its weights. Warns where one side has no hashes, as what an older vidaccel made with
    a model of the hub.
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
