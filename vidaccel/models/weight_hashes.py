"""Which weights made something: what features and predictors are bound to.

A pipeline's weights fall in two: those that turn prompts and videos into what the transformer works on, which a teacher
shares with all its students, and those that make velocities (denoisers, a conditioning, an adapter).
"""

import hashlib
import json

from torch import nn

from vidaccel.models.loading import LoadedPipeline


def encoder_hashes(loaded: LoadedPipeline) -> dict[str, str]:
    """SHA-256 of each weight file of the autoencoder and the text encoders; empty for a hub id."""
    denoisers = {denoiser.attribute for denoiser in loaded.family.denoisers}
    encoders = {name for name, part in loaded.pipe.components.items() if isinstance(part, nn.Module)} - denoisers
    return {name: digest for name, digest in loaded.hashes.items() if name.split("/")[0] in encoders}


def student_hash(loaded: LoadedPipeline) -> str:
    """One SHA-256 for all weights that make velocities, by names and hashes of their files; for a hub id, of the id."""
    made = {name: loaded.hashes[name] for name in loaded.hashes.keys() - encoder_hashes(loaded).keys()}
    return hashlib.sha256(json.dumps(made or loaded.source, sort_keys=True).encode()).hexdigest()
