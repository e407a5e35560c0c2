"""Which weights made something: what features and predictors are bound to.

A pipeline's weights fall in two: those that turn prompts and videos into what the transformer works on, which a teacher
shares with all its students, and those that make velocities (denoisers, a conditioning, an adapter). A hub id is known
by the files of its snapshot, as a folder is by its own.
"""

import hashlib
import json
from pathlib import Path

from torch import nn

from vidaccel.families.walk import denoisers_of
from vidaccel.models.files import ADAPTERS
from vidaccel.models.loading import LoadedPipeline
from vidaccel.models.unchanged import active_adapters


def encoder_hashes(loaded: LoadedPipeline) -> dict[str, str]:
    """SHA-256 of each weight file of the autoencoder and the text encoders."""
    return {name: loaded.hashes[name] for name in _encoder_files(loaded)}


def student_hash(loaded: LoadedPipeline) -> str:
    """One SHA-256 for all weights that make velocities, by names and hashes of their files, and for the adapters that
    run beside them."""
    encoders = _encoder_files(loaded)
    made = {name: loaded.hashes[name] for name in loaded.hashes if name not in encoders}
    beside = _adapters_beside(loaded)
    if any(beside):
        return _digest({"files": made or loaded.source, "adapters": beside if len(beside) > 1 else beside[0]})
    return _digest(made or loaded.source)


def student_hashes(loaded: LoadedPipeline) -> set[str]:
    """All that `student_hash` may have been when something was made for this model: that of a hub id was once
    made of the id."""
    plain = not any(_adapters_beside(loaded))
    once = plain and not any(name.startswith(ADAPTERS) for name in loaded.hashes)
    return {student_hash(loaded)} | ({_digest(loaded.source)} if once and not Path(loaded.source).exists() else set())


def _adapters_beside(loaded: LoadedPipeline) -> list[str | None]:
    """`active_adapters` of each denoiser."""
    return [active_adapters(each, loaded.family) for each in denoisers_of(loaded.pipe, loaded.family)]


def _encoder_files(loaded: LoadedPipeline) -> list[str]:
    denoisers = {denoiser.attribute for denoiser in loaded.family.denoisers}
    encoders = {name for name, part in loaded.pipe.components.items() if isinstance(part, nn.Module)} - denoisers
    return [name for name in loaded.hashes if name.split("/")[0] in encoders]


def _digest(content: object) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
