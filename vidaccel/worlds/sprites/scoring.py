"""The sprites world's `Scorer`: prompts from its captions, scores from its detectors."""

import random
from collections.abc import Mapping

import numpy as np

from vidaccel.worlds import Scores, Split
from vidaccel.worlds.sprites.captions import caption
from vidaccel.worlds.sprites.detect import Detection, detect
from vidaccel.worlds.sprites.parse import Meaning, parse
from vidaccel.worlds.sprites.render import render, to_uint8
from vidaccel.worlds.sprites.score import features, has_lamps, lamps_agreement, score_found, totals
from vidaccel.worlds.sprites.world import Scene, carriers, place, place_with_lamps, random_scene


class SpritesScorer:
    """See `vidaccel.worlds.Scorer`."""

    def __init__(self, lamps: bool = False) -> None:
        """`lamps`: whether every prompt has them; none has otherwise."""
        self.spreads: Mapping[str, float] = {} if lamps else {"total": 7.6}
        """Of 20 and 4 steps of the shipped student, on 32 prompts; with lamps it is not known yet."""
        self._lamps = float(lamps)
        self._last: tuple[np.ndarray, bool, Detection] | None = None

    def held_out_prompts(self, count: int) -> list[str]:
        """One sprite and two in turn, in combinations held out of training."""
        return self._prompts("held out", "held_out", count, even=True)

    def training_prompts(self, count: int) -> list[str]:
        return self._prompts("fitting", "train", count)

    def choosing_prompts(self, count: int) -> list[str]:
        return self._prompts("choosing", "train", count, even=True)

    def _prompts(self, stream: str, split: Split, count: int, even: bool = False) -> list[str]:
        """`even`: as many of one sprite as of two."""
        rng = random.Random(f"{stream}, lamps" if self._lamps else stream)
        shares = [i % 2 if even else 0.5 for i in range(count)]
        return [caption(random_scene(rng, split, pair_share=share, lamps=self._lamps), rng) for share in shares]

    def score(self, frames: np.ndarray, prompt: str) -> Scores:
        meaning = parse(prompt)
        return score_found(self._found(frames, meaning), frames, meaning)

    def features(self, frames: np.ndarray, prompt: str) -> list[list[float]]:
        meaning = parse(prompt)
        return features(self._found(frames, meaning), meaning)

    def agreement(self, frames: np.ndarray, reference: np.ndarray, prompt: str) -> float | None:
        """The share of the reference's lamps that are the same way."""
        meaning = parse(prompt)
        if not has_lamps(meaning):
            return None
        own = self._found(frames, meaning), frames
        return lamps_agreement(own, (detect(reference, lamps=True), reference), meaning)

    def _found(self, frames: np.ndarray, meaning: Meaning) -> Detection:
        """Of the same frames found once: that is most of the work."""
        lamps = has_lamps(meaning)
        if self._last is None or self._last[0] is not frames or self._last[1] != lamps:
            self._last = frames, lamps, detect(frames, lamps)
        return self._last[2]

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
