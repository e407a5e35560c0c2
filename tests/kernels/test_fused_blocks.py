"""Whole models with fused ops against the stock models: outputs, and the derivative pass along a trajectory."""

import copy

import pytest
import torch
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from tests.kernels.compare import DEVICE, relative_error
from tests.runtime import test_fuse as models
from vidaccel.cache.trunk import Trunk
from vidaccel.families.hunyuan_video import HUNYUAN_VIDEO
from vidaccel.families.wan import WAN
from vidaccel.forecasters.learned import new_predictor
from vidaccel.kernels.attention_jvp.op import AttentionTangents
from vidaccel.runtime.compiled import compile_blocks
from vidaccel.runtime.fuse import fuse
from vidaccel.runtime.quantized import LEAST_CAPABILITY, quantize_blocks

CASES = ("hunyuan-video, texts of two lengths", "hunyuan-video-1.5, one text", "wan")


def build(case):
    make, inputs = models.CASES[case]
    return make().to(DEVICE), {name: tensor.to(DEVICE) for name, tensor in inputs.items()}


@pytest.mark.parametrize("case", CASES)
def test_the_fused_model_equals_the_stock_model(case):
    model, inputs = build(case)
    with torch.no_grad():
        expected = models.run(model, inputs)
        with fuse(model, "fused"):
            assert relative_error(models.run(model, inputs), expected) <= 1e-5


def test_gradients_equal_those_of_the_stock_model():
    model, inputs = build("wan")

    def gradients():
        return torch.autograd.grad(models.run(model, inputs).square().mean(), weights, allow_unused=True)

    weights = list(model.blocks.parameters())
    expected = gradients()
    with fuse(model, "fused"):
        got = gradients()
    for ours, stock in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, stock, rtol=1e-3, atol=1e-6)


@pytest.mark.skipif(
    DEVICE == "cuda" and torch.cuda.get_device_capability() < LEAST_CAPABILITY["fp8"], reason="no products of fp8"
)
@torch.no_grad()
@pytest.mark.parametrize("case", ["hunyuan-video, texts of two lengths", "wan"])
def test_the_fused_model_in_fp8_is_that_of_reference_ops(case):
    model, inputs = build(case)
    if DEVICE == "cuda":  # whose products of fp8 are in bfloat16; Triton's interpreter knows float32
        model = model.bfloat16()
        inputs = {name: x.bfloat16() if x.is_floating_point() and x.ndim > 1 else x for name, x in inputs.items()}
    family = HUNYUAN_VIDEO if "hunyuan" in case else WAN
    quantised = {kernels: copy.deepcopy(model) for kernels in ("reference", "fused")}
    for kernels, each in quantised.items():
        quantize_blocks(each, family, "fp8", kernels)
        fuse(each, kernels)
    got, expected = (models.run(quantised[kernels], inputs) for kernels in ("fused", "reference"))
    assert relative_error(got, expected) <= 0.03


def derivative(model, inputs, direction):
    """d/dt of the model's output as latents move along `direction` and the timestep at rate 1."""
    x, t = inputs["hidden_states"], inputs["timestep"]
    with torch.no_grad(), forward_ad.dual_level():
        moving = {
            "hidden_states": forward_ad.make_dual(x, direction),
            "timestep": forward_ad.make_dual(t, torch.ones_like(t)),
        }
        return forward_ad.unpack_dual(models.run(model, inputs | moving)).tangent


@pytest.mark.parametrize("case", ["hunyuan-video, texts of two lengths", "wan"])
def test_the_derivative_pass_equals_that_of_the_stock_model(case):
    model, inputs = build(case)
    direction = torch.randn_like(inputs["hidden_states"])
    with sdpa_kernel(SDPBackend.MATH):
        expected = derivative(model, inputs, direction)
    with fuse(model, "fused"), AttentionTangents("fused"):
        assert relative_error(derivative(model, inputs, direction), expected) <= 1e-4


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE != "cuda", reason="CUDA graphs need a CUDA device")
def test_cuda_graphs_give_the_same_and_leave_what_is_remembered_alone():
    model, inputs = build("wan")
    later = inputs | {"hidden_states": inputs["hidden_states"] + 0.5}

    def passes():
        """Both predicted passes look back on the same full one, whose graphs ran again in between, unremembered."""
        with trunk.full(0.6):
            full = models.run(model, inputs)
        memory = trunk.memory()
        with trunk.predicted(predictor, 0.5, memory):
            first = models.run(model, later)
        other = models.run(model, later)
        with trunk.predicted(predictor, 0.5, memory):
            return full, first, other, models.run(model, later)

    with torch.no_grad(), fuse(model, "fused"), Trunk(model, WAN) as trunk:
        with trunk.full():
            models.run(model, inputs)
        tokens = trunk.memory()[0].tokens
        predictor = new_predictor(model, WAN, tokens, tokens, blocks=1).run_like(model)
        expected = passes()
    with torch.no_grad(), fuse(model, "fused"):
        compile_blocks(model, WAN)
        with Trunk(model, WAN) as trunk:
            predictor.run_like(model)
            for _ in range(4):  # a graph is warmed up, recorded, then replayed
                for got, wanted in zip(passes(), expected, strict=True):
                    assert relative_error(got, wanted) <= 1e-4
