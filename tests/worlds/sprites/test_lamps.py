"""Lamps as they are read off clips: the renderer's earn 99, gray averages and what only looks like lamps nothing."""

import random
from dataclasses import replace

import numpy as np
import pytest
import torch

from vidaccel.bench.measures.quality import prompts_of
from vidaccel.config.benchmark import BenchmarkConfig
from vidaccel.errors import UserError
from vidaccel.worlds import scorer_named
from vidaccel.worlds.sprites.captions import caption
from vidaccel.worlds.sprites.parse import parse
from vidaccel.worlds.sprites.render import render, to_uint8
from vidaccel.worlds.sprites.score import QUALITY, SEMANTIC, score_clip, summarise, totals
from vidaccel.worlds.sprites.scoring import SpritesScorer
from vidaccel.worlds.sprites.world import (
    NUM_FRAMES,
    PERIODS,
    TRIPLES,
    Board,
    Scene,
    Sprite,
    place_with_lamps,
    random_scene,
)


def drawn(rng: random.Random, cells: int) -> Board:
    return Board(cells, tuple(tuple(rng.random() < 0.5 for _ in range(cells**2)) for _ in range(PERIODS)))


RNG = random.Random(1)
SCENES = (
    Scene("black", (Sprite("square", "red", "right", 22.0, 30.0, 18.0, drawn(RNG, 4)),)),
    Scene("gray", (Sprite("circle", "yellow", "still", 30.0, 34.0, 20.0, drawn(RNG, 5)),)),
    Scene("white", (Sprite("cross", "blue", "growing", 32.0, 30.0, 14.0, drawn(RNG, 3)),)),
)


def clip(scene: Scene) -> torch.Tensor:
    return to_uint8(render([scene]))[0]


def with_boards(scene: Scene, change) -> Scene:
    """The scene, each board's periods [P, lamps] changed."""
    sprites = []
    for sprite in scene.sprites:
        on = change(np.array(sprite.board.on))
        sprites.append(replace(sprite, board=replace(sprite.board, on=tuple(tuple(map(bool, lamps)) for lamps in on))))
    return replace(scene, sprites=tuple(sprites))


def redrawn(scene: Scene, seed: int) -> Scene:
    rng = np.random.default_rng(seed)
    return with_boards(scene, lambda on: rng.random(on.shape) < 0.5)


def average(scene: Scene, count: int) -> torch.Tensor:
    clips = torch.stack([clip(redrawn(scene, seed)).float() for seed in range(count)])
    return clips.mean(0).round().to(torch.uint8)


def gray(scene: Scene) -> torch.Tensor:
    """The mean of all boards."""
    return ((clip(scene).float() + clip(with_boards(scene, np.logical_not)).float()) / 2).round().to(torch.uint8)


def fading(scene: Scene) -> torch.Tensor:
    """Frames of a period slide from its picture to the next one's: the sprite of SCENES[1] stands still."""
    frames = clip(scene).float()
    faded = frames.clone()
    for first in range(1, NUM_FRAMES - 4, 4):
        for step in range(4):
            faded[first + step] = frames[first].lerp(frames[first + 4], step / 4)
    return faded.round().to(torch.uint8)


def late(scene: Scene) -> torch.Tensor:
    """Lamps change two frames after the end of a period."""
    return clip(scene)[[max(0, frame - 2) for frame in range(NUM_FRAMES)]]


SPOILS = {
    "an average of sixteen": lambda s: average(s, 16),
    "the mean of all": gray,
    "changing within a period": late,
    "never changing": lambda s: clip(with_boards(s, lambda on: on[:1].repeat(PERIODS, 0))),
    "always changing": lambda s: clip(with_boards(s, lambda on: on[:1] ^ (np.arange(PERIODS)[:, None] % 2 == 1))),
    "boards all alike": lambda s: clip(with_boards(s, lambda on: on[:, :1].repeat(on.shape[1], 1))),
    "all on": lambda s: clip(with_boards(s, np.ones_like)),
    "no lamps": lambda s: clip(replace(s, sprites=tuple(replace(sprite, board=None) for sprite in s.sprites))),
}


@pytest.mark.parametrize("split", ["train", "held_out"])
def test_rendered_lamps_earn_99_after_an_mp4_and_all_else_98(split, through_mp4):
    rng = random.Random(f"lamps/{split}")
    scenes = [random_scene(rng, split, lamps=1.0) for _ in range(12)]
    clips = through_mp4(torch.stack([*map(clip, scenes)]))
    marks = [score_clip(frames, scene) for frames, scene in zip(clips, scenes, strict=True)]
    summary = summarise(marks, resamples=10)
    means = {name: entry["mean"] for name, entry in summary.items()}
    assert set(means) == {*SEMANTIC, *QUALITY, "lamps", "semantic", "quality", "total"}
    assert means["lamps"] >= 99 and min(means.values()) >= 98, means


@pytest.mark.parametrize("spoil", SPOILS)
def test_what_is_not_lamps_earns_next_to_nothing(spoil, through_mp4):
    scene = SCENES[1]
    assert score_clip(through_mp4(clip(scene)), scene)["lamps"] == 1
    assert score_clip(through_mp4(SPOILS[spoil](scene)), scene)["lamps"] < 0.2


