import math
import random

import pytest
import torch

from vidaccel.worlds.sprites.align import shown
from vidaccel.worlds.sprites.render import CROSS_ARM, MUTE, cells_at, coverage, covered_cells, render, to_uint8
from vidaccel.worlds.sprites.world import (
    BACKGROUNDS,
    CELL,
    COLOURS,
    DIRECTIONS,
    LARGE,
    MOTIONS,
    NUM_FRAMES,
    PERIODS,
    SHAPES,
    SIZE,
    SMALL,
    TRAVEL,
    Board,
    Scene,
    Sprite,
    random_scene,
)

AREA = {"circle": math.pi, "square": 4.0, "triangle": 2.0, "cross": 8 * CROSS_ARM - 4 * CROSS_ARM**2}
PERIMETER = {"circle": 2 * math.pi, "square": 8.0, "triangle": 2 + 2 * math.sqrt(5), "cross": 8.0}
EXTENTS = (5.0, 7.3, 9.0, 11.0)


def drawn(shape: str, extent: float, x: float, y: float) -> torch.Tensor:
    """Coverage [H, W] of one shape."""
    return coverage(torch.tensor([SHAPES.index(shape)]), torch.tensor([[[x, y, extent]]]))[0, 0]


def anywhere(shape: str, extent: float) -> torch.Tensor:
    """Coverage [25, H, W] at 25 places within a pixel, so that the grid averages out."""
    offsets = torch.arange(5) / 5
    return torch.stack([drawn(shape, extent, 31 + float(u), 30 + float(v)) for u in offsets for v in offsets])


def centroid(alpha: torch.Tensor) -> torch.Tensor:
    grid = torch.arange(SIZE) + 0.5
    return (
        torch.stack([(alpha.sum(-2) * grid).sum(-1), (alpha.sum(-1) * grid).sum(-1)], -1)
        / alpha.sum((-2, -1))[..., None]
    )


def lone(shape: str = "circle", motion: str = "still", colour: str = "red", background: str = "black") -> Scene:
    return Scene(background, (Sprite(shape, colour, motion, x=32.0, y=32.0, radius=8.0),))


def alpha_of(scene: Scene) -> torch.Tensor:
    """[T, H, W]: how far each pixel is from the background towards the only sprite's colour, from pixels alone."""
    background = torch.tensor(BACKGROUNDS[scene.background]).float()
    towards = torch.tensor(COLOURS[scene.sprites[0].colour]).float() - background
    pixels = (render([scene])[0].movedim(0, -1) + 1) * 127.5
    return (pixels - background) @ towards / towards.square().sum()


@pytest.mark.parametrize("extent", EXTENTS)
@pytest.mark.parametrize("shape", SHAPES)
def test_area_is_that_of_the_closed_form(shape, extent):
    assert anywhere(shape, extent).sum((1, 2)).mean() == pytest.approx(AREA[shape] * extent**2, rel=0.015)


@pytest.mark.parametrize("extent", EXTENTS)
@pytest.mark.parametrize("shape", SHAPES)
def test_edges_are_one_pixel_wide(shape, extent):
    """Over a linear ramp from 0 to 1 of width w, a (1 - a) integrates to w / 6 for each pixel of the edge's length."""
    alpha = anywhere(shape, extent)
    width = 6 * (alpha * (1 - alpha)).sum((1, 2)).mean() / (PERIMETER[shape] * extent)
    assert width == pytest.approx(1.0, abs=0.15)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_shape_fills_its_extent_and_leaves_no_speck_outside(shape):
    alpha = drawn(shape, 8.0, 32.0, 32.0)
    assert alpha[24:40, 24:40].count_nonzero() == alpha.count_nonzero()
    assert alpha[24:40, 24].sum() > 0 and alpha[24:40, 39].sum() > 0
    assert alpha[24, 24:40].sum() > 0 and alpha[39, 24:40].sum() > 0
    assert alpha[33, 32] == 1


