"""The sprites world, coloured shapes that move: what general code asks of a world is here, the rest is its own.

This file imports nothing heavy: a shipped model's name is looked up without the world's renderer or scorer. No module
beside it is called as a function here, or importing the one would put it in the place of the other.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vidaccel.collect.bank import Bank
    from vidaccel.worlds import Scorer, Split
    from vidaccel.worlds.sprites.source import RenderedScenes

LAMPS = "lamps"
PROMPTS = (LAMPS,)
"""Sets of prompts beside the world's own: those with lamps."""
SHIPPED = Path(__file__).parent / "weights"


def clip_source(loaded: Any, clips: int, seed: int, size: Mapping[str, int], fps: float) -> "RenderedScenes | None":
    """See `vidaccel.worlds.World`."""
    from vidaccel.worlds.sprites import source

    if not source.knows_sprites(loaded):
        return None
    source.check_size(size, fps)
    return source.RenderedScenes(clips, seed, lamps=source.lamps_share(loaded))


def bank(loaded: Any, clips: int, captions: int, seed: int, split: "Split") -> "Bank | None":
    """See `vidaccel.worlds.World`."""
    from vidaccel.worlds.sprites.drawing import Scenes
    from vidaccel.worlds.sprites.rendered_bank import rendered_bank
    from vidaccel.worlds.sprites.source import knows_sprites, lamps_share

    if not knows_sprites(loaded):
        return None
    return rendered_bank(loaded, Scenes(seed, split, lamps=lamps_share(loaded)), clips, captions)


def scorer(prompts: str = "") -> "Scorer":
    """See `vidaccel.worlds.World`."""
    from vidaccel.worlds.sprites.scoring import SpritesScorer

    return SpritesScorer(prompts == LAMPS)
