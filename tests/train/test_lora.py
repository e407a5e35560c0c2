"""Adapters on the real transformer classes, tiny and random."""

import copy
import importlib
import sys

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F

from tests.tiny import tiny_pipeline
from vidaccel.config.training import TrainConfig
from vidaccel.errors import UserError
from vidaccel.train.lora import add_lora, merge_lora
from vidaccel.train.trainer import train

RANK = 3
BLOCKS = {"hunyuan_video": ("transformer_blocks", "single_transformer_blocks"), "wan": ("blocks",)}
CONFIG = TrainConfig(steps=4, learning_rate=0.05, warmup=0, ema_decay=0.5, save_every=2, lora_rank=RANK)


@pytest.fixture(scope="module")
def pipelines():
    return {name: tiny_pipeline(name) for name in BLOCKS}


@pytest.fixture(params=BLOCKS)
def name(request):
    return request.param


@pytest.fixture
def plain(pipelines, name):
    return copy.deepcopy(pipelines[name].transformer)


def blocks(model, name):
    return [block for attribute in BLOCKS[name] for block in getattr(model, attribute)]


def velocity(model, name, seed=0):
    """The output of a transformer for two random videos and texts."""
    generator = torch.Generator().manual_seed(seed)
    x, text = torch.randn(2, 4, 2, 4, 4, generator=generator), torch.randn(2, 6, 32, generator=generator)
    t = 1000 * torch.rand(2, generator=generator)
    if name == "wan":
        return model(x, t, text, return_dict=False)[0]
    mask, pooled = torch.ones(2, 6), torch.randn(2, 32, generator=generator)
    return model(x, t, text, mask, pooled, return_dict=False)[0]


def adapted(model, name):
    """`model` with adapters that are no longer zero."""
    add_lora(model, blocks(model, name), RANK, seed=5)
    torch.manual_seed(1)
    for p in model.parameters():
        if p.requires_grad:
            nn.init.normal_(p, std=0.2)
    return model


@torch.no_grad()
def test_fresh_adapters_change_nothing_and_alone_are_trained(plain, name):
    before = velocity(plain, name)
    add_lora(plain, blocks(plain, name), RANK, seed=5)
    assert torch.equal(velocity(plain, name), before)
    trained = {n: p for n, p in plain.named_parameters() if p.requires_grad}
    assert all("lora_" in n and p.dtype == torch.float32 and RANK in p.shape for n, p in trained.items())
    assert {n for n, _ in plain.named_parameters() if "lora_" in n} == trained.keys()


def test_where_adapters_sit(plain, name):
    """Wan: two attentions of four linears and two of the feed-forward, twice. HunyuanVideo: eight of attention and two
    of each feed-forward in the double block; q, k, v, the way into the feed-forward and the way out in two single."""
    add_lora(plain, blocks(plain, name), RANK, seed=5)
    with_adapter = [n for n, module in plain.named_modules() if hasattr(module, "lora_A")]
    assert len(with_adapter) == {"wan": 2 * 10, "hunyuan_video": 12 + 2 * 5}[name]
    assert not any("norm" in n or "embed" in n for n in with_adapter)


@torch.no_grad()
def test_an_adapted_layer_is_its_formula(plain, name):
    model = adapted(plain, name)
    layer = next(module for module in model.modules() if hasattr(module, "lora_A"))
    x = torch.randn(4, layer.in_features, dtype=torch.float64)
    base, a, b = layer.base_layer, layer.lora_A["default"].weight.double(), layer.lora_B["default"].weight.double()
    expected = F.linear(x, base.weight.double() + b @ a, base.bias.double())
    torch.testing.assert_close(layer(x.float()).double(), expected, rtol=1e-4, atol=1e-5)


def test_the_same_seed_gives_the_same_adapters(pipelines, name):
    models = [copy.deepcopy(pipelines[name].transformer) for _ in range(3)]
    state = torch.get_rng_state()
    for model, seed in zip(models, (5, 5, 6), strict=True):
        add_lora(model, blocks(model, name), RANK, seed=seed)
    assert torch.equal(torch.get_rng_state(), state)
    one, same, other = (
        torch.cat([p.flatten() for n, p in m.named_parameters() if "lora_A" in n]).detach() for m in models
    )
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def test_adapters_of_a_half_precision_model_are_float32(plain, name):
    model = plain.to(torch.bfloat16)
    add_lora(model, blocks(model, name), RANK, seed=5)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert {p.dtype for n, p in model.named_parameters() if "lora_" not in n} >= {torch.bfloat16}


@torch.no_grad()
def test_merged_output_is_the_adapters_output(plain, pipelines, name):
    fresh = pipelines[name].transformer
    model = adapted(plain, name)
    expected = velocity(model, name)
    merge_lora(model)
    assert [n for n, _ in model.named_parameters()] == [n for n, _ in fresh.named_parameters()]
    assert not any(p.requires_grad for p in model.parameters())
    torch.testing.assert_close(velocity(model, name), expected, rtol=1e-4, atol=1e-5)
    assert (expected - velocity(fresh, name)).abs().max() > 0.01
    fresh_again = type(fresh).from_config(model.config)
    fresh_again.load_state_dict(model.state_dict())  # so save_pretrained and from_pretrained work as ever


def test_training_changes_and_keeps_the_adapters_alone(plain, pipelines, name, tmp_path):
    add_lora(plain, blocks(plain, name), RANK, seed=5)

    def loss(model, index, generator):
        return velocity(model, name, index).square().mean(), {}

    train(plain, loss, CONFIG, tmp_path, seed=0, title="adapters", settings={})
    base = {n.replace(".base_layer", ""): p for n, p in plain.named_parameters() if "lora_" not in n}
    for n, p in pipelines[name].transformer.named_parameters():
        assert torch.equal(base[n], p)
    adapters = {n for n, p in plain.named_parameters() if p.requires_grad}
    checkpoint = tmp_path / "checkpoints" / "step-00000004"
    for file in ("model", "ema"):
        assert load_file(checkpoint / f"{file}.safetensors").keys() == adapters
    assert all("lora_" in key for key in load_file(checkpoint / "optimizer.safetensors"))
    assert any(p.abs().max() > 0 for n, p in plain.named_parameters() if "lora_B" in n)


def test_without_peft_the_package_to_install_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    monkeypatch.delitem(sys.modules, "vidaccel.train.lora")
    with pytest.raises(UserError, match="adapters need peft") as error:
        importlib.import_module("vidaccel.train.lora")
    assert "vidaccel[train]" in error.value.hint


def test_a_rank_without_adapters_is_refused(tmp_path):
    with pytest.raises(UserError, match="a lora_rank of 3, but this training has no adapters"):
        train(nn.Linear(2, 1), lambda *_: None, CONFIG, tmp_path, seed=0, title="none", settings={})
