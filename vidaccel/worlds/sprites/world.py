"""The attributes of the sprites world, how a scene is drawn at random, and which scenes are never trained on.

A scene is one or two sprites on a plain background. Everything is in pixels of a 64 x 64 frame; a clip has 17 frames at
8 frames per second. Speeds are the same for every sprite, so that "how far does it move" has one right answer.

A sprite may carry a board of lamps, each on or off at random and drawn anew every four frames: what no caption says,
and what is settled late. Such sprites are larger. Unless a share of scenes is asked for, none has lamps.

A (shape, colour, motion) triple is held out of training when the sum of its three indices is 3 modulo 6: a Latin
pattern, so every pair of attributes is still seen in training, and only the combination is new.
"""

import random
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import product
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

CELL = 8
"""Pixels of a lamp, each way: what a pixel of the autoencoder's latents spans."""
CELLS = (3, 4, 5)
"""Lamps a row of a board, and rows."""
PERIOD = 4
"""Frames for which a lamp stays as it is, in step with the autoencoder's frames: the first frame is a period alone."""
PERIODS = 1 + (NUM_FRAMES - 1) // PERIOD
LAMPS_RADIUS = (14.0, 20.0)
"""Half the extent of a sprite with lamps, drawn uniformly; the two ends of growing and shrinking."""


@dataclass(frozen=True)
class Board:
    """Lamps in the middle of a sprite, `cells` rows of `cells`, with which it moves."""

    cells: int
    on: tuple[tuple[bool, ...], ...]
    """By period, PERIODS of them, whether each lamp is on, row by row from the top left."""

    def __post_init__(self) -> None:
        if self.cells not in CELLS or [len(lamps) for lamps in self.on] != [self.cells**2] * PERIODS:
            raise UserError(
                f"a board of {self.cells} x {self.cells} lamps in {len(self.on)} periods",
                f"boards have {' or '.join(map(str, CELLS))} lamps a row, and {PERIODS} periods",
            )


@dataclass(frozen=True)
class Sprite:
    """One coloured shape. `x`, `y`: its first centre; `radius`: half its extent, unless it grows or shrinks.

    Raises `UserError` for a board that does not fit it.
    """

    shape: str
    colour: str | None
    """None, as for the motion, only in what a caption leaves unsaid."""
    motion: str | None
    x: float
    y: float
    radius: float
    board: Board | None = None

    def __post_init__(self) -> None:
        if self.board is not None and self.board.cells * CELL > 2 * self.least:
            raise UserError(
                f"{self.board.cells} x {self.board.cells} lamps do not fit a sprite of radius {self.least:g}",
                f"a lamp has {CELL} x {CELL} pixels, a sprite with lamps a radius of {LAMPS_RADIUS[0]:g} or more",
            )

    @property
    def lamps(self) -> bool:
        """Whether it has any."""
        return self.board is not None

    @property
    def ends(self) -> tuple[float, float]:
        """Half the extent before growing and after it."""
        return (SMALL, LARGE) if self.board is None else LAMPS_RADIUS

    @property
    def least(self) -> float:
        """Half the least extent that it has in the clip."""
        return self.ends[0] if self.motion in ("growing", "shrinking") else self.radius

    def state(self, progress: float) -> tuple[float, float, float]:
        """Centre and half extent (x, y, radius) in pixels at `progress` in [0, 1] of the clip."""
        small, large = self.ends
        if self.motion == "growing":
            return self.x, self.y, small + (large - small) * progress
        if self.motion == "shrinking":
            return self.x, self.y, large - (large - small) * progress
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


def random_scene(
    rng: random.Random, split: Split = "train", pair_share: float = 0.5, odds: Odds = EVEN, lamps: float = 0.0
) -> Scene:
    """A scene of one sprite, or with probability `pair_share` of two, every triple of which belongs to `split`.

    The two sprites of a pair differ in colour and in shape, so that each can be told from the other in the caption.
    With probability `lamps` one of them carries lamps, or both do where there is room; 0 draws no number for it.
    Raises `UserError` if `odds` name neither a shape nor a background.
    """
    if strange := set(odds) - set(SHAPES) - set(BACKGROUNDS):
        raise UserError(f"odds of {min(strange)}", f"they are of {', '.join([*SHAPES, *BACKGROUNDS])}")
    with_lamps = lamps > 0 and rng.random() < lamps
    drawn = [triple for triple in TRIPLES[split] for _ in range(odds.get(triple[0], 1))]
    while True:
        triples = [rng.choice(drawn)]
        if rng.random() < pair_share:
            triples.append(rng.choice([t for t in drawn if t[0] != triples[0][0] and t[1] != triples[0][1]]))
        if not with_lamps or carriers(triples):
            break
    backgrounds = [background for background in BACKGROUNDS for _ in range(odds.get(background, 1))]
    background = rng.choice(backgrounds)
    if with_lamps:
        return Scene(background, place_with_lamps(rng, triples, rng.choice(carriers(triples))))
    return Scene(background, place(rng, triples))


