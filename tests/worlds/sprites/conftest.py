"""Rendered clips as a user sees them: written to an mp4 at the project's own settings, and read back."""

from collections.abc import Callable

import numpy as np
import pytest
import torch

from vidaccel.data.video import read_video, write_video
from vidaccel.worlds.sprites.world import FPS, SIZE

ThroughMp4 = Callable[[torch.Tensor], np.ndarray]


@pytest.fixture(scope="session")
def through_mp4(tmp_path_factory: pytest.TempPathFactory) -> ThroughMp4:
    """Frames [T, H, W, 3] uint8 -> the same after a round trip through an mp4."""
    path = tmp_path_factory.mktemp("clips") / "clip.mp4"

    def round_trip(frames: torch.Tensor) -> np.ndarray:
        write_video(frames.numpy(), path, FPS)
        return read_video(path, fps=FPS, num_frames=len(frames), height=SIZE, width=SIZE)

    return round_trip
