"""Scenes to English: every caption has one meaning, every meaning several phrasings.

The vocabulary is closed: it is what these templates can say, and the tokenizers of the shipped model know exactly it.
"""

import random
import re

from vidaccel.sprites.world import BACKGROUNDS, COLOURS, SHAPES, Scene, Sprite

_MOVE = {
    direction: (f"moving {direction}", f"that moves {direction}", f"moving {to}", f"that moves {to}", f"sliding {to}")
    for direction, to in {"left": "to the left", "right": "to the right", "up": "upwards", "down": "downwards"}.items()
}
MOTION_PHRASES = _MOVE | {
    "still": ("standing still", "that stands still", "not moving", "that does not move"),
    "growing": ("growing", "that grows", "getting larger", "that gets larger"),
    "shrinking": ("shrinking", "that shrinks", "getting smaller", "that gets smaller"),
}
BEFORE = ("on {bg}, {subject}", "on a {bg} background, {subject}", "a {bg} background with {subject}")
AFTER = ("{subject} on {bg}", "{subject}, on {bg}", "{subject} on a {bg} background", "{subject} in front of {bg}")


def caption(scene: Scene, rng: random.Random) -> str:
    """One of the scene's phrasings; sprites are named in the order of the scene, which is random itself."""
    subjects = [describe(sprite, rng.choice(MOTION_PHRASES[sprite.motion])) for sprite in scene.sprites]
    return rng.choice(BEFORE + AFTER).format(subject=" and ".join(subjects), bg=scene.background)


def plain_caption(scene: Scene) -> str:
    """The first phrasing of everything, such as "a red circle moving right on black"."""
    subjects = [describe(sprite, MOTION_PHRASES[sprite.motion][0]) for sprite in scene.sprites]
    return AFTER[0].format(subject=" and ".join(subjects), bg=scene.background)


def describe(sprite: Sprite, motion_phrase: str) -> str:
    return f"a {sprite.colour} {sprite.shape} {motion_phrase}"


def words(text: str) -> list[str]:
    """Words and commas of `text`, lower case."""
    return re.findall(r"[a-z]+|,", text.lower())


def vocabulary() -> list[str]:
    """Every word that a caption can hold, sorted."""
    phrases = [phrase for group in MOTION_PHRASES.values() for phrase in group]
    templates = [t.format(subject="a and", bg="on") for t in BEFORE + AFTER]
    return sorted(set(words(" ".join([*phrases, *templates, *SHAPES, *COLOURS, *BACKGROUNDS]))))
