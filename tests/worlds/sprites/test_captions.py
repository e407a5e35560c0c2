import random
from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vidaccel.errors import UserError
from vidaccel.worlds.sprites.captions import (
    AFTER,
    BEFORE,
    LAMP_PHRASES,
    MOTION_PHRASES,
    caption,
    describe,
    told,
    vocabulary,
    words,
)
from vidaccel.worlds.sprites.parse import Meaning, SpriteMeaning, parse
from vidaccel.worlds.sprites.world import BACKGROUNDS, COLOURS, MOTIONS, SHAPES, Scene, Sprite, random_scene


def meaning(scene: Scene) -> tuple[str, set[tuple[str, str, str, bool]]]:
    return scene.background, {(*s.triple, s.lamps) for s in scene.sprites}


def read(text: str) -> tuple[str, set[tuple[str, str, str, bool]]]:
    parsed = parse(text)
    return parsed.background, set(parsed.sprites)


@pytest.mark.parametrize("template", BEFORE + AFTER)
def test_every_template_and_every_phrase_reads_back(template):
    for (motion, phrases), background in product(MOTION_PHRASES.items(), BACKGROUNDS):
        for phrase in phrases:
            one = describe(Sprite("cross", "cyan", motion, 0, 0, 0), phrase)
            two = describe(Sprite("circle", "red", "still", 0, 0, 0), "not moving")
            parsed = parse(template.format(subject=one, bg=background))
            assert parsed == Meaning(background, (SpriteMeaning("cross", "cyan", motion),))
            parsed = parse(template.format(subject=f"{two} and {one}", bg=background))
            assert parsed.sprites == (("circle", "red", "still", False), ("cross", "cyan", motion, False))


@given(seed=st.integers(0, 2**32 - 1))
@settings(max_examples=300, deadline=None)
def test_any_caption_of_any_scene_reads_back_and_stays_in_the_vocabulary(seed):
    rng = random.Random(seed)
    lamps = rng.choice([0.0, 1.0])
    scene = random_scene(rng, rng.choice(["train", "held_out"]), lamps=lamps)
    text = caption(scene, rng)
    assert read(text) == meaning(scene)
    assert set(words(text)) <= set(vocabulary(lamps=lamps > 0))


def test_no_two_meanings_share_a_caption():
    """Every phrase belongs to one motion; shapes, colours and backgrounds are words of their own."""
    phrases = [phrase for group in MOTION_PHRASES.values() for phrase in group]
    assert len(phrases) == len(set(phrases)) and tuple(MOTION_PHRASES) == MOTIONS
    names = [*SHAPES, *COLOURS, *BACKGROUNDS]
    assert len(names) == len(set(names)) and not set(names) & set(words(" ".join(phrases)))


def test_the_vocabulary_is_small_sorted_and_whole():
    known = vocabulary()
    assert known == sorted(set(known)) and len(known) < 64
    assert {*SHAPES, *COLOURS, *BACKGROUNDS, "and", "a", "on", ","} <= set(known)
    assert all(words(word) == [word] for word in known)


def test_a_scene_has_many_phrasings_that_follow_the_seed():
    scene = random_scene(random.Random(3), pair_share=1.0)
    drawn = [caption(scene, random.Random(seed)) for seed in range(50)]
    assert drawn == [caption(scene, random.Random(seed)) for seed in range(50)] and len(set(drawn)) > 20


def test_the_caption_of_the_readme_is_among_them():
    scene = Scene("black", (Sprite("circle", "red", "right", 20.0, 32.0, 8.0),))
    assert "a red circle moving right on black" in {caption(scene, random.Random(seed)) for seed in range(500)}


def test_case_and_spaces_do_not_matter():
    assert parse("  A red  circle\nmoving right on BLACK ") == Meaning(
        "black", (SpriteMeaning("circle", "red", "right"),)
    )


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a cat on a surfboard",
        "a red circle moving right",
        "a red circle on black",
        "a red circle moving right on purple",
        "a red circle moving right on black on white",
        "a red circle moving right on black and more",
        "a red circle moving upwardsly on black",
        "a red circle growing and a blue square growing and a green cross growing on black",
        "a red circle growing, a blue square growing on black",
        "flickering lamps on black",
        "a red circle with lamps moving right on black",
        "a red circle moving right with flickering lamps on black",
        "a small red circle with flickering lamps moving right on black",
        "a red circle with flickering lamps on black",
    ],
)
def test_what_the_templates_cannot_say_is_an_error_with_a_hint(text):
    with pytest.raises(UserError, match="cannot be scored") as error:
        parse(text)
    assert "a red circle" in error.value.hint
    assert parse(error.value.hint.split('"')[1]).background == "black"


def test_what_is_left_unsaid_is_not_in_the_caption_and_nothing_else_is_missing():
    rng = random.Random(0)
    scene = Scene("black", (Sprite("circle", "red", "right", 0, 0, 8), Sprite("square", "blue", "still", 0, 0, 8)))
    assert told(scene, rng, 0.0) == scene
    bare = told(scene, rng, 1.0)
    assert {(s.shape, s.colour, s.motion) for s in bare.sprites} == {("circle", None, None), ("square", None, None)}
    for _ in range(20):
        said = set(words(caption(bare, rng)))
        assert said <= {*words("a circle and a square , on black background with in front of")}
        assert {"circle", "and", "square", "black"} <= said


def test_a_share_of_colours_and_of_motions_is_unsaid():
    rng = random.Random(0)
    sprites = [s for _ in range(2000) for s in told(random_scene(rng), rng, 0.3).sprites]
    for attribute in ("colour", "motion"):
        share = sum(getattr(s, attribute) is None for s in sprites) / len(sprites)
        assert share == pytest.approx(0.3, abs=0.03)


@pytest.mark.parametrize("phrase", LAMP_PHRASES)
def test_every_phrase_for_lamps_reads_back(phrase):
    for motion, phrases in MOTION_PHRASES.items():
        for other in phrases:
            text = f"a red square {phrase} {other} and a blue circle {other} on black"
            lit, plain = parse(text).sprites
            assert lit == ("square", "red", motion, True) and plain == ("circle", "blue", motion, False)


def test_words_of_lamps_come_after_the_others():
    plain, all_words = vocabulary(), vocabulary(lamps=True)
    assert all_words[: len(plain)] == plain and len(set(all_words)) == len(all_words)
    assert {"flickering", "lamps"} <= set(all_words) - set(plain)


def test_lamps_are_always_said_and_never_which_are_on():
    rng = random.Random(0)
    for _ in range(200):
        scene = random_scene(rng, lamps=1.0)
        said = words(caption(told(scene, rng), rng))
        assert said.count("lamps") == sum(sprite.lamps for sprite in scene.sprites)
