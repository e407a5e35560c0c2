"""Scores of clips of the sprites world, in the shape of VBench: semantic, quality, total = (4 quality + semantic) / 5.

Every dimension is 1 for the renderer's own clips, also after an mp4 round trip, and 0 for a failure that `score_clip`
names. A clip is scored against the meaning of its caption alone. Places and sizes are free, so edges are compared with
those of the renderer's shapes at the places and sizes that were found.

T frames, H and W pixels, P prompts, K dimensions.
"""

import math
from collections.abc import Mapping, Sequence
from itertools import permutations

import numpy as np
import torch

from vidaccel.bench.measures.pairs import averages, interval
from vidaccel.numbers import cluster_draws
from vidaccel.worlds.sprites.detect import FULL_MOTION, MOTION_AXES, Detection, FoundSprite, detect, dilate
from vidaccel.worlds.sprites.lamps import Lamps, agreement, find_lamps, lamps_of, lamps_score
from vidaccel.worlds.sprites.parse import Meaning, SpriteMeaning
from vidaccel.worlds.sprites.world import COLOURS, SHAPES, SIZE, SMALL, Scene, Sprite

SEMANTIC = ("shape", "colour", "motion", "background", "pair")
QUALITY = (
    "subject_consistency",
    "background_consistency",
    "temporal_flicker",
    "motion_smoothness",
    "imaging_quality",
    "dynamic_degree",
)
LAMPS = "lamps"
LAMPS_WEIGHT = 0.25
"""Share of quality that lamps have for prompts with them."""

WORST_LEVELS = 32.0
"""Levels of 255 at which unsteady or noisy colour earns 0: an eighth of the range, seen by anyone."""
WORST_STRAY = 2.5
"""RMS pixels from a straight path that earn 0: the renderer's travel in two frames."""
SHARP, SMEARED = 2.5, 6.0
"""Widths of an edge in pixels, up to which it earns 1 and from which on 0. The renderer's own are 1 pixel wide, and up
to SHARP in an mp4, which stores colour at half the size."""
SHARP_HUE = 3.0
"""SHARP where hue alone is looked at."""
_LUMA = torch.tensor([0.2126, 0.7152, 0.0722])
"""Share of red, green and blue in brightness (BT.709)."""
_PERIMETERS = torch.tensor([2 * math.pi, 8.0, 2 + 2 * math.sqrt(5), 8.0])
"""Length of the edge of each of SHAPES at half extent 1."""


def score_clip(frames: np.ndarray | torch.Tensor, meaning: Meaning | Scene) -> dict[str, float]:
    """Score one clip, uint8 [T, 64, 64, 3], in each dimension from 0 to 1.

    Semantic. Expected sprites are matched to the found ones so that most attributes agree:

    - shape, colour, motion: the share of sprites that have it right, where a sprite too many counts as wrong;
    - background: 1 if its colour is right;
    - pair: 1 if both sprites are right in everything and there is no third; only for two-sprite prompts.

    Quality. The first, and the last three, are means over the expected sprites, where a missing one has 0:

    - subject_consistency: the share of frames that show the sprite in its commonest shape and its commonest colour;
    - background_consistency: 1 - RMS difference of background pixels from the clip's background, 0 at 32 levels;
    - temporal_flicker: 1 - mean change of brightness from frame to frame, of background pixels or of a sprite's inside,
      whichever is most, 0 at 32 levels; a sprite that comes or goes counts 32;
    - motion_smoothness: 1 - RMS distance of position or size from a straight line at constant speed, 0 at 2.5 pixels,
      times the share of frames that show the sprite;
    - imaging_quality: edge sharpness, 1 up to 2.5 times the width of the renderer's edges (an mp4 alone reaches that)
      and 0 from 6 times on, times 1 - standard deviation of background noise, 0 at 32 levels;
    - dynamic_degree: how far it moves (or grows) as the caption says, over how far the renderer's sprites do, at most
      1; for one that stands still, 1 - unwanted movement over the same distance.

    Lamps, for prompts that have them, a mean over the sprites that should (lamps.py):

    - lamps: the share of lamps in periods of four frames that are clearly on or off, less where they are not as random
      as the renderer's, or where a sprite that should have none has such lamps too. It is a quarter of quality;
      whatever else is scored looks at hue alone then.

    Part of no total, since rules with a threshold see nothing of a shape that becomes less clear:

    - margin: (1 + overlap over union with the wanted shape - that with the best other) / 2, a mean over the frames, 0
      in one that does not show the sprite: 0.5 is a draw, and the renderer's clips have 0.57 to 0.65;
    - frames_right: the share of frames that show the sprite in its shape and its colour;
    - all_right: 1 if background, shapes, colours and motions are right and no sprite is missing or too many.

    Raises:
        ValueError: if `frames` has another type or shape.
    """
    return score_found(detect(frames, lamps=has_lamps(meaning)), frames, meaning)


