"""Fused blocks with reference ops against the stock blocks of diffusers; tests/kernels does the same with fused ops."""

import pytest
import torch
from diffusers import HunyuanVideo15Transformer3DModel, HunyuanVideoTransformer3DModel, WanTransformer3DModel
from torch import nn

from vidaccel.errors import UserError
from vidaccel.families.hunyuan_video import HUNYUAN_VIDEO
from vidaccel.runtime.fuse import fuse
from vidaccel.runtime.text_padding import trim_text


def hunyuan_video():
    torch.manual_seed(0)
    return HunyuanVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=1,
        num_single_layers=2,
        num_refiner_layers=1,
        text_embed_dim=12,
        pooled_projection_dim=8,
        rope_axes_dim=(4, 6, 6),
    ).eval()


def hunyuan_video_15():
    torch.manual_seed(0)
    return HunyuanVideo15Transformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=2,
        num_refiner_layers=1,
        text_embed_dim=12,
        text_embed_2_dim=10,
        image_embed_dim=6,
        rope_axes_dim=(4, 6, 6),
    ).eval()


def wan(cross_attn_norm=True):
    torch.manual_seed(0)
    return WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        text_dim=12,
        freq_dim=16,
        ffn_dim=48,
        num_layers=2,
        cross_attn_norm=cross_attn_norm,
        rope_max_seq_len=16,
    ).eval()


def hunyuan_video_inputs(lengths=(5, 3), padded=8):
    torch.manual_seed(1)
    B = len(lengths)
    return {
        "hidden_states": torch.randn(B, 4, 2, 4, 6),
        "timestep": torch.full((B,), 500.0),
        "encoder_hidden_states": torch.randn(B, padded, 12),
        "encoder_attention_mask": torch.arange(padded) < torch.tensor(lengths)[:, None],
        "pooled_projections": torch.randn(B, 8),
        "guidance": torch.full((B,), 6000.0),
    }


def hunyuan_video_15_inputs(lengths=(5, 3), second=(2, 2), image=True):
    torch.manual_seed(1)
    B = len(lengths)
    return {
        "hidden_states": torch.randn(B, 4, 2, 4, 6),
        "timestep": torch.full((B,), 500.0),
        "encoder_hidden_states": torch.randn(B, 8, 12),
        "encoder_attention_mask": torch.arange(8) < torch.tensor(lengths)[:, None],
        "encoder_hidden_states_2": torch.randn(B, 4, 10),
        "encoder_attention_mask_2": torch.arange(4) < torch.tensor(second)[:, None],
        "image_embeds": torch.randn(B, 3, 6) * image,
    }


def wan_inputs(tokenwise=False):
    torch.manual_seed(1)
    return {
        "hidden_states": torch.randn(2, 4, 2, 4, 6),
        "timestep": torch.full((2, 12) if tokenwise else (2,), 500.0),
        "encoder_hidden_states": torch.randn(2, 7, 12),
    }


CASES = {
    "hunyuan-video, texts of two lengths": (hunyuan_video, hunyuan_video_inputs()),
    "hunyuan-video, one text": (hunyuan_video, hunyuan_video_inputs(lengths=(5,))),
    "hunyuan-video-1.5, texts of two lengths": (hunyuan_video_15, hunyuan_video_15_inputs()),
    "hunyuan-video-1.5, one text": (hunyuan_video_15, hunyuan_video_15_inputs((5,), (2,))),
    "hunyuan-video-1.5, no image, no second text": (hunyuan_video_15, hunyuan_video_15_inputs((5,), (0,), image=False)),
    "wan": (wan, wan_inputs()),
    "wan, no norm before cross-attention": (lambda: wan(False), wan_inputs()),
    "wan, a timestep a token": (wan, wan_inputs(tokenwise=True)),
}


def run(model, inputs):
    return model(**inputs).sample


@pytest.mark.parametrize("case", CASES)
def test_the_fused_model_equals_the_stock_model(case):
    make, inputs = CASES[case]
    model = make()
    with torch.no_grad():
        expected = run(model, inputs)
        with fuse(model, "reference"):
            torch.testing.assert_close(run(model, inputs), expected, rtol=1e-4, atol=2e-6)
        assert torch.equal(run(model, inputs), expected)


@pytest.mark.parametrize("case", ["hunyuan-video, texts of two lengths", "wan"])
def test_gradients_equal_those_of_the_stock_model(case):
    make, inputs = CASES[case]
    model = make()

    def gradients():
        model.zero_grad()
        run(model, inputs).square().mean().backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    expected = gradients()
    fuse(model, "reference")
    got = gradients()
    assert got.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(got[name], gradient, rtol=1e-3, atol=1e-6, msg=name)


@pytest.mark.parametrize("make", [hunyuan_video, hunyuan_video_15, wan])
def test_checkpoints_keep_their_layout_and_restore_leaves_nothing(make):
    model = make()
    before = {name: (type(module), set(vars(module))) for name, module in model.named_modules()}
    processors = dict(model.attn_processors)
    weights = {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}
    fusion = fuse(model, "reference")
    assert {name: tensor.data_ptr() for name, tensor in model.state_dict().items()} == weights
    assert set(model.attn_processors) == set(processors)
    fusion.restore()
    fusion.restore()
    assert {name: (type(module), set(vars(module))) for name, module in model.named_modules()} == before
    assert dict(model.attn_processors) == processors
    assert not model._forward_pre_hooks


def test_a_model_without_fused_blocks_is_an_error_only_if_asked_for():
    model = nn.Sequential(nn.Linear(2, 2))
    with pytest.raises(UserError, match="no block of Sequential"):
        fuse(model, "fused")
    fuse(model, "reference").restore()


def test_hooked_blocks_are_refused():
    model = hunyuan_video()
    model.transformer_blocks[0].forward = model.transformer_blocks[0].forward
    with pytest.raises(UserError, match="already carry hooks"):
        fuse(model, "reference")
    del model.transformer_blocks[0].forward
    trim_text(model, HUNYUAN_VIDEO)
    with pytest.raises(UserError, match="already carry hooks"):
        fuse(model, "reference")
