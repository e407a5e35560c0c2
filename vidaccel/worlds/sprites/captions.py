"""Scenes to English: every caption has one meaning, every meaning several phrasings.

The vocabulary is closed: it is what these templates can say, and the tokenizers of the shipped model know exactly it.
The words of lamps come after the others, and only in models that learnt them.
A caption may leave a sprite's colour or motion unsaid ("a circle moving right and a red square on black"), and training
is on such captions too: from whole ones alone a model learns each combination that it sees as a thing of its own, and
puts a known one in the place of a new one.
"""

import random
import re
from dataclasses import replace

from vidaccel.worlds.sprites.world import BACKGROUNDS, COLOURS, SHAPES, Scene, Sprite

_MOVE = {
    direction: (f"moving {direction}", f"that moves {direction}", f"moving {to}", f"that moves {to}", f"sliding {to}")
    for direction, to in {"left": "to the left", "right": "to the right", "up": "upwards", "down": "downwards"}.items()
}
MOTION_PHRASES = _MOVE | {
    "still": ("standing still", "that stands still", "not moving", "that does not move"),
    "growing": ("growing", "that grows", "getting larger", "that gets larger"),
    "shrinking": ("shrinking", "that shrinks", "getting smaller", "that gets smaller"),
}
LAMP_PHRASES = (
    "with flickering lamps",
    "with lamps that flicker",
    "with blinking lamps",
    "covered with flickering lamps",
)
"""That a sprite has lamps, and never which of them are on."""
BEFORE = ("on {bg}, {subject}", "on a {bg} background, {subject}", "a {bg} background with {subject}")
UNSAID = 0.3
"""Share of colours and of motions that the captions of a training leave unsaid."""
AFTER = ("{subject} on {bg}", "{subject}, on {bg}", "{subject} on a {bg} background", "{subject} in front of {bg}")


def caption(scene: Scene, rng: random.Random) -> str:
    """One of the scene's phrasings; sprites are named in the order of the scene: from the left, or from the top."""
    phrases = [sprite.motion and rng.choice(MOTION_PHRASES[sprite.motion]) for sprite in scene.sprites]
    lamps = [rng.choice(LAMP_PHRASES) if sprite.lamps else None for sprite in scene.sprites]
    subjects = [describe(*told) for told in zip(scene.sprites, phrases, lamps, strict=True)]
    return rng.choice(BEFORE + AFTER).format(subject=" and ".join(subjects), bg=scene.background)


def told(scene: Scene, rng: random.Random, unsaid: float = UNSAID) -> Scene:
    """What a caption of a training says of the scene: all but a share of the colours and motions."""
    sprites = []
    for sprite in scene.sprites:
        colour, motion = (None if rng.random() < unsaid else said for said in (sprite.colour, sprite.motion))
        sprites.append(replace(sprite, colour=colour, motion=motion))
    return replace(scene, sprites=tuple(sprites))


def describe(sprite: Sprite, motion_phrase: str | None, lamp_phrase: str | None = None) -> str:
    return " ".join(word for word in ("a", sprite.colour, sprite.shape, lamp_phrase, motion_phrase) if word)


def words(text: str) -> list[str]:
    """Words and commas of `text`, lower case."""
    return re.findall(r"[a-z]+|,", text.lower())


def vocabulary(lamps: bool = False) -> list[str]:
    """Every word that a caption can hold, sorted; after them, in an order of their own, those of lamps if asked for."""
    phrases = [phrase for group in MOTION_PHRASES.values() for phrase in group]
    templates = [t.format(subject="a and", bg="on") for t in BEFORE + AFTER]
    known = sorted(set(words(" ".join([*phrases, *templates, *SHAPES, *COLOURS, *BACKGROUNDS]))))
    return known + sorted(set(words(" ".join(LAMP_PHRASES))) - set(known)) if lamps else known
