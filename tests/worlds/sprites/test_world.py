import hashlib
import random
from itertools import combinations, product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vidaccel.errors import UserError
from vidaccel.worlds.sprites.captions import caption
from vidaccel.worlds.sprites.drawing import Scenes
from vidaccel.worlds.sprites.world import (
    CELL,
    CELLS,
    COLOURS,
    DIRECTIONS,
    LAMPS_RADIUS,
    LARGE,
    MARGIN,
    MOTIONS,
    PERIODS,
    RADIUS,
    SHAPES,
    SIZE,
    SMALL,
    TRAVEL,
    TRIPLES,
    Board,
    Sprite,
    is_held_out,
    random_scene,
)

scenes = st.builds(
    lambda seed, split: random_scene(random.Random(seed), split),
    seed=st.integers(0, 2**32 - 1),
    split=st.sampled_from(["train", "held_out"]),
)


@given(scenes)
@settings(max_examples=200, deadline=None)
def test_sprites_stay_in_the_frame(scene):
    for sprite in scene.sprites:
        for x, y, radius in (sprite.state(f / 16) for f in range(17)):
            assert radius + MARGIN <= x + 1e-6 and x + radius + MARGIN <= SIZE + 1e-6
            assert radius + MARGIN <= y + 1e-6 and y + radius + MARGIN <= SIZE + 1e-6


@given(scenes)
@settings(max_examples=200, deadline=None)
def test_two_sprites_never_touch_and_share_neither_shape_nor_colour(scene):
    for one, other in combinations(scene.sprites, 2):
        assert one.shape != other.shape and one.colour != other.colour
        for (x, y, r), (u, v, s) in ((one.state(f / 16), other.state(f / 16)) for f in range(17)):
            assert max(abs(x - u), abs(y - v)) >= r + s + 2 * MARGIN - 1e-6


@given(seed=st.integers(0, 2**32 - 1))
@settings(max_examples=200, deadline=None)
def test_the_first_of_two_is_the_left_one_or_the_upper_one_where_one_moves_sideways(seed):
    one, other = random_scene(random.Random(seed), pair_share=1.0).sprites
    sideways = {one.motion, other.motion} & {"left", "right"}
    for (x, y, r), (u, v, s) in ((one.state(f / 16), other.state(f / 16)) for f in range(17)):
        assert (y + r < v - s) if sideways else (x + r < u - s)


@given(seed=st.integers(0, 2**32 - 1), split=st.sampled_from(["train", "held_out"]))
@settings(max_examples=200, deadline=None)
def test_every_sprite_of_a_scene_belongs_to_its_split(seed, split):
    scene = random_scene(random.Random(seed), split)
    assert all(sprite.triple in TRIPLES[split] for sprite in scene.sprites)
    assert all(is_held_out(sprite.triple) == (split == "held_out") for sprite in scene.sprites)


def test_what_has_twice_the_odds_is_drawn_twice_as_often():
    rng = random.Random(0)
    drawn = [random_scene(rng, pair_share=0, odds={"cross": 2, "gray": 3}) for _ in range(4000)]
    crosses = sum(scene.sprites[0].shape == "cross" for scene in drawn)
    gray = sum(scene.background == "gray" for scene in drawn)
    assert crosses == pytest.approx(4000 * 2 / 5, abs=4 * 31) and gray == pytest.approx(4000 * 3 / 5, abs=4 * 31)
    with pytest.raises(UserError, match="odds of pink"):
        random_scene(rng, odds={"pink": 2})


def test_the_splits_share_no_triple_and_training_sees_every_pair_of_attributes():
    train, held_out = (set(TRIPLES[split]) for split in ("train", "held_out"))
    every = set(product(SHAPES, COLOURS, MOTIONS))
    assert not train & held_out and train | held_out == every
    assert len(held_out) == len(every) // 6
    for i, j in combinations(range(3), 2):
        assert {(t[i], t[j]) for t in train} == {(t[i], t[j]) for t in every}


def test_held_out_covers_every_value_of_every_attribute():
    for i, values in enumerate((SHAPES, COLOURS, MOTIONS)):
        assert {triple[i] for triple in TRIPLES["held_out"]} == set(values)


@pytest.mark.parametrize("motion", MOTIONS)
def test_a_motion_changes_what_it_names_and_nothing_else(motion):
    sprite = Sprite("circle", "red", motion, x=32.0, y=30.0, radius=8.0)
    (x, y, r), (u, v, s) = sprite.state(0.0), sprite.state(1.0)
    dx, dy = DIRECTIONS.get(motion, (0, 0))
    assert (u - x, v - y) == (dx * TRAVEL, dy * TRAVEL)
    assert (r, s) == {"growing": (SMALL, LARGE), "shrinking": (LARGE, SMALL)}.get(motion, (8.0, 8.0))
    middle = sprite.state(0.5)
    assert middle == pytest.approx(((x + u) / 2, (y + v) / 2, (r + s) / 2))


