import math
import random
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch

from vidaccel.bench.measures.quality import fidelity
from vidaccel.worlds.sprites import scoring
from vidaccel.worlds.sprites.captions import caption
from vidaccel.worlds.sprites.detect import detect
from vidaccel.worlds.sprites.parse import Meaning, SpriteMeaning, parse
from vidaccel.worlds.sprites.render import render, to_uint8
from vidaccel.worlds.sprites.score import QUALITY, SEMANTIC, score_clip, summarise, totals
from vidaccel.worlds.sprites.scoring import SpritesScorer
from vidaccel.worlds.sprites.world import BACKGROUNDS, COLOURS, NUM_FRAMES, SHAPES, Scene, Sprite, random_scene

MIDDLE = NUM_FRAMES // 2

MOVING = (
    Scene("black", (Sprite("circle", "red", "right", 20.0, 32.0, 8.0),)),
    Scene("gray", (Sprite("square", "yellow", "up", 32.0, 44.0, 7.5),)),
    Scene("white", (Sprite("cross", "blue", "growing", 32.0, 30.0, 8.0),)),
    Scene(
        "white",
        (
            Sprite("triangle", "magenta", "left", 50.0, 16.0, 8.0),
            Sprite("cross", "green", "shrinking", 20.0, 44.0, 8.0),
        ),
    ),
)
PAIRS = tuple(random_scene(random.Random(seed), "held_out", pair_share=1.0) for seed in range(4))


def clip(scene: Scene) -> torch.Tensor:
    return to_uint8(render([scene]))[0]


def redrawn(scene: Scene, **change: Callable[[str], str]) -> torch.Tensor:
    """The clip of the same scene with an attribute of each sprite changed."""
    sprites = (replace(s, **{name: of(getattr(s, name)) for name, of in change.items()}) for s in scene.sprites)
    return clip(replace(scene, sprites=tuple(sprites)))


def following(values) -> Callable[[str], str]:
    values = tuple(values)
    return lambda value: values[(values.index(value) + 1) % len(values)]


def blurred(scene: Scene, sigma: float = 1.5) -> torch.Tensor:
    offsets = torch.arange(-5.0, 6.0)
    kernel = torch.exp(-(offsets**2) / (2 * sigma**2))
    kernel = (kernel[:, None] * kernel / kernel.sum() ** 2).expand(3, 1, 11, 11)
    padded = torch.nn.functional.pad(clip(scene).movedim(-1, 1).float(), (5, 5, 5, 5), mode="replicate")
    return torch.nn.functional.conv2d(padded, kernel, groups=3).movedim(1, -1).round().to(torch.uint8)


def flickering(scene: Scene) -> torch.Tensor:
    """Every other frame 15 % darker."""
    frames = clip(scene).float()
    frames[::2] *= 0.85
    return frames.to(torch.uint8)


def blinking(scene: Scene) -> torch.Tensor:
    frames = clip(scene)
    frames[1::2] = torch.tensor(BACKGROUNDS[scene.background], dtype=torch.uint8)
    return frames


def noisy(scene: Scene) -> torch.Tensor:
    noise = 20 * torch.randn(NUM_FRAMES, 64, 64, 3, generator=torch.Generator().manual_seed(0))
    return (clip(scene) + noise).clamp(0, 255).to(torch.uint8)


def drifting(scene: Scene) -> torch.Tensor:
    """The background slides 40 levels towards the middle while the clip runs."""
    slide = torch.linspace(0, 40, NUM_FRAMES).view(-1, 1, 1, 1)
    return (clip(scene) + (slide if scene.background == "black" else -slide)).clamp(0, 255).to(torch.uint8)


def jittering(scene: Scene) -> torch.Tensor:
    """The whole picture jumps by four pixels and back, every other frame."""
    frames = clip(scene)
    frames[::2] = frames[::2].roll(4, dims=2)
    return frames


def empty(scene: Scene) -> torch.Tensor:
    return clip(scene)[:, :1, :1].expand(-1, 64, 64, -1).contiguous()