@pytest.mark.parametrize("shape", SHAPES)
def test_shapes_are_symmetric_about_their_axis_and_only_the_triangle_leans_on_its_base(shape):
    alpha = drawn(shape, 8.0, 32.0, 32.0)
    assert torch.equal(alpha, alpha.flip(1))
    assert torch.equal(alpha, alpha.flip(0)) == (shape != "triangle")
    drop = 8.0 / 3 if shape == "triangle" else 0.0
    assert centroid(alpha).tolist() == pytest.approx([32.0, 32.0 + drop], abs=0.05)


@pytest.mark.parametrize("motion", DIRECTIONS)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_centroid_moves_evenly_and_as_far_as_the_world_says(shape, motion):
    path = centroid(alpha_of(Scene("gray", (Sprite(shape, "blue", motion, x=32.0, y=32.0, radius=8.0),))))
    steps = path.diff(dim=0)
    expected = torch.tensor(DIRECTIONS[motion]) * TRAVEL
    assert torch.allclose(path[-1] - path[0], expected, atol=0.05)
    assert torch.allclose(steps, expected.expand_as(steps) / (NUM_FRAMES - 1), atol=0.1)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    ("motion", "ratio"), [("growing", LARGE / SMALL), ("shrinking", SMALL / LARGE), ("still", 1.0)]
)
def test_the_area_grows_by_the_square_of_the_extents(shape, motion, ratio):
    area = alpha_of(lone(shape, motion)).sum((1, 2))
    assert area[-1] / area[0] == pytest.approx(ratio**2, rel=0.03)
    assert torch.allclose(area.sqrt().diff().diff(), torch.zeros(NUM_FRAMES - 2), atol=0.15)


@pytest.mark.parametrize("background", BACKGROUNDS)
@pytest.mark.parametrize("colour", COLOURS)
def test_colours_are_the_palettes_to_the_level(colour, background):
    frames = to_uint8(render([lone(colour=colour, background=background)]))[0]
    assert frames.shape == (NUM_FRAMES, SIZE, SIZE, 3) and frames.dtype == torch.uint8
    assert tuple(frames[0, 32, 32].tolist()) == COLOURS[colour]
    assert tuple(frames[-1, 2, 2].tolist()) == BACKGROUNDS[background]


def test_a_batch_is_its_clips_and_an_excerpt_is_a_cut():
    scenes = [random_scene(random.Random(seed)) for seed in range(6)]
    assert {len(s.sprites) for s in scenes} == {1, 2}
    batch = render(scenes)
    assert batch.shape == (6, 3, NUM_FRAMES, SIZE, SIZE) and batch.min() >= -1 and batch.max() <= 1
    for scene, clip in zip(scenes, batch, strict=True):
        assert torch.equal(render([scene])[0], clip)
    assert torch.equal(render(scenes, num_frames=5, first_frame=3), batch[:, :, 3:8])


@pytest.mark.parametrize("seed", range(20))
def test_rendered_sprites_keep_a_clear_pixel_between_them_and_to_the_frame(seed):
    scene = random_scene(random.Random(seed), pair_share=1.0)
    one, other = (alpha_of(Scene(scene.background, (sprite,))) > 1e-4 for sprite in scene.sprites)
    around = torch.nn.functional.max_pool2d(one.float(), 3, stride=1, padding=1) > 0
    assert not (around & other).any()
    inner = (one | other)[:, 1:-1, 1:-1]
    assert inner.sum() == one.sum() + other.sum()


def test_every_motion_is_drawn():
    first_frames = {motion: alpha_of(lone(motion=motion)) for motion in MOTIONS}
    ends = [clip[-1] for clip in first_frames.values()]
    assert all(not torch.equal(a, b) for i, a in enumerate(ends) for b in ends[:i])


def test_it_draws_on_the_device_that_it_is_given_and_on_no_other():
    scenes = [random_scene(random.Random(seed), pair_share=seed % 2) for seed in range(6)]
    plain, labels = render(scenes, 5, 3), shown(scenes)
    with torch.device("meta"):  # where a tensor would lie that is made on no device in particular
        assert torch.equal(render(scenes, 5, 3, device="cpu"), plain)
        assert torch.equal(shown(scenes, device="cpu"), labels)


