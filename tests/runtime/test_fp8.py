"""Layers in fp8 against float64, and whole models against their own plain layers: on a CPU, where PyTorch has products
of scaled rows too."""

import copy
from collections import Counter

import pytest
import torch
from diffusers.models.attention import FeedForward
from torch import nn

from tests.runtime import test_fuse as models
from vidaccel.bench.measures.counting import Flops
from vidaccel.cache.trunk import Trunk
from vidaccel.families.registry import FAMILIES
from vidaccel.forecasters.learned import new_predictor
from vidaccel.kernels.quantize_rows.reference import Rows, quantize_rows
from vidaccel.models.unchanged import trunk_sample
from vidaccel.runtime import compiled, fp8
from vidaccel.runtime.fp8 import Fp8Linear, quantize_layers
from vidaccel.runtime.fuse import fuse
from vidaccel.runtime.offload import offload_trunk
from vidaccel.runtime.quantized import quantize_blocks

CASES = {
    "hunyuan_video": models.CASES["hunyuan-video, texts of two lengths"],
    "hunyuan_video_15": models.CASES["hunyuan-video-1.5, one text"],
    "wan": models.CASES["wan"],
}


def error(got, expected):
    return ((got.double() - expected.double()).norm() / expected.double().norm()).item()


def plain(rows: Rows):
    return rows.values.double() * rows.scales.double()[..., None]


def linear(inputs, outputs, bias=True):
    torch.manual_seed(inputs)
    return nn.Linear(inputs, outputs, bias=bias).requires_grad_(False)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(16,), (7,), (2, 5), (1, 3, 1)])
def test_a_layer_is_the_product_of_what_its_rows_stand_for(shape, bias):
    layer = linear(32, 48, bias)
    ours, x = Fp8Linear(layer), torch.randn(*shape, 32)
    weight = plain(Rows(ours.weight, ours.scales))
    assert ours.weight.dtype == torch.float8_e4m3fn and not any(p.requires_grad for p in ours.parameters())
    assert ((weight - layer.weight).abs() <= layer.weight.abs() / 16 + ours.scales[:, None] / 1024).all()
    assert torch.allclose(plain(Rows(ours.weight, ours.scales)).abs().amax(1), layer.weight.double().abs().amax(1))
    expected = plain(quantize_rows(x)) @ weight.t() + (layer.bias.double() if bias else 0)
    got = ours(x)
    assert got.dtype == torch.float32 and got.shape == (*shape, 48)
    assert error(got, expected) < 1e-6
    assert 1e-3 < error(got, layer(x)) < 0.06
    assert torch.equal(ours(ours.rows(x)), got)