def has_lamps(meaning: Meaning | Scene) -> bool:
    return any(sprite.lamps for sprite in meaning.sprites)


def score_found(found: Detection, frames: np.ndarray | torch.Tensor, meaning: Meaning | Scene) -> dict[str, float]:
    """`score_clip` of what `detect` found in the frames."""
    video = torch.as_tensor(frames)
    matched = _match(meaning.sprites, found.sprites)
    scores = _semantic(meaning, found, matched)
    background = ~_near_sprites(found, len(video))
    difference = video.float() - found.background_rgb
    steady = {
        "background_consistency": _level_score(_rms(difference[background])),
        "temporal_flicker": _level_score(_flicker(difference, background, found.sprites)),
    }
    clean = _level_score(_noise(difference, background))
    sharp = SHARP_HUE if has_lamps(meaning) else SHARP
    subjects = {
        "subject_consistency": [sprite and _subject_consistency(sprite) for sprite in matched],
        "motion_smoothness": [sprite and _smoothness(sprite) for sprite in matched],
        "imaging_quality": [sprite and clean * _sharpness(sprite, sharp) for sprite in matched],
        "dynamic_degree": [
            sprite and _dynamic_degree(sprite, wanted.motion)
            for wanted, sprite in zip(meaning.sprites, matched, strict=True)
        ],
        "margin": [
            sprite and _margin(sprite, wanted.shape) for wanted, sprite in zip(meaning.sprites, matched, strict=True)
        ],
        "frames_right": [
            sprite and _frames_right(sprite, wanted) for wanted, sprite in zip(meaning.sprites, matched, strict=True)
        ],
    }
    if has_lamps(meaning):
        wanted, unwanted = (
            [lamps_score(board) if board else 0.0 for board in _boards(meaning, matched, video, lamps)]
            for lamps in (True, False)
        )
        scores[LAMPS] = sum(wanted) / len(wanted) * (1 - max(unwanted, default=0.0))
    whole = [scores[name] for name in ("shape", "colour", "motion", "background")]
    scores["all_right"] = float(min(whole) == 1)
    return scores | steady | {name: sum(score or 0.0 for score in each) / len(each) for name, each in subjects.items()}


def lamps_agreement(
    found: tuple[Detection, np.ndarray], reference: tuple[Detection, np.ndarray], meaning: Meaning | Scene
) -> float | None:
    """The share of the lamps of a reference clip that are the same way in this one, of sprites that should have some;
    None where the reference has none that is clearly on or off. Each is what was found, and its frames."""
    shares = []
    theirs = _boards(meaning, _match(meaning.sprites, reference[0].sprites), torch.as_tensor(reference[1]))
    ours = [
        sprite
        for sprite, wanted in zip(_match(meaning.sprites, found[0].sprites), meaning.sprites, strict=True)
        if wanted.lamps
    ]
    for sprite, board in zip(ours, theirs, strict=True):
        if board is not None:
            same = sprite and lamps_of(torch.as_tensor(found[1]), sprite, len(board.there))
            shares.append(agreement(same or None, board))
    known = [share for share in shares if share is not None]
    return sum(known) / len(known) if known else None


def _boards(
    meaning: Meaning | Scene, matched: Sequence[FoundSprite | None], video: torch.Tensor, lamps: bool = True
) -> list[Lamps | None]:
    """Of each sprite that should have lamps, or of each that should have none."""
    pairs = zip(meaning.sprites, matched, strict=True)
    return [sprite and find_lamps(video, sprite) for wanted, sprite in pairs if wanted.lamps == lamps]


