import errno
import os
import subprocess

import numpy as np
import pytest


@pytest.fixture(scope="session")
def ffmpeg():
    """Run ffmpeg with the given arguments, for videos that `write_video` refuses to make."""
    import imageio_ffmpeg

    def run(*arguments):
        subprocess.run([imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-y", *map(str, arguments)], check=True)

    return run


@pytest.fixture
def full_disk(tmp_path):
    """A mounted disk of 64 KiB."""
    folder = tmp_path / "full"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)]
    try:
        mounted = subprocess.run(mount, capture_output=True).returncode == 0
    except FileNotFoundError:
        mounted = False
    if not mounted:
        pytest.skip("mounting a small disk needs root; tests/test_artefacts.py covers a full disk without")
    try:
        with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)):
            (folder / "probe").write_bytes(bytes(1 << 17))
        (folder / "probe").unlink()
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def drifting(num_frames=17, height=64, width=64):
    """Smooth colours that drift: [T, H, W, 3] uint8, no two frames alike."""
    t, y, x = np.meshgrid(np.arange(num_frames), np.arange(height), np.arange(width), indexing="ij")
    waves = [np.sin(2 * np.pi * (x / width + 0.02 * t)), np.cos(2 * np.pi * (y / height - 0.02 * t)), x / width + 0 * t]
    return np.stack([127 + 100 * wave for wave in waves], axis=-1).clip(0, 255).astype(np.uint8)


def noise(num_frames=60):
    """Frames that no format makes small."""
    return np.random.default_rng(0).integers(0, 256, (num_frames, 64, 64, 3), dtype=np.uint8)