def place(rng: random.Random, triples: list[tuple[str, str, str]]) -> tuple[Sprite, ...]:
    """Sprites for `triples` at random places where they stay in the frame and never touch, all clip long.

    Two stand side by side with the first one on the left or, where one of them moves sideways, one above the other with
    the first on top. So a caption says which sprite is where: without that, which of two shapes emerging from the noise
    is which is an arbitrary choice that every token has to make alike, and a small model paints both with both colours.
    """
    start = _side(triples)
    end = start + 2
    while True:
        sprites = tuple(_place_one(rng, triple) for triple in triples)
        if len(sprites) == 1 or _swept(sprites[0])[end] <= _swept(sprites[1])[start]:
            return sprites


def carriers(triples: list[tuple[str, str, str]]) -> list[tuple[bool, ...]]:
    """Every way in which one of the sprites or both may carry lamps and there is room for all, however small."""
    ways = [way for way in product((True, False), repeat=len(triples)) if any(way)]
    return [way for way in ways if sum(_least_extents(triples, way)) <= SIZE]


def place_with_lamps(
    rng: random.Random, triples: list[tuple[str, str, str]], carry: tuple[bool, ...]
) -> tuple[Sprite, ...]:
    """As `place`, of sprites of which some carry lamps: so large that hardly any random places would do."""
    side = _side(triples)
    extents = _least_extents(triples, carry)
    sprites: list[Sprite | None] = [None] * len(triples)
    for i in rng.sample(range(len(triples)), len(triples)):
        low, high = LAMPS_RADIUS if carry[i] else RADIUS
        if triples[i][2] in ("growing", "shrinking"):
            high = low
        elif len(triples) == 2:
            high = min(high, low + (SIZE - sum(extents)) / 2)
        board = None
        if carry[i]:
            cells = rng.choice([cells for cells in CELLS if cells * CELL <= 2 * high])
            low = max(low, cells * CELL / 2)
            board = Board(cells, tuple(tuple(rng.random() < 0.5 for _ in range(cells**2)) for _ in range(PERIODS)))
        sprites[i] = sprite = Sprite(*triples[i], x=0.0, y=0.0, radius=rng.uniform(low, high), board=board)
        extents[i] = _extent(sprite, side)
    room, first = max(0.0, SIZE - sum(extents)), 0.0
    gaps = sorted(rng.uniform(0, room) for _ in triples)
    placed = []
    for sprite, extent, gap in zip(sprites, extents, gaps, strict=True):
        assert sprite is not None
        across = 1 - side
        starts = [0.0, 0.0]
        starts[side], starts[across] = first + gap, rng.uniform(0, SIZE - _extent(sprite, across))
        left, top, *_ = _swept(sprite)
        placed.append(replace(sprite, x=starts[0] - left, y=starts[1] - top))
        first += extent
    return tuple(placed)


def _side(triples: list[tuple[str, str, str]]) -> int:
    """The axis along which two sprites stand one after the other: 0 side by side, 1 one above the other."""
    return int(any(motion in ("left", "right") for _, _, motion in triples))


def _least_extents(triples: list[tuple[str, str, str]], carry: tuple[bool, ...]) -> list[float]:
    """What each sprite takes up at least along the axis on which they stand, some of them with lamps."""
    least = (
        (Sprite(*t, 0.0, 0.0, LAMPS_RADIUS[0], _SMALLEST) if c else Sprite(*t, 0.0, 0.0, RADIUS[0]))
        for t, c in zip(triples, carry, strict=True)
    )
    return [_extent(sprite, _side(triples)) for sprite in least]


def _extent(sprite: Sprite, axis: int) -> float:
    box = _swept(sprite)
    return box[axis + 2] - box[axis]


_SMALLEST = Board(CELLS[0], ((False,) * CELLS[0] ** 2,) * PERIODS)
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
