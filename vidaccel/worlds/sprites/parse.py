"""Captions back to what they mean, so that any prompt the world's templates can say can be scored."""

import re
from typing import NamedTuple

from vidaccel.errors import UserError
from vidaccel.worlds.sprites.captions import AFTER, BEFORE, LAMP_PHRASES, MOTION_PHRASES
from vidaccel.worlds.sprites.world import BACKGROUNDS, COLOURS, SHAPES


class SpriteMeaning(NamedTuple):
    shape: str
    colour: str
    motion: str
    lamps: bool = False


class Meaning(NamedTuple):
    """What a caption says of a `Scene`: all but places, sizes and which lamps are on, which captions never name."""

    background: str
    sprites: tuple[SpriteMeaning, ...]


_MOTIONS = {phrase: motion for motion, phrases in MOTION_PHRASES.items() for phrase in phrases}
_SUBJECT = re.compile(
    rf"a ({'|'.join(COLOURS)}) ({'|'.join(SHAPES)}) (?:({'|'.join(LAMP_PHRASES)}) )?({'|'.join(_MOTIONS)})\b"
)
_BACKGROUND = re.compile(rf"\b({'|'.join(BACKGROUNDS)})\b")


def parse(caption: str) -> Meaning:
    """The meaning of `caption`; case and spaces do not matter.

    Raises:
        UserError: if it is none of the phrasings of one or two sprites on a background.
    """
    text = " ".join(caption.lower().split())
    subjects = list(_SUBJECT.finditer(text))
    background = _BACKGROUND.search(text)
    phrasings = [
        template.format(subject=" and ".join(subject[0] for subject in subjects), bg=background and background[0])
        for template in BEFORE + AFTER
    ]
    if len(subjects) not in (1, 2) or text not in phrasings:
        raise UserError(
            f'the caption "{caption}" cannot be scored: it is not one of the world\'s phrasings',
            'write it like "a red circle moving right and a blue square growing on black"',
        )
    sprites = (
        SpriteMeaning(shape, colour, _MOTIONS[phrase], lamps is not None)
        for colour, shape, lamps, phrase in map(re.Match.groups, subjects)
    )
    return Meaning(background[0], tuple(sprites))