def blinking(cells: int, seed: int = 0) -> Board:
    rng = random.Random(seed)
    return Board(cells, tuple(tuple(rng.random() < 0.5 for _ in range(cells**2)) for _ in range(PERIODS)))


def with_board(shape: str = "square", motion: str = "still", x: float = 24.0, cells: int = 4) -> Scene:
    return Scene("gray", (Sprite(shape, "red", motion, x, 32.0, 18.0, blinking(cells)),))


def test_lamps_are_bright_or_dark_for_the_frames_of_a_period():
    scene = with_board()
    frames, board = to_uint8(render([scene]))[0], scene.sprites[0].board
    for frame in range(NUM_FRAMES):
        for row in range(4):
            for column in range(4):
                on = board.on[(frame + 3) // 4][4 * row + column]
                wanted = [MUTE * level + (1 - MUTE) * 255 * on for level in COLOURS["red"]]
                lamp = frames[frame, 16 + 8 * row : 24 + 8 * row, 8 + 8 * column : 16 + 8 * column].float()
                assert (lamp - torch.tensor(wanted)).abs().max() <= 0.5
    rim = [MUTE * level + (1 - MUTE) * 127.5 for level in COLOURS["red"]]
    assert (frames[:, 15, 10].float() - torch.tensor(rim)).abs().max() <= 0.5


def test_lamps_move_with_their_sprite():
    moving, there = render([with_board(motion="right"), with_board(x=24.0 + TRAVEL)])
    assert torch.allclose(moving[:, -1], there[:, -1], atol=1e-5)
    assert not torch.allclose(moving[:, 0], there[:, 0], atol=0.1)


@pytest.mark.parametrize("centre", [(32.0, 32.0), (31.3, 32.9), (20.5, 40.25)])
def test_a_lamp_has_the_same_area_anywhere_and_lamps_share_none(centre):
    drawn = cells_at(torch.tensor([[[*centre, 18.0]]]), 3)[0, 0]
    assert drawn.shape == (3, 3, SIZE, SIZE)
    assert torch.allclose(drawn.sum((2, 3)), torch.tensor(float(CELL**2)), atol=1e-3)
    assert drawn.sum((0, 1)).max() <= 1 + 1e-5
    inner = cells_at(torch.tensor([[[*centre, 18.0]]]), 3, rim=1.0)[0, 0]
    assert torch.allclose(inner.sum((2, 3)), torch.tensor(float((CELL - 2) ** 2)), atol=1e-3)
    assert (inner <= drawn + 1e-5).all()


def test_a_lamp_is_there_where_the_shape_is():
    shapes = torch.tensor([SHAPES.index(shape) for shape in ("square", "cross")])
    square, cross = covered_cells(shapes, torch.tensor([14.0, 14.0]), 3)
    assert (square == 1).all()
    assert cross[1].min() > 0.9 and cross[:, 1].min() > 0.9 and cross[0, 0] < 0.3
    clip = render([with_board("cross", cells=3)])[0]
    assert torch.equal(clip[:, :, 22, 14], clip[:, :1, 22, 14].expand(-1, NUM_FRAMES))  # a corner of the board


def test_plain_scenes_are_the_same_among_scenes_with_lamps():
    plain = [random_scene(random.Random(seed)) for seed in range(6)]
    lit = [random_scene(random.Random(seed), lamps=1.0) for seed in range(6)]
    together, apart = render(plain + lit), render(plain)
    assert torch.equal(together[:6], apart)
    for scene, clip in zip(lit, together[6:], strict=True):
        assert torch.equal(render([scene])[0], clip)
    assert torch.equal(render(lit, num_frames=5, first_frame=3), together[6:, :, 3:8])
    assert together.min() >= -1 and together.max() <= 1
    with torch.device("meta"):
        assert torch.equal(render(lit, device="cpu"), together[6:])
