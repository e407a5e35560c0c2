"""What each latent token shows: labels by hand, and a transformer that learns to name them."""

import random

import pytest
import torch

from vidaccel.worlds.sprites import align
from vidaccel.worlds.sprites.pipeline import build_transformer
from vidaccel.worlds.sprites.settings import TeacherTraining
from vidaccel.worlds.sprites.world import COLOURS, MOTIONS, SHAPES, Scene, Sprite, random_scene

NOTHING = [len(SHAPES), len(COLOURS), len(MOTIONS)]


@pytest.fixture
def aligned():
    torch.manual_seed(0)
    small = TeacherTraining(heads=2, head_dim=16, double_blocks=2, single_blocks=1)
    return align.Aligned(build_transformer(small, 4, 8))


def call(aligned, batch=2):
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(batch, 4, 5, 8, 8, generator=generator)
    text, pooled = torch.randn(batch, 3, 8, generator=generator), torch.randn(batch, 8, generator=generator)
    return latents, torch.full((batch,), 500.0), text, torch.ones(batch, 3), pooled


def test_a_still_square_by_hand():
    """From (16, 0) to (32, 16): all of the second token of the first row, at every time, and none of any other."""
    scene = Scene("gray", (Sprite("square", "blue", "still", 24.0, 8.0, 8.0),))
    labels = align.shown([scene]).view(5, 4, 4, 3)
    assert (labels[:, 0, 1] == torch.tensor([1, 2, 4])).all()
    labels[:, 0, 1] = torch.tensor(NOTHING)
    assert (labels == torch.tensor(NOTHING)).all()


def test_a_moving_sprite_changes_tokens():
    """In the first frame it lies in the third column alone; 20 pixels on, in the last four frames, in the fourth."""
    scene = Scene("black", (Sprite("circle", "red", "right", 40.0, 40.0, 7.0),))
    shapes = align.shown([scene])[0, :, 0].view(5, 4, 4)
    assert (shapes == 0).nonzero().tolist()[0] == [0, 2, 2]
    assert (shapes[0] == 0).sum() == 1
    assert (shapes[4, 2] == 0).tolist() == [False, False, False, True]


def test_a_token_shows_the_sprite_that_covers_more_of_it():
    """The first column's upper token holds all of a square, and five rows of the circle that fills the lower one."""
    upper, lower = Sprite("square", "red", "still", 8.0, 5.0, 5.0), Sprite("circle", "cyan", "still", 8.0, 18.0, 7.0)
    for sprites in [(upper, lower), (lower, upper)]:
        shapes = align.shown([Scene("black", sprites)])[0, :, 0].view(5, 4, 4)
        assert shapes[0, :, 0].tolist() == [1, 0, 4, 4]


def test_scenes_in_a_batch_do_not_mix():
    scenes = [random_scene(random.Random(i)) for i in range(6)]
    together = align.shown(scenes)
    assert together.shape == (6, 80, 3)
    for labels, scene in zip(together, scenes, strict=True):
        assert torch.equal(labels, align.shown([scene])[0])


def test_means_over_tokens():
    """A token's mean over its frames and pixels: of frame 0 the first row of tokens' frames, of 5 to 8 the third."""
    frames = torch.arange(17.0).view(1, 17, 1, 1).expand(1, 17, 64, 64)
    assert align.by_token(frames).view(5, 16)[:, 0].tolist() == [0, 2.5, 6.5, 10.5, 14.5]
    columns = torch.arange(64.0).expand(1, 17, 64, 64)
    assert align.by_token(columns).view(5, 4, 4)[3, 1].tolist() == [7.5, 23.5, 39.5, 55.5]


def test_the_velocity_is_the_transformers_own(aligned):
    inputs = call(aligned)
    velocity, scores = aligned(*inputs)
    assert torch.equal(velocity, aligned.transformer(*inputs, return_dict=False)[0])
    assert scores.shape == (2, 80, sum(NOTHING) + 3)


def test_loss_by_hand():
    """Even scores cost the mean log of the classes; certain and right ones nothing."""
    labels = align.shown([Scene("gray", (Sprite("square", "blue", "still", 24.0, 8.0, 8.0),))])
    even = torch.zeros(1, 80, sum(NOTHING) + 3)
    expected = torch.tensor([n + 1.0 for n in NOTHING]).log().mean()
    torch.testing.assert_close(align.alignment_loss(even, labels), expected)
    offsets = torch.tensor([0, NOTHING[0] + 1, NOTHING[0] + NOTHING[1] + 2])
    certain = even.scatter(2, labels.long() + offsets, 100.0)
    assert align.alignment_loss(certain, labels).item() == pytest.approx(0, abs=1e-6)


def test_its_gradient_reaches_double_blocks_alone(aligned):
    labels = align.shown([random_scene(random.Random(i)) for i in range(2)])
    align.alignment_loss(aligned(*call(aligned))[1], labels).backward()
    reached = {name.split(".")[1] for name, p in aligned.named_parameters() if p.grad is not None and p.grad.any()}
    assert "transformer_blocks" in reached
    assert not reached & {"single_transformer_blocks", "norm_out", "proj_out"}
