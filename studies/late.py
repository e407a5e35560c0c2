"""Which differences between clips are decided late: `python -m studies.late -o FILE.json`, for any autoencoder.

Two clips whose latents lie d apart (L2, in the transformer's units) are both possible as long as x_t = (1 - t) x_0 +
t eps does not tell them apart. The best classifier is right with the probability Phi((1 - t) d / (2 t)): nine times in
ten at

    t* = 1 / (1 + 2.56 / d).

What has a high t* is settled in the first steps of a sampler, whatever runs in the others. Pairs of clips that differ
in one thing are drawn at random, rendered, and encoded. What comes back of lamps is measured too: how they are scored,
and how much of their pattern is left, 1 being all of it.
"""

import random
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import NormalDist
from typing import Annotated, NamedTuple

import numpy as np
import torch
import typer
from diffusers import AutoencoderKLHunyuanVideo
from torch import Tensor

from vidaccel.artefacts import write_json
from vidaccel.bench.environment import environment
from vidaccel.cli.common import Debug, quiet_libraries, reported
from vidaccel.collect.encode import encode_videos
from vidaccel.errors import UserError
from vidaccel.worlds import shipped_models
from vidaccel.worlds.sprites.render import render, to_uint8
from vidaccel.worlds.sprites.score import score_clip, summarise
from vidaccel.worlds.sprites.world import (
    BACKGROUNDS,
    CELL,
    COLOURS,
    PERIOD,
    PERIODS,
    SIZE,
    Board,
    Scene,
    Sprite,
    random_scene,
)

RIGHT = 0.9
"""Share of pairs that are told apart at t*."""
RADIUS = 8.0
"""Half the extent of the sprites that are compared, in pixels."""
ENCODED_AT_ONCE = 16

Pair = tuple[Tensor, Tensor]
"""Two clips [3, T, H, W] that differ in one thing."""


class Through(NamedTuple):
    """What an autoencoder leaves of lamps, of scenes that training never sees."""

    lamps: float
    """Their score in percent."""
    total: float
    pattern: float
    """Of the difference between a board and its negative, the share that comes back."""


class Late(NamedTuple):
    """What was measured of one difference."""

    d: float
    """Mean distance of the two latents."""
    quartiles: tuple[float, float]
    t: float
    """t* of the mean distance."""


def told_apart_at(d: float, right: float = RIGHT) -> float:
    """The time t* at which clips whose latents lie `d` apart are told apart that often."""
    return 1 / (1 + 2 * NormalDist().inv_cdf(right) / d) if d > 0 else 0.0


def lone(rng: random.Random) -> Scene:
    """A scene of one sprite that keeps its size, of RADIUS."""
    while True:
        scene = random_scene(rng, pair_share=0.0)
        if scene.sprites[0].motion not in ("growing", "shrinking"):
            return replace(scene, sprites=(replace(scene.sprites[0], radius=RADIUS),))


def with_values(name: str, one: str, other: str, rng: random.Random) -> Pair:
    """A sprite whose attribute `name` has either value."""
    scene = lone(rng)
    clips = render([replace(scene, sprites=(replace(scene.sprites[0], **{name: value}),)) for value in (one, other)])
    return clips[0], clips[1]


def moved(pixels: float, rng: random.Random) -> Pair:
    """A sprite, and the same so far to the right."""
    scene = lone(rng)
    sprite = scene.sprites[0]
    clips = render([scene, replace(scene, sprites=(replace(sprite, x=sprite.x + pixels),))])
    return clips[0], clips[1]


