import itertools
import random
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch

from vidaccel.worlds.sprites.detect import detect
from vidaccel.worlds.sprites.render import coverage, render, to_uint8
from vidaccel.worlds.sprites.world import BACKGROUNDS, COLOURS, NUM_FRAMES, SHAPES, SIZE, Scene, Sprite, random_scene

ATTRIBUTES = ("shape", "colour", "motion")


def clip(scene: Scene) -> torch.Tensor:
    return to_uint8(render([scene]))[0]


def painted(alpha: torch.Tensor, colour: tuple[int, int, int] = COLOURS["red"], frames: torch.Tensor | None = None):
    """`colour` over black, or over `frames`, where alpha [T, H, W] says."""
    below = torch.zeros(*alpha.shape, 3) if frames is None else frames.float()
    return torch.lerp(below, torch.tensor(colour).float(), alpha[..., None]).round().to(torch.uint8)


def track(shape: str, states: torch.Tensor) -> torch.Tensor:
    """Coverage [T, H, W] of a shape at states [T, 3]."""
    return coverage(torch.tensor([SHAPES.index(shape)]), states[None])[0]


def steady(x: float, y: float, radius: float) -> torch.Tensor:
    return torch.tensor([[x, y, radius]]).expand(NUM_FRAMES, 3)


def ramp(start: float, stop: float) -> torch.Tensor:
    return torch.linspace(start, stop, NUM_FRAMES)


@pytest.fixture(scope="module", params=["train", "held_out"])
def checked(request, through_mp4):
    """How often each attribute was right, and of how many, over 120 random clips of a split after mp4s of 20 each."""
    right, asked = Counter(), Counter()
    scenes = [random_scene(random.Random(f"{request.param} {seed}"), request.param) for seed in range(120)]
    files = (through_mp4(torch.stack([*map(clip, scenes[first : first + 20])])) for first in range(0, 120, 20))
    for scene, frames in zip(scenes, itertools.chain(*files), strict=True):
        found = detect(frames)
        right["background"] += found.background == scene.background
        asked["background"] += 1
        agreements = []
        for sprite in scene.sprites:
            seen = min(found.sprites, key=lambda f, s=sprite: torch.dist(f.states[0, :2], torch.tensor([s.x, s.y])))
            agreements.append([getattr(seen, name) == getattr(sprite, name) for name in ATTRIBUTES])
            right.update(dict(zip(ATTRIBUTES, agreements[-1], strict=True)))
            asked.update(ATTRIBUTES)
        whole = len(found.sprites) == len(scene.sprites) and all(map(all, agreements))
        right["pair" if len(scene.sprites) == 2 else "single"] += whole
        asked["pair" if len(scene.sprites) == 2 else "single"] += 1
    return right, asked


@pytest.mark.parametrize("name", [*ATTRIBUTES, "background", "pair", "single"])
def test_right_at_least_99_times_in_100_after_an_mp4(checked, name):
    right, asked = checked
    assert asked[name] >= 40
    assert right[name] >= 0.99 * asked[name]


@pytest.mark.parametrize("shape", SHAPES)
def test_tracks_are_right_to_a_fraction_of_a_pixel(shape):
    sprite = Sprite(shape, "cyan", "right", x=20.0, y=30.0, radius=8.0)
    found = detect(clip(Scene("white", (sprite,)))).sprites[0]
    expected = torch.tensor([sprite.state(f / 16) for f in range(NUM_FRAMES)])
    assert torch.allclose(found.states, expected, atol=0.15)
    assert torch.allclose(found.area, track(shape, expected).sum((1, 2)), rtol=0.02)
    assert torch.allclose(found.rgb, torch.tensor(COLOURS["cyan"]).float(), atol=2)
    assert found.seen.all() and (found.shapes == SHAPES.index(shape)).all()


@pytest.mark.parametrize("seed", range(8))
def test_soft_and_noisy_frames_are_forgiven(seed):
    """Edges three times as wide as the renderer's, grain of 6 levels: what a good model leaves."""
    scene = random_scene(random.Random(seed), pair_share=1.0)
    soft = torch.nn.functional.avg_pool2d(clip(scene).movedim(-1, 1).float(), 3, 1, 1, count_include_pad=False)
    noise = 6 * torch.randn(soft.shape, generator=torch.Generator().manual_seed(seed))
    found = detect((soft + noise).clamp(0, 255).movedim(1, -1).to(torch.uint8))
    assert found.background == scene.background
    assert {(s.shape, s.colour, s.motion) for s in found.sprites} == {s.triple for s in scene.sprites}


