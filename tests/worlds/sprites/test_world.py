import random
from itertools import combinations, product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vidaccel.errors import UserError
from vidaccel.worlds.sprites.world import (
    COLOURS,
    DIRECTIONS,
    LARGE,
    MARGIN,
    MOTIONS,
    RADIUS,
    SHAPES,
    SIZE,
    SMALL,
    TRAVEL,
    TRIPLES,
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