def cell(contrast: float, whole_clip: bool, rng: random.Random) -> Pair:
    """A large square that stands still, and in its middle a cell that is lighter or darker by `contrast` (pixels are in
    [-1, 1], where they end) in all frames, or in those of one latent frame alone."""
    colour, background = rng.choice(tuple(COLOURS)), rng.choice(tuple(BACKGROUNDS))
    middle = SIZE / 2
    clip = render([Scene(background, (Sprite("square", colour, "still", middle, middle, 2.0 * CELL),))])[0]
    first = 1 + PERIOD * rng.randrange(clip.shape[1] // PERIOD)
    frames = slice(None) if whole_clip else slice(first, first + PERIOD)
    place = slice(SIZE // 2, SIZE // 2 + CELL)
    bright, dark = clip.clone(), clip.clone()
    for painted, by in ((bright, contrast), (dark, -contrast)):
        painted[:, frames, place, place] = (painted[:, frames, place, place] + by).clamp(-1, 1)
    return bright, dark


def lamp(rng: random.Random) -> Pair:
    """A sprite with lamps, and the same with one of them the other way for one period of four frames."""
    scene = random_scene(rng, pair_share=0.0, lamps=1.0)
    sprite = scene.sprites[0]
    board = sprite.board
    assert board is not None
    while True:  # lamps that the shape leaves no room for are not drawn
        period, which = rng.randrange(1, PERIODS), rng.randrange(board.cells**2)
        on = [list(lamps) for lamps in board.on]
        on[period][which] = not on[period][which]
        other = replace(sprite, board=replace(board, on=tuple(map(tuple, on))))
        clips = render([scene, replace(scene, sprites=(other,))])
        if not torch.equal(clips[0], clips[1]):
            return clips[0], clips[1]


DIFFERENCES: dict[str, Callable[[random.Random], Pair]] = {
    "red or blue": partial(with_values, "colour", "red", "blue"),
    "circle or cross": partial(with_values, "shape", "circle", "cross"),
    "circle or square": partial(with_values, "shape", "circle", "square"),
    "one pixel to the right": partial(moved, 1.0),
    "a quarter of a pixel to the right": partial(moved, 0.25),
    "cell of 8 x 8 pixels in a square, +-0.8, whole clip": partial(cell, 0.8, True),
    "cell, +-0.4, whole clip": partial(cell, 0.4, True),
    "cell, +-0.1, whole clip": partial(cell, 0.1, True),
    "cell, +-0.8, one latent frame": partial(cell, 0.8, False),
    "cell, +-0.4, one latent frame": partial(cell, 0.4, False),
    "a lamp, one latent frame": lamp,
}
"""Every row of the table."""


def measured(autoencoder: torch.nn.Module, pairs: int, seed: int) -> dict[str, Late]:
    """Every difference, over so many pairs of clips."""
    rows = {}
    for name, draw in DIFFERENCES.items():
        rng = random.Random(f"{name}/{seed}")
        clips = torch.stack([clip for _ in range(pairs) for clip in draw(rng)])
        one, other = encode_videos(autoencoder, clips, ENCODED_AT_ONCE).unflatten(0, (pairs, 2)).unbind(1)
        distances = (one - other).flatten(1).norm(dim=1).cpu().numpy()
        low, high = np.percentile(distances, [25, 75])
        mean = float(distances.mean())
        rows[name] = Late(mean, (float(low), float(high)), told_apart_at(mean))
    return rows


@torch.no_grad()
def through(autoencoder: torch.nn.Module, scenes: int, seed: int) -> Through:
    """So many scenes with lamps, once through the autoencoder."""
    rng = random.Random(f"through/{seed}")
    drawn = [random_scene(rng, "held_out", pair_share=i % 2, lamps=1.0) for i in range(scenes)]
    clips = render([scene for each in drawn for scene in (each, negative(each))])
    decoded = torch.cat([autoencoder(part).sample for part in clips.split(ENCODED_AT_ONCE)])
    given, left = (each.unflatten(0, (scenes, 2)) for each in (clips, decoded))
    marks = [score_clip(frames, scene) for frames, scene in zip(to_uint8(left[:, 0].clamp(-1, 1)), drawn, strict=True)]
    means = {name: entry["mean"] for name, entry in summarise(marks, resamples=1).items()}
    difference = given[:, 0] - given[:, 1]
    pattern = (difference * (left[:, 0] - left[:, 1])).sum() / difference.square().sum()
    return Through(means["lamps"], means["total"], float(pattern))


def negative(scene: Scene) -> Scene:
    """Every lamp the other way."""

    def turned(board: Board | None) -> Board | None:
        return board and replace(board, on=tuple(tuple(not lamp for lamp in lamps) for lamps in board.on))

    return replace(scene, sprites=tuple(replace(sprite, board=turned(sprite.board)) for sprite in scene.sprites))


def open_autoencoder(name: str) -> torch.nn.Module:
    """That of a shipped model or of a model folder, or a folder of an autoencoder alone."""
    folder = shipped_models().get(name, Path(name))
    own = folder / "vae" if (folder / "vae").is_dir() else folder
    if not (own / "config.json").is_file():
        raise UserError(f"{name} has no autoencoder", "name a model folder, or one that save_pretrained wrote")
    return AutoencoderKLHunyuanVideo.from_pretrained(own, torch_dtype=torch.float32).eval()


app = typer.Typer()


@app.command()
@reported
def main(
    autoencoder: Annotated[
        str, typer.Argument(help="A model, or the folder of an autoencoder alone.")
    ] = "sprites/teacher",
    pairs: Annotated[int, typer.Option(min=1, help="Pairs of clips of each difference.")] = 32,
    scenes: Annotated[int, typer.Option(min=1, help="Scenes with lamps that go through it.")] = 32,
    seed: int = 0,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="A .json for the numbers.")] = None,
    debug: Debug = False,
) -> None:
    """Print how far apart latents are, and when that is settled."""
    quiet_libraries()
    opened = open_autoencoder(autoencoder)
    rows, back = measured(opened, pairs, seed), through(opened, scenes, seed)
    typer.echo("| difference | d | half of them | t* |\n|---|--:|--:|--:|")
    for name, row in rows.items():
        low, high = row.quartiles
        typer.echo(f"| {name} | {row.d:.1f} | {low:.1f} to {high:.1f} | {row.t:.2f} |")
    typer.echo(
        f"lamps that come back: score {back.lamps:.1f}, {back.pattern:.2f} of their pattern; total {back.total:.1f}"
    )
    if output is not None:
        told = {name: row._asdict() for name, row in rows.items()}
        counts = {"autoencoder": autoencoder, "pairs": pairs, "scenes": scenes, "seed": seed}
        write_json(output, counts | {"rows": told, "through": back._asdict(), "environment": environment("cpu")})


if __name__ == "__main__":
    app(prog_name="python -m studies.late")
