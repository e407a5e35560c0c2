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
    """Frames [..., H, W, 3] uint8 -> the same after a round trip through an mp4, all clips through one, since most of
    the time is that of starting ffmpeg."""
    path = tmp_path_factory.mktemp("clips") / "clip.mp4"

    def round_trip(frames: torch.Tensor) -> np.ndarray:
        together = frames.flatten(0, -4).numpy()
        write_video(together, path, FPS)
        found = read_video(path, fps=FPS, num_frames=len(together), height=SIZE, width=SIZE)
        return found.reshape(frames.shape)

    return round_trip