@pytest.mark.parametrize("background", BACKGROUNDS)
def test_an_empty_background_holds_no_sprite(background):
    frames = np.full((NUM_FRAMES, SIZE, SIZE, 3), BACKGROUNDS[background], np.uint8)
    found = detect(frames)
    assert (found.background, found.sprites) == (background, ())


@pytest.mark.parametrize("level", [64, 190])
def test_a_gray_between_two_backgrounds_is_neither(level):
    assert detect(np.full((NUM_FRAMES, SIZE, SIZE, 3), level, np.uint8)).background is None


def test_a_background_that_changes_midway_is_none():
    frames = np.zeros((NUM_FRAMES, SIZE, SIZE, 3), np.uint8)
    frames[NUM_FRAMES // 2 :] = 255
    assert detect(frames).background is None


@pytest.mark.parametrize("rgb", [(235, 122, 32), (130, 45, 222), (225, 30, 122)], ids=["orange", "violet", "rose"])
def test_a_colour_beside_the_palette_has_no_name_but_keeps_its_shape(rgb):
    (found,) = detect(painted(track("square", steady(32, 32, 8)), rgb)).sprites
    assert (found.shape, found.colour, found.motion) == ("square", None, "still")


def test_a_ring_and_two_blobs_of_one_colour_have_no_shape():
    ring = track("circle", steady(32, 32, 10)) - track("circle", steady(32, 32, 6))
    blobs = track("circle", steady(15, 32, 7)) + track("circle", steady(49, 32, 7))
    for alpha in (ring, blobs):
        (found,) = detect(painted(alpha)).sprites
        assert (found.shape, found.colour) == (None, "red")


@pytest.mark.parametrize(
    "states",
    [
        torch.stack([ramp(20, 40), ramp(20, 40), ramp(8, 8)], 1),
        torch.stack([torch.cat([ramp(20, 40)[::2], ramp(40, 20)[1::2]]), ramp(32, 32), ramp(8, 8)], 1),
        torch.stack([ramp(20, 40), ramp(32, 32), ramp(6, 10)], 1),
        torch.stack([ramp(30, 34.5), ramp(32, 32), ramp(8, 8)], 1),
        torch.stack([32 + 6 * torch.randn(NUM_FRAMES, generator=torch.Generator().manual_seed(0)).clamp(-2, 2)]
                    + [ramp(32, 32), ramp(8, 8)], 1),
    ],
    ids=["diagonal", "there and back", "moving and growing", "a fifth of the way", "jumping about"],
)  # fmt: skip
def test_a_motion_the_world_does_not_have_is_none(states):
    (found,) = detect(painted(track("circle", states))).sprites
    assert (found.shape, found.colour, found.motion) == ("circle", "red", None)


def test_a_sprite_that_changes_colour_midway_is_one_sprite_without_a_colour():
    scene = Scene("gray", (Sprite("circle", "red", "right", 20.0, 32.0, 8.0),))
    other = replace(scene, sprites=(replace(scene.sprites[0], colour="green"),))
    (found,) = detect(torch.cat([clip(scene)[:8], clip(other)[8:]])).sprites
    assert (found.shape, found.colour, found.motion) == ("circle", None, "right")
    names = tuple(COLOURS)
    assert [names[i] for i in found.colours] == ["red"] * 8 + ["green"] * 9


def test_a_sprite_there_for_half_the_clip_has_no_attribute():
    frames = clip(Scene("white", (Sprite("cross", "blue", "up", 32.0, 50.0, 8.0),)))
    frames[9:] = 255
    (found,) = detect(frames).sprites
    assert (found.shape, found.colour, found.motion) == (None, None, None)
    assert found.seen.tolist() == [True] * 9 + [False] * 8


def test_touching_sprites_are_told_apart_by_colour():
    frames = painted(track("square", steady(24, 32, 8)))
    frames = painted(track("circle", steady(40, 32, 8)), COLOURS["blue"], frames)
    found = detect(frames).sprites
    assert {(s.shape, s.colour, s.motion) for s in found} == {("square", "red", "still"), ("circle", "blue", "still")}


@pytest.mark.parametrize(
    "frames",
    [
        np.zeros((17, 64, 64, 3), np.float32),
        np.zeros((17, 32, 32, 3), np.uint8),
        np.zeros((17, 3, 64, 64), np.uint8),
        np.zeros((1, 64, 64, 3), np.uint8),
        np.zeros((64, 64, 3), np.uint8),
    ],
)
def test_other_types_and_shapes_are_refused(frames):
    with pytest.raises(ValueError, match="frames must be uint8"):
        detect(frames)
