"""The sprites world, coloured shapes that move: what general code asks of a world is here, the rest is its own.

This file imports nothing heavy: a shipped model's name is looked up without the world's renderer or scorer.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vidaccel.worlds import Scorer
    from vidaccel.worlds.sprites.source import RenderedScenes

SHIPPED = Path(__file__).parent / "weights"


def clip_source(loaded: Any, clips: int, seed: int, size: Mapping[str, int], fps: float) -> "RenderedScenes | None":
    """See `vidaccel.worlds.World`."""
    from vidaccel.worlds.sprites import source

    if not source.knows_sprites(loaded):
        return None
    source.check_size(size, fps)
    return source.RenderedScenes(clips, seed)


def scorer() -> "Scorer":
    """See `vidaccel.worlds.World`."""
    from vidaccel.worlds.sprites.scorer import SpritesScorer

    return SpritesScorer()