def test_fading_lamps_are_marked_down(through_mp4):
    assert score_clip(through_mp4(fading(SCENES[1])), SCENES[1])["lamps"] < 0.7


def test_moving_averages_earn_nothing_either():
    for scene in SCENES:
        assert score_clip(clip(scene), scene)["lamps"] == 1
        assert score_clip(gray(scene), scene)["lamps"] < 0.05


def test_some_unclear_lamps_cost_their_share():
    scene = SCENES[1]
    frames = clip(scene)
    frames[5:9] = gray(scene)[5:9]  # one period of five
    assert score_clip(frames, scene)["lamps"] == pytest.approx(0.8, abs=0.01)


def test_a_caption_and_its_scene_mark_alike_and_a_missing_sprite_has_no_lamps():
    for scene in SCENES:
        assert score_clip(clip(scene), parse(caption(scene, random.Random(0)))) == score_clip(clip(scene), scene)
    nothing = clip(replace(SCENES[0], sprites=(replace(SCENES[0].sprites[0], x=200.0),)))
    assert score_clip(nothing, SCENES[0])["lamps"] == 0


def test_lamps_are_a_quarter_of_quality_where_there_are_any():
    even = dict.fromkeys([name for name in SEMANTIC + QUALITY if name != "pair"], 1.0) | {"motion_smoothness": 0.4}
    plain = summarise([even], resamples=2)
    lit = summarise([even | {"lamps": 0.2}], resamples=2)
    assert plain["quality"]["mean"] == pytest.approx(90) and "lamps" not in plain
    assert lit["quality"]["mean"] == pytest.approx(0.75 * 90 + 0.25 * 20) and lit["semantic"] == plain["semantic"]
    means = {name: np.array([100 * even[name]] * 2) for name in even} | {"lamps": np.array([20.0, np.nan])}
    assert totals(means)["quality"].tolist() == pytest.approx([72.5, 90])


def test_lamps_on_the_wrong_sprite_as_well_cost_all():
    first, second = ("circle", "red", "right"), ("square", "blue", "left")
    both = Scene("black", place_with_lamps(random.Random(3), [first, second], (True, True)))
    meaning = parse(caption(both, random.Random(0)))
    assert score_clip(clip(both), meaning)["lamps"] > 0.95
    one = meaning._replace(sprites=(meaning.sprites[0], meaning.sprites[1]._replace(lamps=False)))
    assert score_clip(clip(both), one)["lamps"] < 0.05
    right = replace(both, sprites=(both.sprites[0], replace(both.sprites[1], board=None)))
    assert score_clip(clip(right), one)["lamps"] > 0.95


def test_plain_prompts_are_scored_as_they_were():
    scene = random_scene(random.Random(0))
    scored = score_clip(clip(scene), scene)
    assert "lamps" not in scored and scored.keys() >= set(QUALITY)


def test_agreement_is_the_share_of_lamps_that_are_the_same_way():
    scorer = SpritesScorer(lamps=True)
    for scene in SCENES:
        prompt, frames = caption(scene, random.Random(0)), clip(scene).numpy()
        other = clip(with_boards(scene, np.logical_not)).numpy()
        assert scorer.agreement(frames, frames, prompt) == 1
        assert scorer.agreement(other, frames, prompt) == 0
        half = clip(with_boards(scene, lambda on: np.concatenate([on[:3], ~on[3:]]))).numpy()
        assert scorer.agreement(half, frames, prompt) == pytest.approx(0.6)
        assert scorer.agreement(gray(scene).numpy(), frames, prompt) == 0
        assert scorer.agreement(frames, gray(scene).numpy(), prompt) is None
        assert scorer.agreement(np.zeros_like(frames) + 255, frames, prompt) == 0
    plain = random_scene(random.Random(0))
    frames = clip(plain).numpy()
    assert scorer.agreement(frames, frames, caption(plain, random.Random(0))) is None


def test_prompts_with_lamps_are_a_set_of_their_own():
    config = BenchmarkConfig(scorer="sprites/lamps")
    prompts = prompts_of(config, 128)
    meanings = [parse(prompt) for prompt in prompts]
    assert all(any(sprite.lamps for sprite in meaning.sprites) for meaning in meanings)
    assert [len(meaning.sprites) for meaning in meanings] == [1, 2] * 64
    assert {sprite[:3] for meaning in meanings for sprite in meaning.sprites} <= set(TRIPLES["held_out"])
    assert prompts[:8] == scorer_named("sprites/lamps").held_out_prompts(8)
    assert not any(" lamps" in prompt for prompt in prompts_of(BenchmarkConfig(scorer="sprites"), 32))
    for i, prompt in enumerate(prompts[:4]):
        assert scorer_named("sprites/lamps").score(SpritesScorer(True).example(prompt, i), prompt)["lamps"] > 0.9
    with pytest.raises(UserError, match="sprites has no prompts called lights"):
        prompts_of(BenchmarkConfig(scorer="sprites/lights"), 1)
    with pytest.raises(UserError, match="scorer"):
        BenchmarkConfig(scorer="sprite/lamps")


def test_a_prompt_for_which_there_is_no_room_has_no_example():
    prompt = "a red circle with blinking lamps growing and a blue square with blinking lamps growing on black"
    assert SpritesScorer(True).example(prompt, 0) is None