def features(found: Detection, meaning: Meaning | Scene) -> list[list[float]]:
    """What was measured of each expected sprite, [11] numbers about 1 in size: place and half extent midway, how they
    change, colour, margin, width of the edge. All are 0 for one that is missing, which no sprite comes near to."""
    matched = _match(meaning.sprites, found.sprites)
    return [
        _features(sprite, wanted.shape) if sprite else [0.0] * 11
        for wanted, sprite in zip(meaning.sprites, matched, strict=True)
    ]


def _features(sprite: FoundSprite, shape: str) -> list[float]:
    place = sprite.path[sprite.seen].mean(0) / torch.tensor([SIZE / 2, SIZE / 2, SMALL])
    change = sprite.line[0] / FULL_MOTION
    colour = sprite.rgb[sprite.seen].mean(0) / 128
    last = torch.tensor([10 * (_margin(sprite, shape) - 0.5), _edge_width(sprite) / SHARP])
    return torch.cat([place, change, colour, last]).nan_to_num(0.0).tolist()


def _margin(sprite: FoundSprite, shape: str) -> float:
    own = SHAPES.index(shape)
    others = [index for index in range(len(SHAPES)) if index != own]
    margin = (1 + sprite.overlap[own] - sprite.overlap[others].amax(0)) / 2
    return float(torch.where(sprite.seen, margin, 0.0).mean())


def _frames_right(sprite: FoundSprite, wanted: SpriteMeaning | Sprite) -> float:
    right = sprite.shapes == SHAPES.index(wanted.shape)
    return float((right & (sprite.colours == tuple(COLOURS).index(wanted.colour or ""))).float().mean())


def _match(wanted: Sequence[SpriteMeaning | Sprite], found: Sequence[FoundSprite]) -> tuple[FoundSprite | None, ...]:
    """The found sprite, if any, for each wanted one: the choice with most agreements, then with most sprites."""
    places = [*found, *[None] * len(wanted)]

    def agreement(choice: tuple[FoundSprite | None, ...]) -> tuple[int, int]:
        right = sum(sum(_agreements(w, f).values()) for w, f in zip(wanted, choice, strict=True))
        return right, sum(f is not None for f in choice)

    return max(permutations(places, len(wanted)), key=agreement)


def _agreements(wanted: SpriteMeaning | Sprite, found: FoundSprite | None) -> dict[str, bool]:
    return {
        name: found is not None and getattr(found, name) == getattr(wanted, name)
        for name in ("shape", "colour", "motion")
    }


def _semantic(meaning: Meaning | Scene, found: Detection, matched: Sequence[FoundSprite | None]) -> dict[str, float]:
    right = [_agreements(w, f) for w, f in zip(meaning.sprites, matched, strict=True)]
    count = max(len(meaning.sprites), len(found.sprites))
    scores = {name: sum(agreement[name] for agreement in right) / count for name in ("shape", "colour", "motion")}
    scores["background"] = float(found.background == meaning.background)
    if len(meaning.sprites) == 2:
        scores["pair"] = float(count == 2 and all(all(agreement.values()) for agreement in right))
    return scores


def _near_sprites(found: Detection, num_frames: int) -> torch.Tensor:
    """[T, H, W] bool: the sprites and 3 pixels around them."""
    near = torch.zeros(num_frames, SIZE, SIZE, dtype=torch.bool)
    for sprite in found.sprites:
        near |= dilate(sprite.alpha > 0.1, 3)
    return near


def _rms(values: torch.Tensor) -> float:
    return float(values.square().mean().sqrt())


def _level_score(levels: float) -> float:
    """NaN, where nothing was left to measure, earns 0: `max` keeps its first argument."""
    return max(0.0, 1 - levels / WORST_LEVELS)


def _flicker(difference: torch.Tensor, background: torch.Tensor, sprites: Sequence[FoundSprite]) -> float:
    """Mean over successive frames of the largest change of brightness, of background pixels or of a sprite, in levels.

    Args:
        difference: frames less the background, [T, H, W, 3].
        background: [T, H, W] bool.
    """
    both = background[1:] & background[:-1]
    change = (difference @ _LUMA).diff(dim=0).abs().mul(both).sum((1, 2)) / both.sum((1, 2))
    for sprite in sprites:
        inside = (sprite.rgb @ _LUMA).diff().abs().nan_to_num(0.0)
        comes_or_goes = sprite.seen[1:] ^ sprite.seen[:-1]
        change = torch.maximum(change, inside.masked_fill(comes_or_goes, WORST_LEVELS))
    return float(change.mean())


