"""Scenes to pixels: every shape is a signed distance, its edge anti-aliased over one pixel.

Shape letters: B clips, T frames, H and W pixels. All sprites of a batch are drawn at once, so that training can render
its clips on the fly faster than a disk could deliver them.
"""

import math
from collections.abc import Sequence
from functools import partial

import torch

from vidaccel.worlds.sprites.world import BACKGROUNDS, COLOURS, NUM_FRAMES, SHAPES, SIZE, Scene

CROSS_ARM = 0.36
"""Half the width of a cross's arms over its half extent."""


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
        rows = tensor(members)
        video = video.index_copy(0, rows, torch.lerp(video[rows], colour, alpha))
    return video / 127.5 - 1


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