def test_results_are_of_the_type_that_the_weight_had():
    layer = linear(32, 16).bfloat16()
    x = torch.randn(3, 32)
    got = Fp8Linear(layer)(x.bfloat16())
    assert got.dtype == torch.bfloat16 and error(got, layer.float()(x)) < 0.06


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_cast_leaves_its_own_types_and_changes_that_of_its_results(dtype):
    """`pipe.to(dtype)` is called on whatever is in a pipeline."""
    layer, x = Fp8Linear(nn.Linear(32, 48).bfloat16()), torch.randn(5, 32).bfloat16()
    expected, before = layer(x), {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    layer.to(dtype)
    after = layer.state_dict()
    assert all(after[name].dtype == tensor.dtype and after[name].equal(tensor) for name, tensor in before.items())
    assert layer(x).dtype == dtype and layer(x).equal(expected.to(dtype))
    assert layer.to("meta").weight.device.type == "meta"


def test_the_second_layer_of_a_feed_forward_takes_the_gelu():
    torch.manual_seed(0)
    stock = FeedForward(32, activation_fn="gelu-approximate").requires_grad_(False)
    x = torch.randn(2, 5, 32)
    blocks = nn.ModuleList([copy.deepcopy(stock)])
    names = set(blocks.state_dict())
    quantize_layers(blocks, ["0.net.0.proj", "0.net.2"], "reference")
    assert {name for name in blocks.state_dict() if "scales" not in name} == names
    ours = blocks[0]
    assert ours.net[2].gelu and not ours.net[0].proj.gelu
    inner = ours.net[0](x)  # before its GELU
    expected = plain(quantize_rows(inner, gelu=True)) @ plain(Rows(ours.net[2].weight, ours.net[2].scales)).t()
    assert error(ours(x), expected + stock.net[2].bias) < 1e-5
    assert error(ours(x), stock(x)) < 0.08


@pytest.mark.parametrize("activation", ["gelu", "geglu", "linear-silu"])
def test_another_activation_stays_where_it_is(activation):
    torch.manual_seed(0)
    stock = FeedForward(32, activation_fn=activation).requires_grad_(False)
    blocks = nn.ModuleList([copy.deepcopy(stock)])
    quantize_layers(blocks, ["0.net.2"], "reference")
    assert not blocks[0].net[2].gelu
    x = torch.randn(2, 5, 32)
    assert error(blocks[0](x), stock(x)) < 0.06


@pytest.fixture
def seen(monkeypatch):
    """What was quantised: how often each kind."""
    found = Counter()

    def counted(x, *, left=None, gelu=False, kernels="auto"):
        found[left is not None, gelu] += 1
        return quantize_rows(x, left, gelu)

    monkeypatch.setattr(fp8, "quantize_rows", counted)
    return found


@torch.no_grad()
@pytest.mark.parametrize("name", CASES)
def test_a_model_in_fp8_is_near_the_plain_one_and_fused_blocks_quantise_what_they_normalise(name, seen):
    make, inputs = CASES[name]
    model = make()
    expected = models.run(model, inputs)
    taken = quantize_blocks(model, FAMILIES[name], "fp8")
    assert len(taken) == sum(isinstance(module, Fp8Linear) for module in model.modules()) > 0
    stock = models.run(model, inputs)
    often = seen.copy()
    seen.clear()
    with fuse(model, "reference"):
        fused = models.run(model, inputs)
    assert 1e-4 < error(stock, expected) < 0.1
    assert error(fused, stock) < 0.03
    assert seen[False, True] == often[False, True] > 0  # the GELU in feed-forwards of both
    # What fused blocks leave to the layers: both outputs of a double stream's attention, in a single one attention and
    # GELU together; Wan's two outputs of attention, and its text, which keys and values take one by one.
    left = {"hunyuan_video": (2, 2), "hunyuan_video_15": (2 * 2, 0), "wan": (2 * 4, 0)}[name]
    assert (seen[False, False], seen[True, True]) == left
    stock = {"hunyuan_video": 10 + 2 * 5, "hunyuan_video_15": 2 * 10, "wan": 2 * 9}[name]
    assert (often[False, False], often[True, True]) == (stock, 0)


@torch.no_grad()
@pytest.mark.parametrize(("name", "backend"), [("hunyuan_video", "eager"), ("wan", "aot_eager")])
def test_it_compiles_without_a_break_and_gives_the_same(name, backend, monkeypatch):
    monkeypatch.setattr(compiled, "BACKEND", backend)
    torch._dynamo.reset()
    make, inputs = CASES[name]
    model = make()
    quantize_blocks(model, FAMILIES[name], "fp8")
    fuse(model, "reference")
    expected = models.run(model, inputs)
    compiled.compile_blocks(model, FAMILIES[name])
    assert error(models.run(model, inputs), expected) < 1e-2


@torch.no_grad()
def test_a_predictor_goes_on_top_unquantised_and_weights_wait_elsewhere():
    make, inputs = CASES["wan"]
    model, family = make().bfloat16(), FAMILIES["wan"]
    before = trunk_sample(model, family)
    inputs = inputs | {name: inputs[name].bfloat16() for name in ("hidden_states", "encoder_hidden_states")}
    with Trunk(model, family) as trunk:
        with trunk.full():
            models.run(model, inputs)
        tokens = trunk.memory()[0].tokens
    predictor = new_predictor(model, family, tokens, tokens, blocks=1)
    quantize_blocks(model, family, "fp8")
    assert trunk_sample(model, family).keys() == {name for name in before if "norm" in name} != before.keys()
    predictor.run_like(model)
    held = {p.dtype for p in predictor.blocks.parameters()}
    assert held <= {torch.bfloat16, torch.float32} and torch.bfloat16 in held
    expected = models.run(model, inputs)
    offload_trunk(model, family, torch.device("cpu"))
    with Trunk(model, family) as trunk:
        with trunk.full(0.6):
            assert torch.equal(models.run(model, inputs), expected)
        with trunk.predicted(predictor, 0.5):
            assert models.run(model, inputs).isfinite().all()


@torch.no_grad()
def test_products_are_counted_as_those_of_plain_layers():
    layer, x = linear(32, 48), torch.randn(2, 5, 32)
    for counted in (layer, Fp8Linear(layer)):
        with Flops() as counter:
            counted(x)
        assert counter.total == 2 * 10 * 32 * 48


@torch.no_grad()
def test_adapters_run_beside_layers_in_fp8():
    peft = pytest.importorskip("peft")
    make, inputs = CASES["wan"]
    model = make()
    model.add_adapter(peft.LoraConfig(r=16, target_modules=["to_q", "net.2"], init_lora_weights=False))
    expected = models.run(model, inputs)
    taken = quantize_blocks(model, FAMILIES["wan"], "fp8")
    assert "blocks.0.attn1.to_q.base_layer" in taken and not any(".lora_" in name for name in taken)
    assert 1e-4 < error(models.run(model, inputs), expected) < 0.15
    with fuse(model, "reference"):
        assert error(models.run(model, inputs), expected) < 0.15
