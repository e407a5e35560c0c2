"""Random scenes of the sprites world as clips to train on, drawn when asked for."""

import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

from torch import Tensor

from vidaccel.collect.source import Record
from vidaccel.errors import UserError
from vidaccel.models.loading import LoadedPipeline
from vidaccel.worlds.sprites.captions import UNSAID, caption, told, vocabulary
from vidaccel.worlds.sprites.drawing import Scenes
from vidaccel.worlds.sprites.render import render
from vidaccel.worlds.sprites.world import FPS, NUM_FRAMES, SIZE, Odds, Scene

LAMPS_SHARE = 0.5
"""Share of scenes with lamps for a model that knows their words."""


@dataclass(frozen=True)
class RenderedScenes:
    """Random scenes of the sprites world: the i-th is a function of (seed, pair_share, odds, lamps, i) alone."""

    count: int
    seed: int
    pair_share: float = 0.5
    """Share of scenes with two sprites."""
    odds: Odds = field(default_factory=dict)
    lamps: float = 0.0
    """Share of scenes with lamps."""

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[Tensor, Record]:
        return render([self.scene(index)])[0], self.record(index)

    def record(self, index: int) -> Record:
        return {"caption": self.scenes.told(index, 1)[1][0], "fps": FPS}

    def another_caption(self, index: int, rng: random.Random) -> str:
        """The clip in other words, or with other things left unsaid."""
        return caption(told(self.scene(index), rng), rng)

    def scene(self, index: int) -> Scene:
        return self.scenes.scene(index)

    @cached_property
    def scenes(self) -> Scenes:
        return Scenes(self.seed, "train", self.pair_share, self.odds, self.lamps)

    @property
    def fingerprint(self) -> Record:
        return {
            "data": None,
            "seed": self.seed,
            "unsaid": UNSAID,
            "pair_share": self.pair_share,
            "odds": dict(self.odds),
        } | ({"lamps": self.lamps} if self.lamps else {})


def check_size(size: Mapping[str, int], fps: float) -> None:
    """Raises `UserError` for num_frames, height, width and a rate that scenes are not rendered in."""
    if (size["num_frames"], size["height"], size["width"], fps) != (NUM_FRAMES, SIZE, SIZE, FPS):
        raise UserError(
            f"scenes are rendered in {NUM_FRAMES} frames of {SIZE}x{SIZE} at {FPS} a second, not as asked for",
            "leave num_frames, height, width and fps out, or give a folder of videos: data=FOLDER",
        )


def knows_sprites(loaded: LoadedPipeline) -> bool:
    """Whether the model's words are those of the sprites world's captions, those of lamps among them or not."""
    return _words(loaded) in (set(vocabulary()), set(vocabulary(lamps=True)))


def lamps_share(loaded: LoadedPipeline) -> float:
    """Share of scenes with lamps in what the model is trained on: none where it lacks their words."""
    return LAMPS_SHARE if _words(loaded) == set(vocabulary(lamps=True)) else 0.0


def _words(loaded: LoadedPipeline) -> set[str]:
    tokenizer = loaded.pipe.tokenizer
    return set(tokenizer.get_vocab()) - set(tokenizer.all_special_tokens)
