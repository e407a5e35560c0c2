"""Lamps read off a clip: which are on in each period, and whether they behave as the renderer's do.

A lamp is clearly on or off in a period if in every frame of it its brightness is within a quarter of the contrast of
either: one that fades, changes within the period or is a gray average is neither. How large the board is, the clip says
itself.

T frames, P periods, N lamps a row of the board. Brightness is 1 for a lamp that is on, -1 for one that is off.
"""

import math
from typing import NamedTuple

import torch

from vidaccel.worlds.sprites.detect import FoundSprite
from vidaccel.worlds.sprites.render import MUTE, cells_at, coverage, covered_cells
from vidaccel.worlds.sprites.world import CELL, CELLS, COLOURS, PERIOD, SHAPES

CLEAR = 0.5
"""How far from 1 or -1 a clear lamp may be: a quarter of the contrast."""
RIM = 1.5
"""Pixels around each lamp, and within the edge of the sprite, that are left out: there a codec mixes."""
SURELY_COVERED = 0.75
"""Share of a lamp that has to lie on the shape for it to be looked for; the renderer draws some that have less."""
SPARE = 1.0
"""Pixels by which a sprite may be found too small for its board."""
DEVIATIONS = 3.0
"""Standard deviations by which half of so many fair draws may be missed."""


class Lamps(NamedTuple):
    """One sprite's board."""

    states: torch.Tensor
    """[P, N, N]: 1 clearly on, -1 clearly off, 0 neither."""
    there: torch.Tensor
    """[N, N] bool: the shape leaves room for the lamp."""


def find_lamps(video: torch.Tensor, sprite: FoundSprite) -> Lamps | None:
    """The board of a sprite in frames uint8 [T, H, W, 3]: of those that fit it, the one with most clear lamps; None
    where none fits, or shape or colour are unknown."""
    least = float(sprite.states[sprite.seen, 2].min()) + SPARE
    sizes = [cells for cells in CELLS if cells * CELL <= 2 * least]
    boards = [board for cells in sizes if (board := lamps_of(video, sprite, cells)) is not None]
    return max(boards, key=lambda board: int(board.states[:, board.there].abs().sum()), default=None)


def lamps_of(video: torch.Tensor, sprite: FoundSprite, cells: int) -> Lamps | None:
    """A board of so many lamps a row in the middle of the sprite."""
    if sprite.shape is None or sprite.colour is None:
        return None
    shape = torch.tensor([SHAPES.index(sprite.shape)])
    least = sprite.states[sprite.seen, 2].min()
    there = covered_cells(shape, least[None], cells)[0] >= SURELY_COVERED
    inner = sprite.states[None] - torch.tensor([0.0, 0.0, RIM])
    weight = cells_at(sprite.states[None], cells, RIM)[0] * coverage(shape, inner)[0, :, None, None]
    gray = video.float().mean(3)
    shown = torch.einsum("tijhw,thw->tij", weight, gray) / weight.sum((3, 4))
    body = MUTE * sum(COLOURS[sprite.colour]) / 3 + (1 - MUTE) * 127.5
    brightness = (shown - body) / ((1 - MUTE) * 127.5)
    periods = [brightness[max(0, first) : first + PERIOD] for first in range(1 - PERIOD, len(video), PERIOD)]
    on, off = (
        torch.stack([((period - state).abs() <= CLEAR).all(0) for period in periods]).float() for state in (1, -1)
    )
    return Lamps((on - off) * there, there)


def lamps_score(lamps: Lamps) -> float:
    """The share of lamps in periods that are clearly on or off.

    Times how near three shares come to a half, as near as fair draws do: of lamps that are on, of those that are
    another way than in the period before, and of neighbours that differ. So it is 0 for lamps that never or always
    change, and for boards whose lamps are all alike."""
    states, there = lamps
    if not there.any():
        return 0.0
    clear = float(states[:, there].abs().mean())
    pairs = (states[1:] * states[:-1], states[:, 1:] * states[:, :-1], states[:, :, 1:] * states[:, :, :-1])
    change = pairs[0].flatten()
    neighbours = torch.cat([pairs[1].flatten(), pairs[2].flatten()])
    return clear * _fair(states.flatten()) * _fair(change) * _fair(neighbours)


def agreement(found: Lamps | None, reference: Lamps) -> float | None:
    """Of the lamps that are clear in the reference, the share that is the same way here; None where none is clear."""
    clear = reference.states != 0
    if not clear.any():
        return None
    if found is None:
        return 0.0
    return float((found.states == reference.states)[clear].float().mean())


def _fair(draws: torch.Tensor) -> float:
    """1 where about half of the draws are 1 and half -1 (0 is none), as near as chance comes; 0 where all are alike."""
    count = float(draws.abs().sum())
    if not count:
        return 0.0
    off, allowed = abs(float(draws.sum())) / count / 2, DEVIATIONS / 2 / math.sqrt(count)
    return 1.0 if off <= allowed else (0.5 - off) / (0.5 - allowed)
