"""Scenes to pixels: every shape is a signed distance, its edge anti-aliased over one pixel.

Shape letters: B clips, T frames, H and W pixels. All sprites of a batch are drawn at once, so that training can render
its clips on the fly faster than a disk could deliver them.
"""

import math
from collections.abc import Sequence
from functools import partial

import torch

from vidaccel.worlds.sprites.world import (
    BACKGROUNDS,
    CELL,
    COLOURS,
    NUM_FRAMES,
    PERIOD,
    SHAPES,
    SIZE,
    Scene,
    Sprite,
)

CROSS_ARM = 0.36
"""Half the width of a cross's arms over its half extent."""
MUTE = 0.85
"""Share of its colour that a sprite with lamps has; the rest is gray, white where a lamp is on, black where off."""
MIN_COVERED = 0.6
"""Share of a lamp that has to lie on the shape, at its smallest, for the lamp to be there."""


def render(
    scenes: Sequence[Scene],
    num_frames: int = NUM_FRAMES,
    first_frame: int = 0,
    device: torch.device | str | None = None,
) -> torch.Tensor:
    """Frames `first_frame` .. `first_frame + num_frames - 1` of each scene's clip, drawn on the device.

    Returns float32 [B, 3, T, H, W] in [-1, 1]. Progress through the clip is always measured on the full clip's 17
    frames, so a shorter excerpt shows the same motion, cut.
    """
    tensor = partial(torch.tensor, device=device)  # none lies elsewhere
    video = tensor([BACKGROUNDS[s.background] for s in scenes], dtype=torch.float32)
    video = video.view(-1, 3, 1, 1, 1).expand(-1, -1, num_frames, SIZE, SIZE)
    for layer in range(max(len(s.sprites) for s in scenes)):
        members = [i for i, s in enumerate(scenes) if len(s.sprites) > layer]
        sprites = [scenes[i].sprites[layer] for i in members]
        frames = range(first_frame, first_frame + num_frames)
        states = tensor([[s.state(f / (NUM_FRAMES - 1)) for f in frames] for s in sprites])
        shapes = tensor([SHAPES.index(s.shape) for s in sprites])
        colour = tensor([COLOURS[s.colour] for s in sprites], dtype=torch.float32).view(-1, 3, 1, 1, 1)
        alpha = coverage(shapes, states)[:, None]
        if any(sprite.board for sprite in sprites):
            colour = with_lamps(colour, sprites, states, shapes, frames)
        rows = tensor(members)
        video = video.index_copy(0, rows, torch.lerp(video[rows], colour, alpha))
    return video / 127.5 - 1


def with_lamps(
    colour: torch.Tensor, sprites: Sequence[Sprite], states: torch.Tensor, shapes: torch.Tensor, frames: range
) -> torch.Tensor:
    """The sprites' colours [B, 3, 1, 1, 1] with their lamps, [B, 3, T, H, W], where they have a board.

    Such a sprite has a mute kind of its colour, to which a lamp adds white or black: its hue is the same all over it,
    and only brightness tells lamps that are on from those that are off.
    """
    painted = colour.repeat(1, 1, len(frames), SIZE, SIZE)
    for cells in {sprite.board.cells for sprite in sprites if sprite.board}:
        rows = [i for i, sprite in enumerate(sprites) if sprite.board and sprite.board.cells == cells]
        boards = [board for i in rows if (board := sprites[i].board)]
        periods = [(frame + PERIOD - 1) // PERIOD for frame in frames]
        on = torch.tensor([[board.on[period] for period in periods] for board in boards], device=states.device)
        least = torch.tensor([sprites[i].least for i in rows], device=states.device)
        drawn = covered_cells(shapes[rows], least, cells) >= MIN_COVERED
        lamps = torch.where(on, 1.0, -1.0).unflatten(2, (cells, cells)) * drawn[:, None]
        glow = torch.einsum("btij,btijhw->bthw", lamps, cells_at(states[rows], cells))
        painted[rows] = MUTE * colour[rows] + (1 - MUTE) * 127.5 * (1 + glow[:, None])
    return painted


def cells_at(states: torch.Tensor, cells: int, rim: float = 0.0) -> torch.Tensor:
    """How much of each pixel each lamp of a board covers, without a rim of so many pixels.

    `states` as in `coverage`. Returns [B, T, rows, columns, H, W] in [0, 1]; rows and columns are `cells`."""
    pixels = torch.arange(SIZE, device=states.device)
    firsts = CELL * (torch.arange(cells, device=states.device) - cells / 2)
    x, y = (
        ((torch.minimum(pixels + 1, start + CELL - rim) - torch.maximum(pixels, start + rim)).clamp(0, 1))
        for start in (centre[..., None, None] + firsts[:, None] for centre in states[..., :2].unbind(-1))
    )
    return y[:, :, :, None, :, None] * x[:, :, None, :, None, :]


def covered_cells(shapes: torch.Tensor, extents: torch.Tensor, cells: int) -> torch.Tensor:
    """The share of each lamp that lies on the shape: [B, rows, columns], for shapes [B] of half extents [B]."""
    middle = torch.full_like(extents, SIZE / 2)
    alpha = coverage(shapes, torch.stack([middle, middle, extents], dim=1)[:, None])[:, 0]
    first = SIZE // 2 - CELL * cells // 2
    board = alpha[:, first : first + CELL * cells, first : first + CELL * cells]
    return torch.nn.functional.avg_pool2d(board[:, None], CELL)[:, 0]


def coverage(shapes: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
    """How much of each pixel a shape covers.

    Args:
        shapes: [B] indices into SHAPES.
        states: [B, T, 3], centre x, centre y and half extent in pixels; pixel centres lie at half-integers.

    Returns:
        [B, T, H, W] in [0, 1], on their device.
    """
    grid = torch.arange(SIZE, device=states.device) + 0.5
    x, y, radius = states[..., None, None].unbind(2)
    dx, dy = grid.view(1, 1, 1, -1) - x, grid.view(1, 1, -1, 1) - y
    distance = torch.zeros(*states.shape[:2], SIZE, SIZE, device=states.device)
    for index, signed_distance in enumerate(_DISTANCES):
        of_shape = shapes == index
        if of_shape.any():
            distance[of_shape] = signed_distance(dx[of_shape], dy[of_shape], radius[of_shape])
    return (0.5 - distance).clamp(0, 1)


def _circle(dx, dy, r):
    return torch.hypot(dx, dy) - r


def _box(dx, dy, half_width, half_height):
    qx, qy = dx.abs() - half_width, dy.abs() - half_height
    return torch.hypot(qx.clamp(min=0), qy.clamp(min=0)) + torch.maximum(qx, qy).clamp(max=0)


def _square(dx, dy, r):
    return _box(dx, dy, r, r)


def _triangle(dx, dy, r):
    """Pointing up, as wide and as high as the others: the half-planes of its two flanks and its base."""
    slope = math.hypot(2.0, 1.0)
    flanks = (2.0 * dx.abs() - (dy + r)) / slope
    return torch.maximum(flanks, dy - r)


def _cross(dx, dy, r):
    return torch.minimum(_box(dx, dy, r, CROSS_ARM * r), _box(dx, dy, CROSS_ARM * r, r))


_DISTANCES = (_circle, _square, _triangle, _cross)


def to_uint8(video: torch.Tensor) -> torch.Tensor:
    """Float [..., C, T, H, W] in [-1, 1] to uint8 [..., T, H, W, C], rounded."""
    return ((video.movedim(-4, -1) + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
