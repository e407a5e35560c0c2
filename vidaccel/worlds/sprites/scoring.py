"""The sprites world's `Scorer`: prompts from its captions, scores from its detectors."""

import random
from collections.abc import Mapping
from typing import ClassVar

import numpy as np

from vidaccel.worlds import Scores
from vidaccel.worlds.sprites.captions import caption
from vidaccel.worlds.sprites.detect import Detection, detect
from vidaccel.worlds.sprites.parse import parse
from vidaccel.worlds.sprites.render import render, to_uint8
from vidaccel.worlds.sprites.score import features, score_found, totals
from vidaccel.worlds.sprites.world import Scene, carriers, place, place_with_lamps, random_scene


class SpritesScorer:
    """See `vidaccel.worlds.Scorer`."""

    spreads: ClassVar[Mapping[str, float]] = {"total": 7.6}
    """Of 20 and 4 steps of the shipped student, on 32 prompts."""

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

    def __init__(self) -> None:
        self._last: tuple[np.ndarray, Detection] | None = None

    def score(self, frames: np.ndarray, prompt: str) -> Scores:
        return score_found(self._found(frames), frames, parse(prompt))

    def features(self, frames: np.ndarray, prompt: str) -> list[list[float]]:
        return features(self._found(frames), parse(prompt))

    def _found(self, frames: np.ndarray) -> Detection:
        """Of the same frames found once: that is most of the work."""
        if self._last is None or self._last[0] is not frames:
            self._last = frames, detect(frames)
        return self._last[1]

    def example(self, prompt: str, seed: int) -> np.ndarray | None:
        background, sprites = parse(prompt)
        rng, triples = random.Random(f"example/{seed}"), [sprite[:3] for sprite in sprites]
        carry = tuple(sprite.lamps for sprite in sprites)
        if any(carry) and carry not in carriers(triples):
            return None  # no room for them
        placed = place_with_lamps(rng, triples, carry) if any(carry) else place(rng, triples)
        return to_uint8(render([Scene(background, placed)]))[0].numpy()

    def meaning(self, prompt: str) -> str:
        background, sprites = parse(prompt)
        return "; ".join([background, *(" ".join([*sprite[:3], *["lamps"] * sprite.lamps]) for sprite in sprites)])

    def totals(self, means: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        return totals(means)
