"""Bytes on toys that can be worked out by hand, and on the real sizes."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing._internal.two_tensor import TwoTensor

from vidaccel.bench.measures.memory import activation_bytes, cache_bytes
from vidaccel.bench.sizes import meta_transformer, planned_family, rows
from vidaccel.config.benchmark import BenchmarkConfig
from vidaccel.models.live_bytes import FusedAttention, LiveBytes, weight_bytes


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_live_bytes_of_a_chain(device):
    layers = [nn.Linear(8, 8, bias=False, device=device) for _ in range(2)]
    with torch.no_grad(), LiveBytes() as live:
        x = torch.zeros(10, 8, device=device)  # 320 bytes
        x = layers[0](x)  # 640 until the first is let go
        x = layers[1](x)
        assert live.peak == 640
        kept = x.relu()  # 640: two of them
        assert live.peak == 640
        kept = kept, x.sigmoid()  # 960
        assert live.peak == 960


def test_views_and_in_place_changes_hold_nothing_of_their_own():
    with LiveBytes() as live:
        x = torch.zeros(10, 8, device="meta")
        y = x.view(80)[5:].unsqueeze(0)
        y += 1
        del x
        z = torch.zeros(10, device="meta")  # x's storage lives on in y
        assert live.peak == 320 + 40
        assert (y.shape, z.shape) == ((1, 75), (10,))


def test_fused_attention_keeps_no_scores():
    q = torch.zeros(1, 2, 1000, 4, device="meta")
    with LiveBytes() as live, FusedAttention():
        assert F.scaled_dot_product_attention(q, q, q).shape == q.shape
        assert F.scaled_dot_product_attention(query=q, key=q, value=q).shape == q.shape
    assert live.peak == 2 * 1000 * 4 * 4


def test_quantised_weights_are_what_they_are_made_of():
    two = nn.Linear(8, 8, bias=False, device="meta")
    two.weight = nn.Parameter(TwoTensor(torch.zeros(8, 8), torch.zeros(8, 8)), requires_grad=False)
    assert weight_bytes([two]) == 2 * 256
    with torch.no_grad(), LiveBytes() as live:
        two(torch.zeros(10, 8))
    assert live.peak >= 640


def hunyuan(**sizes) -> BenchmarkConfig:
    return BenchmarkConfig(transformer={"num_layers": 2, "num_single_layers": 3}, **sizes)


def test_caches_of_hunyuan_video():
    config = hunyuan()
    model, family = meta_transformer(config), planned_family(config)
    streams = rows(config, model, (129, 704, 704))
    tokens = (33 * 44 * 44 + 256) * 3072 * 2  # bytes of [video; text] in bfloat16
    held = 33 * 44 * 44 * 128 * 2 * 4 + 256 * 3072 * 2  # cosines and sines in float32, text in bfloat16
    assert cache_bytes(model, family, streams, torch.bfloat16) == {
        "predictor": (tokens, held),
        "linear": (tokens, held),
        "reuse": (tokens, held),
        "taylor": (tokens, held),
        "attention": ((2 + 3) * tokens, 0),
        "branches": ((2 * 2 + 3) * tokens, 0),
        "multistep": (2 * 16 * 33 * 88 * 88 * 2, 0),  # latents and velocities, in bfloat16
    }
    assert tokens == pytest.approx(0.39e9, rel=0.02)


def test_activations_grow_with_tokens_and_not_with_depth():
    config = hunyuan()
    model, family = meta_transformer(config), planned_family(config)
    few, many = (activation_bytes(model, family, rows(config, model, size)) for size in ((5, 64, 64), (129, 704, 704)))
    assert many > 100 * few
    deeper = meta_transformer(BenchmarkConfig(transformer={"num_layers": 4, "num_single_layers": 5}))
    assert activation_bytes(deeper, family, rows(config, deeper, (129, 704, 704))) == many
    # at the least residual, normed tokens, MLP of width 4 D before and after its activation function: 10 D a token
    assert 10 <= many / ((33 * 44 * 44 + 256) * 3072 * 2) <= 25


def test_a_mask_of_every_pair_is_seen():
    config = BenchmarkConfig(
        family="hunyuan_video_15",
        transformer={"num_layers": 1},
        compression=[4, 16],
        text_tokens={"prompt": 1000, "glyphs": 256, "image": 729},
    )
    model, family = meta_transformer(config), planned_family(config)
    streams = rows(config, model, (121, 480, 848))
    assert activation_bytes(model, family, streams) > 2 * streams["all"] ** 2
