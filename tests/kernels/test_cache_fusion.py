import functools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.kernels.compare import DTYPES, TOLERANCE, assert_close, double, few_examples, gradients, normal, outputs
from vidaccel.kernels.cache_fusion.op import cache_fusion
from vidaccel.kernels.cache_fusion.reference import cache_fusion as reference

fused = functools.partial(cache_fusion, kernels="fused")
shapes = st.tuples(
    st.integers(1, 2), st.sampled_from([1, 5, 70]), st.sampled_from([1, 24, 64]), st.sampled_from([1, 9, 64])
)


def draw(shape, dtype=torch.float32, seed=0):
    """tokens, cache [B, N, K], weight [D, 2 K], bias [D]."""
    B, N, K, D = shape
    shapes = [(B, N, K), (B, N, K), (D, 2 * K), (D,)]
    sizes = [1.0, 1.0, (2 * K) ** -0.5, 1.0]
    return [normal(*s, dtype=dtype, seed=seed + i, size=f) for i, (s, f) in enumerate(zip(shapes, sizes, strict=True))]


@few_examples
@given(shape=shapes, dtype=st.sampled_from(DTYPES), seed=st.integers(0, 9))
def test_output(shape, dtype, seed):
    inputs = draw(shape, dtype, seed)
    assert_close(outputs(fused, inputs), outputs(reference, double(inputs)), TOLERANCE[dtype])


@few_examples
@given(shape=shapes, dtype=st.sampled_from(DTYPES), seed=st.integers(0, 9))
def test_gradients(shape, dtype, seed):
    inputs = draw(shape, dtype, seed)
    assert_close(gradients(fused, inputs), gradients(reference, double(inputs)), 2 * TOLERANCE[dtype])


def test_strided_inputs():
    tokens, cache, weight, bias = draw((2, 12, 24, 16))
    for inputs in (
        [tokens[:, 3:9], cache[:, 6:], weight, bias],
        [tokens.mT.contiguous().mT, cache, weight.mT.contiguous().mT, bias],
    ):
        assert_close(outputs(fused, inputs), outputs(reference, double(inputs)), 1e-5)


def test_the_op_is_registered_soundly():
    tokens, cache, weight, bias = (tensor.requires_grad_() for tensor in draw((1, 5, 8, 6)))
    flat = (tokens.detach()[0].requires_grad_(), cache.detach()[0], weight, bias)
    torch.library.opcheck(torch.ops.vidaccel.cache_fusion.default, (*flat, True))
    compiled = torch.compile(fused, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(tokens, cache, weight, bias), fused(tokens, cache, weight, bias))


def test_bad_input_says_what_is_supported():
    tokens, cache, weight, bias = draw((1, 5, 8, 6))
    with pytest.raises(ValueError, match=r"weight has shape \(6, 15\), expected \(6, 16\)"):
        fused(tokens, cache, weight[:, 1:], bias)
    with pytest.raises(ValueError, match="one type"):
        fused(tokens, cache.half(), weight, bias)
    with torch.autograd.forward_ad.dual_level(), pytest.raises(NotImplementedError, match="tokens"):
        fused(torch.autograd.forward_ad.make_dual(tokens, tokens), cache, weight, bias)
