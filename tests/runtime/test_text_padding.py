"""Text cut to its length and masks dropped, on the models of test_fuse.py: the same outputs without the padding."""

import copy

import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from tests.runtime.test_fuse import (
    CASES,
    hunyuan_video,
    hunyuan_video_15,
    hunyuan_video_15_inputs,
    hunyuan_video_inputs,
)
from tests.runtime.test_fuse import run as call
from vidaccel.cache.trunk import Trunk
from vidaccel.errors import UserError
from vidaccel.families.registry import FAMILIES
from vidaccel.forecasters.learned import new_predictor
from vidaccel.runtime.fuse import fuse
from vidaccel.runtime.text_padding import cut, trim_text

BY_CLASS = {family.transformer: family for family in FAMILIES.values() if not family.conditions}


def trimmed(model, need=None):
    return trim_text(model, BY_CLASS[type(model).__name__], need)


class Masks(TorchFunctionMode):
    """Notes the key lengths and masks that attention is called with."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is nn.functional.scaled_dot_product_attention and "key" in kwargs:  # the text refiner's has no names
            self.seen.append((kwargs["key"].shape[2], kwargs["attn_mask"] is not None))
        return func(*args, **(kwargs or {}))


def attention_calls(model, inputs):
    with torch.no_grad(), Masks() as masks:
        call(model, inputs)
    return masks.seen


def test_the_cut_is_to_the_last_token_that_a_sample_uses():
    text = torch.arange(12.0).reshape(2, 6, 1)
    mask = torch.tensor([[1, 1, 0, 0, 0, 0], [1, 1, 1, 0, 0, 0]])
    shorter, left, dense = cut(text, mask)
    assert shorter.flatten().tolist() == [0, 1, 2, 6, 7, 8] and left.tolist() == [[1, 1, 0], [1, 1, 1]] and not dense
    _, left, dense = cut(text[1:], mask[1:])
    assert left.tolist() == [[1, 1, 1]] and dense
    assert cut(text, torch.tensor([[0, 1, 0, 0, 0, 0]] * 2))[1:][1] is False  # a hole: still to be masked
    assert cut(text, torch.zeros(2, 6))[0].shape == (2, 0, 1)
    assert cut(text, torch.zeros(2, 6), least=1)[1].tolist() == [[0], [0]]


@pytest.mark.parametrize("fused", [False, True], ids=["stock", "fused"])
@pytest.mark.parametrize("case", CASES)
def test_the_output_is_the_same(case, fused):
    make, inputs = CASES[case]
    model = make()
    with torch.no_grad():
        expected = call(model, inputs)
        fusion = fuse(model, "reference") if fused else None
        padding = trimmed(model)
        torch.testing.assert_close(call(model, inputs), expected, rtol=1e-4, atol=2e-6)
        padding.remove()
        padding.remove()
        if fusion:
            fusion.restore()
        assert torch.equal(call(model, inputs), expected)


@pytest.mark.parametrize("make", [hunyuan_video, hunyuan_video_15])
def test_removal_leaves_nothing(make):
    model = make()
    before = {name: set(vars(module)) for name, module in model.named_modules()}
    processors = dict(model.attn_processors)
    trimmed(model).remove()
    assert {name: set(vars(module)) for name, module in model.named_modules()} == before
    assert dict(model.attn_processors) == processors
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("fused", [False, True], ids=["stock", "fused"])
def test_the_mask_is_dropped_where_nothing_is_left_to_mask(fused):
    model = hunyuan_video()
    assert attention_calls(model, hunyuan_video_inputs((5, 5))) == [(20, True)] * 3
    if fused:
        fuse(model, "reference")
    trimmed(model)
    assert attention_calls(model, hunyuan_video_inputs((5, 5))) == [(17, False)] * 3
    assert attention_calls(model, hunyuan_video_inputs((5, 3))) == [(17, True)] * 3
    assert attention_calls(model, hunyuan_video_inputs((8, 8))) == [(20, False)] * 3


def test_hunyuan_video_15_attends_to_one_text_without_padding_and_without_the_missing_image():
    model = hunyuan_video_15()
    inputs = hunyuan_video_15_inputs((5,), (2,), image=False)
    video = inputs["hidden_states"][0, 0].numel()
    assert attention_calls(model, inputs) == [(video + 8 + 4 + 3, True)] * 2
    trimmed(model)
    assert attention_calls(model, inputs) == [(video + 5 + 2, False)] * 2


def test_inputs_may_come_by_position():
    model = hunyuan_video()
    inputs = hunyuan_video_inputs((5,))
    trimmed(model)
    with torch.no_grad():
        assert torch.equal(model(*inputs.values(), return_dict=False)[0], call(model, inputs))


def test_blocks_computed_again_see_the_mask_of_their_own_pass():
    model = hunyuan_video().train()
    batches = [hunyuan_video_inputs((5, 3)), hunyuan_video_inputs((5, 5))]

    def gradients():
        model.zero_grad()
        outputs = [call(model, inputs) for inputs in batches]  # both, then both backwards
        sum(output.square().mean() for output in outputs).backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    expected = gradients()
    model.enable_gradient_checkpointing()
    trimmed(model)
    got = gradients()
    for name, gradient in expected.items():
        torch.testing.assert_close(got[name], gradient, rtol=1e-3, atol=1e-6, msg=name)


def test_a_predictor_sees_what_the_trunk_sees():
    model, family = hunyuan_video(), BY_CLASS["HunyuanVideoTransformer3DModel"]
    inputs = hunyuan_video_inputs((5,))

    with torch.no_grad(), Trunk(model, family) as trunk:
        with trunk.full():
            call(model, inputs)
        tokens = trunk.memory()[0].tokens
        predictor = new_predictor(model, family, tokens, tokens, blocks=2)
        torch.manual_seed(0)
        for parameter in predictor.blocks.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))

    def sampled():
        with torch.no_grad(), Trunk(model, family) as trunk:
            with trunk.full(0.6):
                call(model, inputs)
            with trunk.predicted(predictor, 0.5), Masks() as masks:
                return call(model, inputs), masks.seen

    expected, seen = sampled()
    assert seen == [(20, True)] * 2
    trimmed(model)
    got, seen = sampled()
    assert seen == [(17, False)] * 2
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-5)


def test_a_copy_trims_on_its_own():
    model = hunyuan_video()
    trimmed(model)
    double = copy.deepcopy(model)
    assert attention_calls(double, hunyuan_video_inputs((5, 5))) == [(17, False)] * 3


def test_a_batch_that_needs_a_mask_is_refused_where_none_is_taken():
    model = hunyuan_video()
    trimmed(model, need="attention=flash")
    call(model, hunyuan_video_inputs((5, 5)))
    with pytest.raises(UserError, match="attention=flash takes no mask, and the texts of this batch differ") as error:
        call(model, hunyuan_video_inputs((5, 3)))
    assert "one by one" in error.value.hint
