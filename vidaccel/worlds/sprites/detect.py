"""What a clip of the sprites world shows, by rules alone: no network, nothing trained, nothing told about the prompt.

A clip is a plain background and sprites of saturated colours. Backgrounds are achromatic, so a pixel that a sprite
covers in part keeps the sprite's hue: pixels are grouped by hue, and how far a pixel lies on the line from background
to sprite is how much of it is covered. Those coverages give area and centroid to a fraction of a pixel, and the
renderer's own four shapes, drawn with that area at that centroid, tell the shape. A clip has what three quarters of its
frames have.

The rules bend to soft edges, noise and codecs, and to nothing else: a colour far from the palette, two blobs of one
colour, or a path that is no straight line are None.

T frames, H and W pixels, C palette colours, S sprites found. Positions are in pixels, colours in levels of 0 to 255.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from vidaccel.worlds.sprites.render import CROSS_ARM, coverage
from vidaccel.worlds.sprites.world import BACKGROUNDS, COLOURS, LARGE, NUM_FRAMES, SHAPES, SIZE, SMALL, TRAVEL

MIN_VOTE = 0.75
"""Share of a clip's frames that must show an attribute for the clip to have it."""
MIN_BACKGROUND_SHARE = 0.6
"""Share of a clip's pixels that must have the background's colour; the largest sprites leave 0.75."""
MIN_BACKGROUND_WITH_LAMPS = 0.5
"""The same where sprites may have lamps, which leave 0.6."""
MIN_STRENGTH = 0.45
"""Share of a palette colour's saturation from which on a pixel counts towards a sprite of that colour."""
MIN_AREA = 20
"""Pixels of one hue that make a sprite in a frame; the smallest of the world has 50."""
MIN_IOU = 0.8
"""Overlap over union with the best template, below which a frame's shape is unknown."""
MAX_COLOUR_DISTANCE = 70.0
"""Levels in RGB from a named colour, below which its name holds; sprites' lie 140 apart or more, backgrounds' 220."""
MIN_MOTION = 0.3
"""Share of the renderer's own travel or growth from which on a sprite moves."""
MAX_STILL = 0.15
"""The share up to which it stands still. In between it does neither."""

MAX_STRAY = 0.2
"""RMS distance of a path from a straight line, in the same shares, above which it is no motion that has a name."""

FULL_MOTION = torch.tensor([TRAVEL, TRAVEL, LARGE - SMALL])
"""What the renderer's sprites change by over a full clip: centre x, centre y, half extent, in pixels."""
MOTION_AXES = {
    "left": (0, -1), "right": (0, 1), "up": (1, -1), "down": (1, 1), "shrinking": (2, -1), "growing": (2, 1),
}  # fmt: skip
"""Which of these three changes a motion is, and its sign; standing still is none."""
_AREAS = torch.tensor([math.pi, 4.0, 2.0, 8 * CROSS_ARM - 4 * CROSS_ARM**2])
"""Area of each of SHAPES at half extent 1."""
_DROP = torch.tensor([0.0, 0.0, 1 / 3, 0.0])
"""How far below its centre the centroid of each of SHAPES lies, at half extent 1."""
_PALETTE = torch.tensor(list(COLOURS.values()), dtype=torch.float32)
_HUES = _PALETTE - _PALETTE.mean(1, keepdim=True)
_GRAYS = torch.tensor(list(BACKGROUNDS.values()), dtype=torch.float32)


