"""A tiny model on disk with everything that collecting reads, and a folder of clips."""

import shutil
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest

from tests.tiny import HUNYUAN_CALL, SIZE, tiny_pipeline
from vidaccel.artefacts import write_run
from vidaccel.data.clips import write_clips
from vidaccel.models.loading import LoadedPipeline, load_pipeline

CAPTIONS = ["a red circle moving right", "a blue square on white", "a green circle", "red and blue", "a square"]
FPS = 8


def save_model(folder: Path, seed: int = 0, **options: bool) -> Path:
    """A tiny HunyuanVideo that says itself how it is to be called."""
    tiny_pipeline("hunyuan_video", seed, **options).save_pretrained(folder)
    call = HUNYUAN_CALL | SIZE | {"fps": FPS, "steps": 3, "guidance": 3.0}
    write_run(folder, format="model/1", command="test", config={}, seed=seed, started=datetime.now(UTC), call=call)
    return folder


@pytest.fixture(scope="session")
def model(tmp_path_factory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def loaded(model) -> LoadedPipeline:
    """Not to be changed."""
    return load_pipeline(model)


@pytest.fixture(scope="session")
def whole_clips(tmp_path_factory) -> Path:
    """Five clips, larger and at another rate than the model's; not to be changed."""
    folder = tmp_path_factory.mktemp("clips")
    colours = np.random.default_rng(0).integers(0, 256, (len(CAPTIONS), 20, 1, 1, 3), dtype=np.uint8)
    frames = np.broadcast_to(colours, (len(CAPTIONS), 20, 48, 64, 3))
    write_clips(folder, [(clip.copy(), text) for clip, text in zip(frames, CAPTIONS, strict=True)], fps=16)
    return folder


@pytest.fixture
def clips(whole_clips, tmp_path) -> Path:
    """A copy of them to do anything with."""
    return Path(shutil.copytree(whole_clips, tmp_path / "clips"))