def test_scenes_follow_their_seed_and_the_share_of_pairs():
    def draw(seed, share):
        return [random_scene(rng, "train", share) for rng in [random.Random(seed)] for _ in range(200)]

    assert draw(0, 0.5) == draw(0, 0.5) != draw(1, 0.5)
    assert {len(s.sprites) for s in draw(0, 0.0)} == {1}
    assert {len(s.sprites) for s in draw(0, 1.0)} == {2}
    assert 70 < sum(len(s.sprites) == 2 for s in draw(0, 0.5)) < 130
    assert all(RADIUS[0] <= sprite.radius <= RADIUS[1] for s in draw(0, 0.5) for sprite in s.sprites)


lamp_scenes = st.builds(
    lambda seed, split: random_scene(random.Random(seed), split, lamps=1.0),
    seed=st.integers(0, 2**32 - 1),
    split=st.sampled_from(["train", "held_out"]),
)


@given(lamp_scenes)
@settings(max_examples=300, deadline=None)
def test_sprites_with_lamps_are_larger_and_keep_apart(scene):
    assert any(sprite.board for sprite in scene.sprites)
    states = [[sprite.state(f / 16) for sprite in scene.sprites] for f in range(17)]
    for each in states:
        for sprite, (x, y, radius) in zip(scene.sprites, each, strict=True):
            assert radius + MARGIN <= min(x, y) + 1e-6 and max(x, y) + radius + MARGIN <= SIZE + 1e-6
            if sprite.board:
                assert LAMPS_RADIUS[0] <= radius + 1e-6 and radius <= LAMPS_RADIUS[1] + 1e-6
                assert sprite.board.cells * CELL <= 2 * radius + 1e-6
        for (x, y, r), (u, v, s) in combinations(each, 2):
            assert max(abs(x - u), abs(y - v)) >= r + s + 2 * MARGIN - 1e-6
    if len(scene.sprites) == 2:
        (x, y, r), (u, v, s) = states[0]
        sideways = {sprite.motion for sprite in scene.sprites} & {"left", "right"}
        assert (y + r < v - s) if sideways else (x + r < u - s)


def test_so_many_scenes_have_lamps_and_every_board_and_motion_is_among_them():
    rng = random.Random(0)
    drawn = [random_scene(rng, lamps=0.5) for _ in range(4000)]
    lit = [sprite for scene in drawn for sprite in scene.sprites if sprite.board]
    share = sum(any(sprite.board for sprite in scene.sprites) for scene in drawn) / 4000
    assert share == pytest.approx(0.5, abs=0.03)
    assert {sprite.board.cells for sprite in lit} == set(CELLS) and {s.motion for s in lit} == set(MOTIONS)
    assert {len(scene.sprites) for scene in drawn if all(sprite.board for sprite in scene.sprites)} == {1, 2}


def test_lamps_are_on_half_of_the_time_and_drawn_anew_in_every_period():
    rng = random.Random(0)
    boards = [random_scene(rng, pair_share=0.0, lamps=1.0).sprites[0].board for _ in range(400)]
    on = [lamp for board in boards for lamps in board.on for lamp in lamps]
    changes = [
        a != b for board in boards for one, other in zip(board.on, board.on[1:], strict=False)
        for a, b in zip(one, other, strict=True)
    ]  # fmt: skip
    assert sum(on) / len(on) == pytest.approx(0.5, abs=0.02)
    assert sum(changes) / len(changes) == pytest.approx(0.5, abs=0.02)


def test_without_lamps_every_scene_and_caption_is_what_it_was():
    """The digest is of what commit 1fa21bf drew."""

    def told():
        for i in range(60):
            rng = random.Random(i)
            scene = random_scene(rng, ("train", "held_out")[i % 2])
            yield scene, [caption(scene, rng)]
        yield from Scenes(3, odds={"cross": 2}).many(20, 2, 1)

    lines = []
    for scene, captions in told():
        lines += captions
        lines += [repr((scene.background, *s.triple, s.x, s.y, s.radius)) for s in scene.sprites]
        assert all(sprite.board is None for sprite in scene.sprites)
    digest = hashlib.sha256("\n".join(lines).encode()).hexdigest()
    assert digest == "563576f1bc413b12337af2ca20833214e13aa6246356c76c8dde316c4b3a9dbd"


def test_a_board_that_does_not_fit_is_the_callers_mistake():
    dark = tuple((False,) * 16 for _ in range(PERIODS))
    assert Sprite("square", "red", "left", 30.0, 30.0, 16.0, Board(4, dark)).least == 16.0
    for radius, motion in ((8.0, "left"), (15.9, "left"), (18.0, "growing")):
        with pytest.raises(UserError, match="4 x 4 lamps do not fit a sprite of radius"):
            Sprite("square", "red", motion, 30.0, 30.0, radius, Board(4, dark))
    for cells, on in ((2, ((False,) * 4,) * PERIODS), (3, dark), (4, dark[1:])):
        with pytest.raises(UserError, match=f"a board of {cells} x {cells} lamps in"):
            Board(cells, on)