@dataclass(frozen=True)
class FoundSprite:
    """One sprite followed through a clip. Where a frame does not show it, tracks hold NaN or -1."""

    shape: str | None
    colour: str | None
    motion: str | None
    seen: torch.Tensor
    """[T] bool: the frame shows the sprite."""
    path: torch.Tensor
    """[T, 3], centroid x, centroid y and half extent in pixels: a straight line in the renderer's world."""
    states: torch.Tensor
    """[T, 3], the renderer's centre x, centre y and half extent in pixels of the template that fits the frame best."""
    templates: torch.Tensor
    """[T] indices into SHAPES: that template."""
    shapes: torch.Tensor
    """[T] the same, but -1 where even that one does not fit."""
    overlap: torch.Tensor
    """[4, T], overlap over union with each of SHAPES drawn with the sprite's area at its place."""
    rgb: torch.Tensor
    """[T, 3], the colour of the sprite's inside, in levels; less its gray where there may be lamps."""
    colours: torch.Tensor
    """[T] indices into COLOURS, -1 where none is near."""
    alpha: torch.Tensor
    """[T, H, W] in [0, 1], how much of each pixel the sprite covers."""

    @property
    def area(self) -> torch.Tensor:
        """[T], pixels."""
        return self.alpha.sum((1, 2))

    @property
    def line(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The straight line through `path`: its change over 17 frames [3] and the RMS distance from it [3], pixels."""
        return _fit_line(self.path, self.seen)


@dataclass(frozen=True)
class Detection:
    """What a clip shows. `background_rgb` is measured, [3] in levels; sprites come largest first."""

    background: str | None
    background_rgb: torch.Tensor
    sprites: tuple[FoundSprite, ...]


def detect(frames: np.ndarray | torch.Tensor, lamps: bool = False) -> Detection:
    """Find the background and the sprites in `frames`, uint8 [T, 64, 64, 3], T at least 2.

    Where sprites may have `lamps`, brightness tells nothing of a sprite, and only hue is looked at.

    Raises:
        ValueError: for any other type or shape.
    """
    video = torch.as_tensor(frames)
    if video.dtype != torch.uint8 or video.shape[1:] != (SIZE, SIZE, 3) or len(video) < 2:
        raise ValueError(f"frames must be uint8 [T >= 2, {SIZE}, {SIZE}, 3], not {video.dtype} {list(video.shape)}")
    video = video.movedim(-1, 1).float().contiguous()
    background, background_rgb = _find_background(video, MIN_BACKGROUND_WITH_LAMPS if lamps else MIN_BACKGROUND_SHARE)
    difference = video - background_rgb.view(3, 1, 1)
    if lamps:
        difference = difference - difference.mean(1, keepdim=True)
    seeds = _sprite_seeds(difference)
    every = seeds.any(0)
    sprites = [_measure(difference, own, every & ~own, None if lamps else background_rgb) for own in seeds]
    return Detection(background, background_rgb, tuple(sprites))


def _find_background(video: torch.Tensor, least: float) -> tuple[str | None, torch.Tensor]:
    """The background's name and measured colour [3] in float frames [T, 3, H, W]: what most pixels are near to.

    It has a name if that is the `least` share of them."""
    pixels = video.movedim(1, -1).reshape(-1, 3)
    near = torch.cdist(pixels, _GRAYS) < MAX_COLOUR_DISTANCE
    counts = near.sum(0)
    best = int(counts.argmax())
    if counts[best] < least * len(pixels):
        return None, pixels.median(0).values
    return tuple(BACKGROUNDS)[best], pixels[near[:, best]][::7].median(0).values


def _chroma(rgb: torch.Tensor, dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The two opponent axes of `rgb` along `dim`; both are zero for every gray."""
    r, g, b = rgb.unbind(dim)
    return r - (g + b) / 2, (g - b) * math.sqrt(0.75)


def _sprite_seeds(difference: torch.Tensor) -> torch.Tensor:
    """Pixels that surely belong to a sprite, bool [S, T, H, W], in frames less the background [T, 3, H, W]."""
    x, y = _chroma(difference, 1)
    palette_x, palette_y = _chroma(_PALETTE, 1)
    size = torch.hypot(palette_x, palette_y)
    along = torch.stack([x * px + y * py for px, py in zip(palette_x / size, palette_y / size, strict=True)], dim=1)
    seeds = (along == along.amax(1, keepdim=True)) & (along > MIN_STRENGTH * size.view(-1, 1, 1))  # [T, C, H, W]
    seeds &= (seeds.sum((2, 3)) >= MIN_AREA)[..., None, None]
    return _follow(seeds)


def _follow(seeds: torch.Tensor) -> torch.Tensor:
    """Masks [S, T, H, W] of sprites, from masks of hues [T, C, H, W]: hues that take turns at one place are one sprite.

    What fewer than a quarter of the frames show is no sprite. The largest comes first.
    """
    found: list[torch.Tensor] = []
    areas = seeds.sum((0, 2, 3))
    for hue in areas.argsort(descending=True)[: areas.count_nonzero()]:
        mask = seeds[:, hue]
        for i, other in enumerate(found):
            if _take_turns(other, mask):
                found[i] = other | mask
                break
        else:
            found.append(mask)
    kept = [mask for mask in found if mask.flatten(1).any(1).sum() >= len(seeds) / 4]
    return torch.stack(kept) if kept else seeds[:, :0].movedim(1, 0)


def _take_turns(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two masks [T, H, W] hardly ever share a frame and are close where one hands over to the other."""
    seen_one, seen_other = one.flatten(1).any(1), other.flatten(1).any(1)
    if (seen_one & seen_other).sum() > len(one) / 8:
        return False
    gaps = (torch.arange(len(one))[:, None] - torch.arange(len(one))).abs()
    gaps = gaps.masked_fill(~(seen_one[:, None] & seen_other), len(one))
    a, b = divmod(int(gaps.argmin()), len(one))
    step = torch.dist(one[a].nonzero().float().mean(0), other[b].nonzero().float().mean(0))
    return bool(step < 4 + 2 * TRAVEL / NUM_FRAMES * gaps[a, b])


def _measure(
    difference: torch.Tensor, seeds: torch.Tensor, others: torch.Tensor, background: torch.Tensor | None
) -> FoundSprite:
    """Everything about the sprite whose sure pixels are `seeds` [T, H, W].

    Args:
        difference: frames less the background, [T, 3, H, W].
        others: sure pixels of the other sprites, [T, H, W].
        background: the background's colour, [3]; None where differences are those of hue alone.
    """
    seen = seeds.flatten(1).any(1)
    inside = _inside_colour(difference, seeds)
    region = (dilate(seeds, 2) & ~dilate(others, 1)) | seeds
    cover = torch.einsum("tchw,tc->thw", difference, inside) / inside.square().sum(1)[:, None, None]
    alpha = torch.where(region, cover, 0).clamp(0, 1)
    centroid, states, overlap = _fit_templates(alpha)
    templates = overlap.argmax(0)
    shapes = torch.where(seen & (overlap.amax(0) >= MIN_IOU), templates, -1)
    rgb, palette = (inside, _HUES) if background is None else (inside + background, _PALETTE)
    distance, colours = torch.cdist(rgb, palette).min(1)
    colours = torch.where(seen & (distance < MAX_COLOUR_DISTANCE), colours, -1)
    usual = int(overlap[:, seen].mean(1).argmax())
    path = torch.cat([centroid, states[usual, :, 2:]], dim=1)
    return FoundSprite(
        shape=_elect(shapes, SHAPES),
        colour=_elect(colours, tuple(COLOURS)),
        motion=_name_motion(path, seen),
        seen=seen,
        path=path,
        states=states[templates, torch.arange(len(seen))],
        templates=templates,
        shapes=shapes,
        overlap=overlap,
        rgb=rgb,
        colours=colours,
        alpha=alpha,
    )


def _inside_colour(difference: torch.Tensor, seeds: torch.Tensor) -> torch.Tensor:
    """Colour less background [T, 3] of the half of the `seeds` that differs most from the background; else NaN."""
    masked = difference.masked_fill(~seeds[:, None], math.nan).flatten(2)
    strength = torch.einsum("tcn,tc->tn", masked, masked.nanmean(2))
    half = strength >= strength.nanmedian(1, keepdim=True).values
    return masked.masked_fill(~half[:, None], math.nan).nanmean(2)


def dilate(mask: torch.Tensor, pixels: int) -> torch.Tensor:
    width = 2 * pixels + 1
    rows = F.max_pool2d(mask[:, None].float(), (1, width), stride=1, padding=(0, pixels))
    return F.max_pool2d(rows, (width, 1), stride=1, padding=(pixels, 0))[:, 0] > 0


def _fit_templates(alpha: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Draw every shape with the area and the centroid of `alpha` [T, H, W].

    Returns the centroids [T, 2], the renderer's states of the templates [4, T, 3] and their overlap over union [4, T].
    """
    grid = torch.arange(SIZE) + 0.5
    area = alpha.sum((1, 2))
    centroid = torch.stack([alpha.sum(1) @ grid, alpha.sum(2) @ grid], dim=1) / area[:, None]
    extent = (area / _AREAS[:, None]).sqrt()
    x, y = centroid.T
    states = torch.stack([x.expand_as(extent), y - _DROP[:, None] * extent, extent], dim=2)
    drawn, alpha = _blur(coverage(torch.arange(len(SHAPES)), states)), _blur(alpha)
    overlap = torch.minimum(drawn, alpha).sum((2, 3)) / torch.maximum(drawn, alpha).sum((2, 3))
    return centroid, states, overlap


def _blur(alpha: torch.Tensor) -> torch.Tensor:
    """3 x 3 sums without the rim, so that overlap tells shapes apart and not how far a codec smeared the colour."""
    rows = alpha[..., :-2, :] + alpha[..., 1:-1, :] + alpha[..., 2:, :]
    return rows[..., :-2] + rows[..., 1:-1] + rows[..., 2:]


def _elect(votes: torch.Tensor, names: tuple[str, ...]) -> str | None:
    """The name that three quarters of all frames vote for; votes [T] are indices into `names` or -1."""
    counts = torch.bincount(votes[votes >= 0], minlength=len(names))
    return names[int(counts.argmax())] if counts.max() >= MIN_VOTE * len(votes) else None


def _fit_line(path: torch.Tensor, seen: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Least squares through the seen frames of `path` [T, 3]: change over a full clip [3], RMS distance from it [3]."""
    frame = torch.arange(len(seen))[seen].float()
    frame = frame - frame.mean()
    points = path[seen] - path[seen].mean(0)
    slope = frame @ points / frame.square().sum().clamp(min=1)
    residual = points - frame[:, None] * slope
    return slope * (NUM_FRAMES - 1), residual.square().mean(0).sqrt()


def _name_motion(path: torch.Tensor, seen: torch.Tensor) -> str | None:
    """The motion of a path [T, 3] that is straight, and along one of its three coordinates only."""
    if seen.sum() < MIN_VOTE * len(seen):
        return None
    change, stray = (values / FULL_MOTION for values in _fit_line(path, seen))
    second, first = change.abs().sort().values[1:]
    if stray.max() > MAX_STRAY:
        return None
    if first <= MAX_STILL:
        return "still"
    if first < MIN_MOTION or second > first / 2:
        return None
    axis = int(change.abs().argmax())
    return next(name for name, direction in MOTION_AXES.items() if direction == (axis, int(change[axis].sign())))