def _noise(difference: torch.Tensor, background: torch.Tensor) -> float:
    """Standard deviation in levels of noise between horizontal neighbours in the background."""
    both = background[:, :, 1:] & background[:, :, :-1]
    return _rms(difference.diff(dim=2)[both]) / math.sqrt(2)


def _subject_consistency(sprite: FoundSprite) -> float:
    same = _is_commonest(sprite.shapes) & _is_commonest(sprite.colours)
    return float(same.float().mean())


def _is_commonest(votes: torch.Tensor) -> torch.Tensor:
    """[T] bool: which of the votes [T] are for the most frequent index; -1 is none."""
    known = votes[votes >= 0]
    return votes == known.mode().values if len(known) else torch.zeros_like(votes, dtype=torch.bool)


def _smoothness(sprite: FoundSprite) -> float:
    stray = float(sprite.line[1].max())
    return max(0.0, 1 - stray / WORST_STRAY) * float(sprite.seen.float().mean())


def _sharpness(sprite: FoundSprite, sharp: float) -> float:
    return min(1.0, max(0.0, (SMEARED - _edge_width(sprite)) / (SMEARED - sharp)))


def _edge_width(sprite: FoundSprite) -> float:
    """Pixels of the edge as a linear ramp: over a ramp of width w, a (1 - a) integrates to w / 6."""
    ramp = (sprite.alpha * (1 - sprite.alpha)).sum()
    length = (_PERIMETERS[sprite.templates] * sprite.states[:, 2])[sprite.seen].sum()
    return float(6 * ramp / length)


def _dynamic_degree(sprite: FoundSprite, motion: str) -> float:
    share = sprite.line[0] / FULL_MOTION
    if motion == "still":
        return max(0.0, 1 - float(share.abs().max()))
    axis, sign = MOTION_AXES[motion]
    return min(1.0, max(0.0, sign * float(share[axis])))


def summarise(
    clips: Sequence[Mapping[str, float]],
    meanings: Sequence[str] | None = None,
    resamples: int = 1000,
    seed: int = 0,
) -> dict[str, dict[str, float]]:
    """Averages of the scores of many clips, as percentages, with 95 % bootstrap intervals.

    Each dimension is averaged over the clips that have it; one that no clip has is left out. `semantic` and `quality`
    are means of their dimensions' averages, and `total` is (4 quality + semantic) / 5.

    Args:
        clips: what `score_clip` returned, one a prompt.
        meanings: of their prompts: those that mean the same are drawn together. None takes each clip for itself.

    Returns:
        {dimension: {"mean", "low", "high"}}, in percent.
    """
    names = [name for name in (*SEMANTIC, *QUALITY, LAMPS) if any(name in clip for clip in clips)]
    columns = {name: np.array([clip.get(name, math.nan) for clip in clips]) for name in names}
    drawn = cluster_draws(range(len(clips)) if meanings is None else meanings, resamples, seed)
    means, resampled = (averages(columns, each, totals) for each in (np.ones((1, len(clips))), drawn))
    ends = {name: (float(means[name][0]), *interval(resampled[name])) for name in means}
    return {
        name: {key: 100 * end for key, end in zip(("mean", "low", "high"), ends[name], strict=True)} for name in ends
    }


def totals(means: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """`semantic`, `quality` and `total` from averages of dimensions, arrays of one shape; NaN counts for nothing.

    Lamps, where they were scored, are a quarter of quality, as `pair` is a fifth of semantic."""
    semantic, quality = (
        np.nanmean(np.stack([means[name] for name in group if name in means]), axis=0) for group in (SEMANTIC, QUALITY)
    )
    if LAMPS in means:
        lamps = means[LAMPS]
        quality = np.where(np.isnan(lamps), quality, (1 - LAMPS_WEIGHT) * quality + LAMPS_WEIGHT * lamps)
    return {"semantic": semantic, "quality": quality, "total": (4 * quality + semantic) / 5}