# What is done to a clip, and how many points of 100 the dimensions must lose at least.
SPOILS = {
    "frozen": (lambda s: clip(s)[:1].repeat(NUM_FRAMES, 1, 1, 1), {"dynamic_degree": 90, "motion": 90}),
    "half the speed": (lambda s: clip(s)[torch.arange(NUM_FRAMES) // 2], {"dynamic_degree": 40}),
    "backwards": (lambda s: clip(s).flip(0), {"dynamic_degree": 90, "motion": 90}),
    "blurred": (blurred, {"imaging_quality": 50}),
    "noisy": (noisy, {"imaging_quality": 30}),
    "flickering": (flickering, {"temporal_flicker": 40}),
    "blinking": (blinking, {"temporal_flicker": 90, "subject_consistency": 40, "motion_smoothness": 40}),
    "background drifts": (drifting, {"background_consistency": 20}),
    "jittering": (jittering, {"motion_smoothness": 50}),
    "colour changes midway": (
        lambda s: torch.cat([clip(s)[:MIDDLE], redrawn(s, colour=following(COLOURS))[MIDDLE:]]),
        {"subject_consistency": 40, "colour": 90},
    ),
    "shape changes midway": (
        lambda s: torch.cat([clip(s)[:MIDDLE], redrawn(s, shape=following(SHAPES))[MIDDLE:]]),
        {"subject_consistency": 40, "shape": 90},
    ),
    "empty background": (
        empty,
        dict.fromkeys(("shape", "colour", "motion", "subject_consistency", "imaging_quality", "dynamic_degree"), 90),
    ),
    "another background": (
        lambda s: clip(replace(s, background=following(BACKGROUNDS)(s.background))),
        {"background": 100},
    ),
    "another colour": (lambda s: redrawn(s, colour=following(COLOURS)), {"colour": 100}),
    "another shape": (lambda s: redrawn(s, shape=following(SHAPES)), {"shape": 100}),
}  # fmt: skip


def scores(scenes, draw, through_mp4) -> dict[str, float]:
    clips = through_mp4(torch.stack([*map(draw, scenes)]))
    marks = [score_clip(frames, scene) for frames, scene in zip(clips, scenes, strict=True)]
    return {name: entry["mean"] for name, entry in summarise(marks, resamples=10).items()}


@pytest.fixture(scope="module")
def true_marks(through_mp4):
    return scores(MOVING, clip, through_mp4)


@pytest.fixture(scope="module")
def true_pair_marks(through_mp4):
    return scores(PAIRS, clip, through_mp4)


@pytest.mark.parametrize("split", ["train", "held_out"])
def test_rendered_clips_earn_98_in_every_dimension_after_an_mp4(split, through_mp4):
    rng = random.Random(split)
    summary = scores([random_scene(rng, split) for _ in range(40)], clip, through_mp4)
    assert set(summary) == {*SEMANTIC, *QUALITY, "semantic", "quality", "total"}
    assert min(summary.values()) >= 98, summary


@pytest.mark.parametrize("spoil", SPOILS)
def test_a_spoiled_clip_loses_where_it_should_and_in_total(spoil, through_mp4, true_marks):
    draw, losses = SPOILS[spoil]
    spoiled = scores(MOVING, draw, through_mp4)
    for name, points in losses.items():
        assert true_marks[name] - spoiled[name] >= points, (name, spoiled)
    assert true_marks["total"] - spoiled["total"] >= 3, spoiled


@pytest.mark.parametrize("spoil", ["blurred", "noisy", "flickering", "another colour", "another shape"])
def test_other_dimensions_keep_their_marks(spoil, through_mp4, true_marks):
    draw, losses = SPOILS[spoil]
    spoiled = scores(MOVING, draw, through_mp4)
    for name in {"colour", "motion", "background", "motion_smoothness", "dynamic_degree"} - set(losses):
        assert spoiled[name] >= true_marks[name] - 5, (name, spoiled)


def test_a_missing_second_sprite_costs_half_of_all_and_the_whole_pair(through_mp4, true_pair_marks):
    alone = scores(PAIRS, lambda s: clip(replace(s, sprites=s.sprites[:1])), through_mp4)
    assert alone["pair"] == 0
    for name in ("shape", "colour", "motion", "subject_consistency", "imaging_quality", "dynamic_degree"):
        assert alone[name] == pytest.approx(true_pair_marks[name] / 2, abs=2)
    assert true_pair_marks["total"] - alone["total"] >= 30


@pytest.mark.parametrize("name", ["colour", "shape", "motion"])
def test_attributes_swapped_between_two_sprites_are_wrong(name, through_mp4, true_pair_marks):
    def swapped(scene: Scene) -> torch.Tensor:
        one, other = scene.sprites
        sprites = replace(one, **{name: getattr(other, name)}), replace(other, **{name: getattr(one, name)})
        return clip(replace(scene, sprites=sprites))

    scenes = [Scene(s.background, _apart(s)) for s in PAIRS]
    spoiled = scores(scenes, swapped, through_mp4)
    assert (spoiled[name], spoiled["pair"]) == (0, 0)
    assert true_pair_marks["semantic"] - spoiled["semantic"] >= 35
    assert spoiled["total"] < true_pair_marks["total"] - 5


def _apart(scene: Scene) -> tuple[Sprite, Sprite]:
    """The scene's two sprites, one growing above and one moving right below, wherever their motions go."""
    one, other = scene.sprites
    return replace(one, motion="growing", x=32.0, y=14.0), replace(other, motion="right", x=20.0, y=48.0)


def test_a_sprite_too_many_counts_as_wrong():
    pair = Scene("gray", MOVING[3].sprites)
    scored = score_clip(clip(pair), replace(pair, sprites=pair.sprites[:1]))
    assert (scored["shape"], scored["colour"], scored["motion"]) == (0.5, 0.5, 0.5)
    assert "pair" not in scored


def test_standing_still_is_scored_down_for_moving():
    moving = Scene("black", (Sprite("circle", "red", "right", 20.0, 32.0, 8.0),))
    still = replace(moving, sprites=(replace(moving.sprites[0], motion="still"),))
    assert score_clip(clip(still), still)["dynamic_degree"] > 0.99
    assert score_clip(clip(moving), still)["dynamic_degree"] < 0.01


def test_a_caption_and_its_scene_mark_alike():
    for scene in (*MOVING, *PAIRS):
        assert score_clip(clip(scene), parse(caption(scene, random.Random(0)))) == score_clip(clip(scene), scene)


def test_noise_alone_earns_nothing_to_speak_of():
    frames = np.random.default_rng(0).integers(0, 256, (NUM_FRAMES, 64, 64, 3), dtype=np.uint8)
    scored = score_clip(frames, Meaning("black", (SpriteMeaning("circle", "red", "right"),)))
    assert all(0 <= score <= 1 for score in scored.values())
    assert summarise([scored])["total"]["mean"] < 25


def test_frames_of_another_type_are_refused():
    with pytest.raises(ValueError, match="frames must be uint8"):
        score_clip(np.zeros((17, 64, 64, 3), np.float32), MOVING[0])


def even_scores(**scores: float) -> dict[str, float]:
    return dict.fromkeys([name for name in SEMANTIC + QUALITY if name != "pair"], 1.0) | scores


def test_a_summary_is_the_means_of_means():
    summary = summarise([even_scores(shape=0.0), even_scores(pair=0.5, motion_smoothness=0.4)])
    assert summary["shape"]["mean"] == 50 and summary["pair"]["mean"] == 50
    assert summary["semantic"]["mean"] == pytest.approx((50 + 100 + 100 + 100 + 50) / 5)
    assert summary["quality"]["mean"] == pytest.approx(95)
    assert summary["total"]["mean"] == pytest.approx((4 * 95 + 80) / 5)


def test_a_dimension_that_no_clip_has_is_left_out():
    summary = summarise([even_scores(), even_scores()])
    assert "pair" not in summary
    assert all(entry == {"mean": 100, "low": 100, "high": 100} for entry in summary.values())


def test_intervals_are_those_of_a_proportion_and_follow_the_seed():
    """Of 400 prompts 90 % right: 1.96 sqrt(0.9 0.1 / 400) = 2.94 points either side."""
    clips = [even_scores(shape=float(i % 10 > 0), pair=1.0) for i in range(400)]
    summary = summarise(clips)
    assert summary["shape"]["mean"] == pytest.approx(90)
    assert summary["shape"]["low"] == pytest.approx(90 - 2.94, abs=0.6)
    assert summary["shape"]["high"] == pytest.approx(90 + 2.94, abs=0.6)
    assert summary["total"]["low"] == pytest.approx(100 - 10 / 25 - 2.94 / 25, abs=0.05)
    assert summarise(clips) == summary != summarise(clips, seed=1)


def test_prompts_that_mean_the_same_are_one_observation():
    """Each of 100 made four times over says no more than once: twice as wide."""
    clips = [even_scores(shape=float(i % 100 > 9)) for i in range(400)]
    once, apart = summarise(clips, [str(i % 100) for i in range(400)])["shape"], summarise(clips)["shape"]
    assert once["mean"] == apart["mean"] == pytest.approx(90)
    assert (once["high"] - once["low"]) / (apart["high"] - apart["low"]) == pytest.approx(2, rel=0.1)


def test_totals_of_arrays_are_those_of_a_summary():
    clips = [even_scores(shape=0.25), even_scores(pair=0.5, motion_smoothness=0.4)]
    means = {name: entry["mean"] for name, entry in summarise(clips, resamples=2).items()}
    dimensions = {name: np.array([mean, np.nan if name == "pair" else mean]) for name, mean in means.items()}
    found = totals({name: dimensions[name] for name in SEMANTIC + QUALITY})
    assert {name: found[name][0] for name in found} == pytest.approx({name: means[name] for name in found})
    assert found["semantic"][1] == pytest.approx((62.5 + 3 * 100) / 4)


def test_what_prompts_mean_and_which_are_for_choosing():
    scorer = SpritesScorer()
    one, other = "A red circle moving left on black", "on a black background, a red circle that moves to the left"
    assert scorer.meaning(one) == scorer.meaning(other) == "black; circle red left"
    lit = "a red circle with blinking lamps moving left on black"
    assert scorer.meaning(lit) == "black; circle red left lamps"
    held_out, choosing = (set(map(scorer.meaning, p(200))) for p in (scorer.held_out_prompts, scorer.choosing_prompts))
    assert not held_out & choosing


def test_sharper_scores_of_renders_and_of_what_is_wrong():
    for scene in (*MOVING, *PAIRS):
        scored = score_clip(clip(scene), scene)
        assert scored["all_right"] == scored["frames_right"] == 1 and 0.51 < scored["margin"] < 0.75
    scene = MOVING[0]
    wrong = score_clip(redrawn(scene, shape=following(SHAPES)), scene)
    assert wrong["all_right"] == wrong["frames_right"] == 0 and wrong["margin"] < 0.5
    half = torch.cat([clip(scene)[:MIDDLE], redrawn(scene, shape=following(SHAPES))[MIDDLE:]])
    assert score_clip(half, scene)["frames_right"] == pytest.approx(MIDDLE / NUM_FRAMES)
    nothing = score_clip(empty(scene), scene)
    assert (nothing["margin"], nothing["frames_right"], nothing["all_right"]) == (0, 0, 0)
    assert score_clip(clip(PAIRS[0]), replace(PAIRS[0], sprites=PAIRS[0].sprites[:1]))["all_right"] == 0  # one too many


def test_a_margin_falls_where_a_shape_becomes_less_clear():
    scene = MOVING[2]
    margins = [score_clip(frames, scene)["margin"] for frames in (clip(scene), blurred(scene), blurred(scene, 3.0))]
    assert margins == sorted(margins, reverse=True) and margins[0] - 0.5 > 1.1 * (margins[2] - 0.5)


def test_examples_show_what_the_prompt_says_and_are_measured_once(monkeypatch):
    scorer, calls = SpritesScorer(), []
    monkeypatch.setattr(scoring, "detect", lambda frames, lamps: calls.append(1) or detect(frames, lamps))
    for i, prompt in enumerate(scorer.held_out_prompts(6)):
        frames = scorer.example(prompt, i)
        assert scorer.score(frames, prompt)["all_right"] == 1
        points = np.array(scorer.features(frames, prompt))
        assert points.shape == (1 + i % 2, 11) and 0 < np.abs(points).max() < 5
        assert np.array_equal(frames, scorer.example(prompt, i)) and not np.array_equal(
            frames, scorer.example(prompt, 9)
        )
    assert len(calls) == 6
    assert scorer.features(empty(MOVING[0]).numpy(), caption(MOVING[0], random.Random(0))) == [[0.0] * 11]


def test_fidelity_of_known_errors():
    generator = torch.Generator().manual_seed(0)
    latent = torch.randn(1, 4, 5, 8, 8, generator=generator)
    frames = clip(MOVING[1])
    same = fidelity(latent, latent, frames, frames)
    assert same == {"latent_relative_l2": 0, "psnr": math.inf, "ssim": pytest.approx(1)}
    off = fidelity(1.1 * latent, latent, frames.numpy() // 2 + 10, frames.numpy() // 2)
    assert off["latent_relative_l2"] == pytest.approx(0.1, rel=1e-4)
    assert off["psnr"] == pytest.approx(20 * math.log10(255 / 10), rel=1e-4)
    assert 0.8 < off["ssim"] < 1
