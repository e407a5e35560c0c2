"""The discriminator: hinge losses by hand, layers that change no faster than their input, gradients that go one way."""

import pytest
import torch
from torch import nn

from tests.tiny import CALLS, TEXT_TO_VIDEO, tiny_pipeline
from vidaccel.collect.encode import encode_texts
from vidaccel.config.predictor import DiscriminatorConfig
from vidaccel.errors import UserError
from vidaccel.families.registry import family_of_pipeline
from vidaccel.families.walk import blocks_of
from vidaccel.models.loading import LoadedPipeline
from vidaccel.models.velocity import Text, Velocity
from vidaccel.train.predictor.discriminator import (
    Discriminator,
    Head,
    SpectralLinear,
    discriminator_hinge,
    predictor_hinge,
    token_grid,
    trunk_features,
)

GRID = (2, 3, 5)


def discriminator(**changes) -> Discriminator:
    torch.manual_seed(0)
    return Discriminator(8, DiscriminatorConfig(depths=[0.5, 1.0], scales=[1, 2, 4], width=6, **changes))


def features(batch: int = 2) -> list[torch.Tensor]:
    torch.manual_seed(1)
    return [torch.randn(batch, 30, 8), 50 * torch.randn(batch, 30, 8)]


def student(name: str, **options) -> tuple[Velocity, torch.Tensor, Text]:
    """A tiny frozen student, latents [2, ...] for it, and text."""
    pipe = tiny_pipeline(name, **options)
    family = family_of_pipeline(type(pipe).__name__)
    call = CALLS.get(name, {})
    text = encode_texts(LoadedPipeline(pipe, family, "tiny", call, {}), ["a red circle", "a square"])
    torch.manual_seed(2)
    return Velocity(pipe.transformer.requires_grad_(False), family), torch.randn(2, 4, 2, 4, 4), text


# Mathematics


def test_hinge_losses_by_hand():
    real = [torch.tensor([2.0, 0.5]), torch.tensor([-1.0])]
    fake = [torch.tensor([-3.0, 0.0]), torch.tensor([1.0])]
    # Heads: mean(0, 0.5) + mean(0, 1) = 0.75, and 2 + 2 = 4.
    assert float(discriminator_hinge(real, fake)) == pytest.approx((0.75 + 4) / 2)
    # max(0, 1 - fake): mean(4, 1) = 2.5, and 0.
    assert float(predictor_hinge(fake)) == pytest.approx(2.5 / 2)


def test_a_layer_has_spectral_norm_1_whatever_its_weight():
    torch.manual_seed(0)
    for scale in (1e-3, 1.0, 1e4):
        layer = SpectralLinear(7, 5).double()
        layer.weight.data.mul_(scale)
        layer.bias.data.zero_()
        matrix = layer(torch.eye(7, dtype=torch.float64)).T.detach()
        assert float(torch.linalg.svdvals(matrix)[0]) == pytest.approx(1, rel=1e-12)
        torch.testing.assert_close(matrix / matrix[0, 0], layer.weight / layer.weight[0, 0])


def test_gradient_of_the_normalised_weight_is_the_derivative():
    torch.manual_seed(0)
    layer = SpectralLinear(4, 3).double()
    x = torch.randn(2, 4, dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda weight: torch.func.functional_call(layer, {"weight": weight}, x), layer.weight
    )


def test_a_head_changes_no_faster_than_its_tokens():
    torch.manual_seed(0)
    head = Head(8, 6, scale=1).double()
    tokens = torch.randn(1, 1, 1, 500, 8, dtype=torch.float64)
    moved = tokens + 1e-3 * torch.randn_like(tokens)
    change = (head(moved, False) - head(tokens, False)).abs().squeeze()
    assert (change <= (moved - tokens).norm(dim=-1).squeeze()).all()


@pytest.mark.parametrize(("scale", "places"), [(1, (3, 5)), (2, (1, 2)), (4, (1, 1))])
def test_a_scale_is_the_mean_of_neighbours(scale, places):
    """4 columns fit 5 once, and 3 rows are all that there are."""
    torch.manual_seed(0)
    head = Head(8, 6, scale)
    tokens = torch.randn(2, 2, 3, 5, 8)
    logits = head(tokens, False)
    assert logits.shape == (2, 2, *places)
    window = tokens[:, :, :scale, :scale].mean(dim=(2, 3), keepdim=True)
    fine = Head(8, 6, 1)
    fine.load_state_dict(head.state_dict())
    torch.testing.assert_close(logits[:, :, :1, :1], fine(window, False))


