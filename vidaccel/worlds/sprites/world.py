"""The attributes of the sprites world, how a scene is drawn at random, and which scenes are never trained on.

A scene is one or two sprites on a plain background. Everything is in pixels of a 64 x 64 frame; a clip has 17 frames at
8 frames per second. Speeds are the same for every sprite, so that "how far does it move" has one right answer.

A (shape, colour, motion) triple is held out of training when the sum of its three indices is 3 modulo 6: a Latin
pattern, so every pair of attributes is still seen in training, and only the combination is new.
"""

import random
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from vidaccel.errors import UserError
from vidaccel.worlds import Split

SIZE = 64
NUM_FRAMES = 17
FPS = 8

SHAPES = ("circle", "square", "triangle", "cross")
COLOURS = {
    "red": (225, 30, 35),
    "green": (30, 165, 45),
    "blue": (35, 60, 225),
    "yellow": (245, 215, 30),
    "magenta": (215, 35, 210),
    "cyan": (30, 200, 215),
}
BACKGROUNDS = {"black": (0, 0, 0), "gray": (128, 128, 128), "white": (255, 255, 255)}
MOTIONS = ("left", "right", "up", "down", "still", "growing", "shrinking")
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}

TRAVEL = 20.0
"""Pixels a moving sprite covers from the first frame to the last."""
RADIUS = (7.0, 9.0)
"""Half the extent of a sprite that keeps its size, drawn uniformly."""
SMALL, LARGE = 5.0, 11.0
"""Half the extent at the two ends of growing and shrinking."""
MARGIN = 1.5
"""Pixels between a sprite and the frame's edge, or another sprite, at any time."""


@dataclass(frozen=True)
class Sprite:
    """One coloured shape. `x`, `y`: its first centre; `radius`: half its extent, unless it grows or shrinks."""

    shape: str
    colour: str | None
    """None, as for the motion, only in what a caption leaves unsaid."""
    motion: str | None
    x: float
    y: float
    radius: float

    def state(self, progress: float) -> tuple[float, float, float]:
        """Centre and half extent (x, y, radius) in pixels at `progress` in [0, 1] of the clip."""
        if self.motion == "growing":
            return self.x, self.y, SMALL + (LARGE - SMALL) * progress
        if self.motion == "shrinking":
            return self.x, self.y, LARGE - (LARGE - SMALL) * progress
        dx, dy = DIRECTIONS.get(self.motion, (0, 0))
        return self.x + dx * TRAVEL * progress, self.y + dy * TRAVEL * progress, self.radius

    @property
    def triple(self) -> tuple[str, str, str]:
        return self.shape, self.colour, self.motion


@dataclass(frozen=True)
class Scene:
    background: str
    sprites: tuple[Sprite, ...]


Odds = Mapping[str, int]
"""How often a shape or a background is drawn, by its name, against once for those that are not named."""
EVEN: Odds = MappingProxyType({})


def is_held_out(triple: tuple[str, str, str]) -> bool:
    """Whether this (shape, colour, motion) is kept for scoring."""
    shape, colour, motion = triple
    return (SHAPES.index(shape) + tuple(COLOURS).index(colour) + MOTIONS.index(motion)) % 6 == 3


TRIPLES: dict[Split, tuple[tuple[str, str, str], ...]] = {
    split: tuple(
        triple
        for triple in ((s, c, m) for s in SHAPES for c in COLOURS for m in MOTIONS)
        if is_held_out(triple) == (split == "held_out")
    )
    for split in ("train", "held_out")
}


def random_scene(rng: random.Random, split: Split = "train", pair_share: float = 0.5, odds: Odds = EVEN) -> Scene:
    """A scene of one sprite, or with probability `pair_share` of two, every triple of which belongs to `split`.

    The two sprites of a pair differ in colour and in shape, so that each can be told from the other in the caption.
    Raises `UserError` if `odds` name neither a shape nor a background.
    """
    if strange := set(odds) - set(SHAPES) - set(BACKGROUNDS):
        raise UserError(f"odds of {min(strange)}", f"they are of {', '.join([*SHAPES, *BACKGROUNDS])}")
    drawn = [triple for triple in TRIPLES[split] for _ in range(odds.get(triple[0], 1))]
    triples = [rng.choice(drawn)]
    if rng.random() < pair_share:
        triples.append(rng.choice([t for t in drawn if t[0] != triples[0][0] and t[1] != triples[0][1]]))
    backgrounds = [background for background in BACKGROUNDS for _ in range(odds.get(background, 1))]
    return Scene(rng.choice(backgrounds), place(rng, triples))


def place(rng: random.Random, triples: list[tuple[str, str, str]]) -> tuple[Sprite, ...]:
    """Sprites for `triples` at random places where they stay in the frame and never touch, all clip long.

    Two stand side by side with the first one on the left or, where one of them moves sideways, one above the other with
    the first on top. So a caption says which sprite is where: without that, which of two shapes emerging from the noise
    is which is an arbitrary choice that every token has to make alike, and a small model paints both with both colours.
    """
    start, end = (1, 3) if any(motion in ("left", "right") for _, _, motion in triples) else (0, 2)
    while True:
        sprites = tuple(_place_one(rng, triple) for triple in triples)
        if len(sprites) == 1 or _swept(sprites[0])[end] <= _swept(sprites[1])[start]:
            return sprites


Box = tuple[float, float, float, float]


def _place_one(rng: random.Random, triple: tuple[str, str, str]) -> Sprite:
    radius = rng.uniform(*RADIUS)
    left, top, right, bottom = _swept(Sprite(*triple, x=0.0, y=0.0, radius=radius))
    return Sprite(*triple, x=rng.uniform(-left, SIZE - right), y=rng.uniform(-top, SIZE - bottom), radius=radius)


def _swept(sprite: Sprite) -> Box:
    """The box (left, top, right, bottom) that the sprite covers during the clip, with half a margin around it."""
    states = sprite.state(0.0), sprite.state(1.0)
    return (
        min(x - r for x, _, r in states) - MARGIN,
        min(y - r for _, y, r in states) - MARGIN,
        max(x + r for x, _, r in states) + MARGIN,
        max(y + r for _, y, r in states) + MARGIN,
    )
