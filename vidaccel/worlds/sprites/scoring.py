"""The sprites world's `Scorer`: prompts from its captions, scores from its detectors."""

import random
from collections.abc import Mapping
from typing import ClassVar

import numpy as np

from vidaccel.worlds import Scores
from vidaccel.worlds.sprites.captions import caption
from vidaccel.worlds.sprites.parse import parse
from vidaccel.worlds.sprites.score import score_clip, totals
from vidaccel.worlds.sprites.world import random_scene


class SpritesScorer:
    """See `vidaccel.worlds.Scorer`."""

    spreads: ClassVar[Mapping[str, float]] = {"total": 5.0}

    def held_out_prompts(self, count: int) -> list[str]:
        """One sprite and two in turn, in combinations held out of training."""
        rng = random.Random("held out")
        return [caption(random_scene(rng, "held_out", pair_share=i % 2), rng) for i in range(count)]

    def training_prompts(self, count: int) -> list[str]:
        rng = random.Random("fitting")
        return [caption(random_scene(rng), rng) for _ in range(count)]

    def choosing_prompts(self, count: int) -> list[str]:
        rng = random.Random("choosing")
        return [caption(random_scene(rng, "train", pair_share=i % 2), rng) for i in range(count)]

    def score(self, frames: np.ndarray, prompt: str) -> Scores:
        return score_clip(frames, parse(prompt))

    def meaning(self, prompt: str) -> str:
        background, sprites = parse(prompt)
        return "; ".join([background, *map(" ".join, sprites)])

    def totals(self, means: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        return totals(means)