def test_logits_do_not_see_how_large_tokens_are():
    d, (a, b) = discriminator(), features()
    for one, other in zip(d([a, b], GRID), d([a, 3 * b], GRID), strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


def test_a_frozen_pass_has_the_same_logits_and_no_gradient_for_the_discriminator():
    d = discriminator()
    tokens = [t.requires_grad_() for t in features()]
    plain, frozen = d(tokens, GRID), d(tokens, GRID, frozen=True)
    assert len(plain) == 6
    for one, other in zip(plain, frozen, strict=True):
        assert torch.equal(one, other)
    predictor_hinge(frozen).backward()
    assert all(p.grad is None for p in d.parameters())
    assert all(t.grad.abs().sum() > 0 for t in tokens)


# Features of real transformers


@torch.no_grad()
@pytest.mark.parametrize("name", TEXT_TO_VIDEO)
def test_features_are_the_video_tokens_of_the_blocks_and_leave_no_trace(name):
    velocity, x, text = student(name)
    blocks = blocks_of(velocity.transformer, velocity.family)
    seen = []
    for _, block in blocks:
        block.register_forward_hook(lambda module, inputs, output: seen.append(output))
    hooks = sum(len(block._forward_hooks) for _, block in blocks)
    t = torch.tensor([0.3, 0.6])
    found = trunk_features(velocity, [1 / len(blocks), 1.0], x, t, text, None)
    assert sum(len(block._forward_hooks) for _, block in blocks) == hooks
    expected = [output[0] if isinstance(output, tuple) else output for output in (seen[0], seen[-1])]
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))
    assert found[0].shape[1] == torch.tensor(token_grid(velocity.transformer, x)).prod()


def test_hooks_go_also_when_the_pass_fails():
    velocity, x, text = student("wan")
    with pytest.raises(KeyError):
        trunk_features(velocity, [1.0], x, torch.ones(2), {}, None)
    assert not any(block._forward_hooks for _, block in blocks_of(velocity.transformer, velocity.family))


def test_gradients_reach_the_latent_through_the_frozen_trunk():
    velocity, x, text = student("hunyuan_video")
    x.requires_grad_()
    d = Discriminator(24, DiscriminatorConfig(depths=[0.5], scales=[1, 2]))
    found = trunk_features(velocity, [0.5], x, torch.tensor([0.3, 0.6]), text, None)
    predictor_hinge(d(found, token_grid(velocity.transformer, x), frozen=True)).backward()
    assert x.grad.abs().sum() > 0
    assert all(p.grad is None for p in velocity.parameters())


def test_it_learns_to_tell_two_kinds_of_tokens_apart():
    d = discriminator()
    optimizer = torch.optim.AdamW(d.parameters(), lr=1e-2)
    real, fake = features(8), [t + 1 for t in features(8)]
    fake = [torch.where(torch.arange(8) < 2, t + 2, t) for t in fake]
    losses = []
    for _ in range(25):
        loss = discriminator_hinge(d(real, GRID), d(fake, GRID))
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[0] > 1.8
    assert losses[-1] < 0.8 * losses[0], losses


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"depths": [0.5, 0.25]}, "depths"),
        ({"depths": []}, "depths"),
        ({"depths": [0.5, 1.5]}, "depths"),
        ({"scales": [0]}, "scales"),
        ({"scales": []}, "scales"),
        ({"learning_rate": 0.0}, "learning_rate"),
        ({"weight": -1.0}, "weight"),
        ({"width": 0}, "width"),
    ],
)
def test_impossible_settings_are_refused(change, message):
    with pytest.raises(UserError, match=message):
        DiscriminatorConfig(**change)


def test_it_is_made_of_layers_only():
    """No buffer, such as a running estimate, that a resumed training would not have."""
    assert not list(discriminator().buffers())
    modules = [m for m in discriminator().modules() if next(m.parameters(recurse=False), None) is not None]
    assert {type(m) for m in modules} == {SpectralLinear}
    assert issubclass(SpectralLinear, nn.Linear)
