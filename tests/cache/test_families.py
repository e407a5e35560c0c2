"""The trunk hook on the real transformers of all families, called as training calls them."""

import pytest
import torch

from tests.tiny import ONE_DENOISER, tiny_pipeline
from vidaccel.cache.trunk import Trunk
from vidaccel.families.registry import family_of_pipeline
from vidaccel.forecasters.learned import new_predictor
from vidaccel.models.velocity import Velocity

FAMILIES = ONE_DENOISER


@pytest.fixture(params=FAMILIES)
def velocity(request):
    pipe = tiny_pipeline(request.param)
    pipe.transformer.requires_grad_(False)
    return Velocity(pipe.transformer, family_of_pipeline(type(pipe).__name__))


def inputs(velocity, seed=0):
    """x, t and texts of two lengths."""
    draw, text = torch.Generator().manual_seed(seed), {}
    for tensor in velocity.family.text_tensors:
        if "mask" in tensor.stored:
            text[tensor.stored] = torch.arange(6) < torch.tensor([[5], [3]])
        else:
            text[tensor.stored] = torch.randn((2, 32) if tensor.stored == "pooled" else (2, 6, 32), generator=draw)
    config = velocity.transformer.config
    for condition in velocity.family.conditions:
        channels = config.in_channels - config.out_channels, 2, 4, 4
        text[condition.stored] = torch.randn(2, *((5, 16) if condition.argument else channels), generator=draw)
    if velocity.family.name == "wan_i2v":  # whose blocks take all but the last 512 tokens for the image's
        text["prompt_embeds"] = torch.randn(2, 512, 32, generator=draw)
    x = torch.randn(2, config.out_channels, 2, 4, 4, generator=draw)
    return x, torch.tensor([0.5, 0.7]), text


def trained(velocity, trunk):
    """A predictor whose weights are large enough to matter."""
    with torch.no_grad(), trunk.full():
        velocity(*inputs(velocity))
    tokens = trunk.memory()[0].tokens
    predictor = new_predictor(velocity.transformer, velocity.family, tokens, tokens)
    for parameter in predictor.parameters():
        torch.nn.init.normal_(parameter, std=0.2, generator=torch.Generator().manual_seed(parameter.numel()))
    return predictor


@torch.no_grad()
def test_a_full_pass_is_the_transformers_own_and_leaves_what_the_last_block_returned(velocity):
    x, t, text = inputs(velocity)
    kind, returned = velocity.family.block_lists[-1], []
    last = getattr(velocity.transformer, kind.name)[-1]
    handle = last.register_forward_hook(lambda block, inputs, output: returned.append(output))
    expected = velocity(x, t, text)
    with Trunk(velocity.transformer, velocity.family) as trunk:
        with trunk.full():
            assert torch.equal(velocity(x, t, text), expected)
        tokens = trunk.memory()[0].tokens
        with trunk.predicted(lambda arguments, memory, t: memory[0].tokens):
            assert torch.equal(velocity(x, t, text), expected)
    handle.remove()
    left = returned[0] if isinstance(returned[0], tuple) else returned[:1]
    assert tuple(tokens) == kind.returns
    assert all(torch.equal(a, b) for a, b in zip(tokens.values(), left, strict=True))
    assert torch.equal(velocity(x, t, text), expected)


def test_recomputed_activations_change_no_gradient_in_either_mode(velocity):
    """With both modes in one loss, and neither in force when backward runs."""
    (x, t, text), before = inputs(velocity), inputs(velocity, seed=1)[0]

    def gradients():
        start = x.clone().requires_grad_()
        with torch.no_grad(), trunk.full(t + 0.1):
            velocity(before, t, text)
        with trunk.predicted(predictor, t):
            u = velocity(start, t, text)
        with trunk.full():
            judged = velocity(start - 0.1 * u, t, text)
        (u.square().mean() + judged.square().mean()).backward()
        found = {name: p.grad for name, p in predictor.named_parameters() if p.grad is not None}
        predictor.zero_grad()
        return {"x": start.grad} | found

    with Trunk(velocity.transformer, velocity.family) as trunk:
        predictor = trained(velocity, trunk)
        expected = gradients()
        velocity.transformer.enable_gradient_checkpointing()
        velocity.transformer.train()
        got = gradients()
    assert got.keys() == expected.keys() and len(got) > 10
    for name, gradient in expected.items():
        torch.testing.assert_close(got[name], gradient, msg=name)
