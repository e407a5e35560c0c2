import functools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.kernels.compare import (
    DTYPES,
    TOLERANCE,
    assert_close,
    assert_rows_close,
    double,
    few_examples,
    gradients,
    normal,
    outputs,
    tangents,
)
from vidaccel.kernels.adaln.reference import adaln
from vidaccel.kernels.gated_residual_adaln.op import gated_residual_adaln, gated_residual_adaln_rows
from vidaccel.kernels.gated_residual_adaln.reference import gated_residual_adaln as reference

fused = functools.partial(gated_residual_adaln, kernels="fused")
shapes = st.tuples(st.integers(1, 3), st.sampled_from([1, 2, 7, 33]), st.sampled_from([1, 3, 16, 63, 130]))


def draw(shape, dtype=torch.float32, seed=0, size=1.0):
    """x, y [B, N, D], gate, scale, shift [B, D]."""
    B, _, D = shape
    stream = [normal(*shape, dtype=dtype, seed=seed + i, size=size) for i in range(2)]
    return stream + [normal(B, D, dtype=dtype, seed=seed + 2 + i) for i in range(3)]


@few_examples
@given(shape=shapes, dtype=st.sampled_from(DTYPES), seed=st.integers(0, 9))
def test_output(shape, dtype, seed):
    inputs = draw(shape, dtype, seed)
    assert_close(outputs(fused, inputs), outputs(reference, double(inputs)), TOLERANCE[dtype])


@few_examples
@given(shape=shapes, dtype=st.sampled_from(DTYPES), seed=st.integers(0, 9))
def test_gradients(shape, dtype, seed):
    """They are the reference's: nothing fused runs where they are asked for."""
    if shape[2] < 3:  # one entry normalises to zero and two to a sign: nothing is left to differentiate
        return
    inputs = draw(shape, dtype, seed)
    assert_close(gradients(fused, inputs), gradients(reference, double(inputs)), 2 * TOLERANCE[dtype])


@few_examples
@given(shape=shapes, dtype=st.sampled_from(DTYPES), moving=st.lists(st.booleans(), min_size=5, max_size=5))
def test_tangents(shape, dtype, moving):
    if shape[2] < 3 or not any(moving):
        return
    inputs, directions = draw(shape, dtype), draw(shape, dtype, seed=50)
    directions = [d if moves else None for d, moves in zip(directions, moving, strict=True)]
    expected = tangents(reference, double(inputs), double(directions))
    assert_close(tangents(fused, inputs, directions), expected, 2 * TOLERANCE[dtype])


def test_large_magnitudes_keep_float32_accuracy():
    inputs = draw((2, 5, 48), size=1e6)
    assert_close(outputs(fused, inputs), outputs(reference, double(inputs)), 1e-5)


def test_rows_may_lie_anywhere_in_memory():
    x, y, *vectors = draw((2, 9, 24))
    modulation = torch.cat(vectors, dim=1).chunk(3, dim=1)
    strided = y.transpose(1, 2).contiguous().transpose(1, 2)
    for inputs in ([x[:, 2:7], y[:, 4:], *modulation], [x[:1].expand(2, -1, -1), strided, *modulation]):
        assert_close(outputs(fused, inputs), outputs(reference, double(inputs)), 1e-5)
        assert_close(gradients(fused, inputs), gradients(reference, double(inputs)), 1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1, 16), (2, 7, 63)])
def test_rows_in_float8_are_near_float64(shape, dtype):
    inputs = draw(shape, dtype)
    for kernels in ("fused", "reference"):
        h, rows = gated_residual_adaln_rows(*inputs, kernels=kernels)
        assert torch.equal(h, gated_residual_adaln(*inputs, kernels=kernels)[0])
        assert_rows_close(rows, adaln(h.double(), *double(inputs[3:])))


def test_the_op_is_registered_soundly():
    inputs = draw((2, 3, 16))
    torch.library.opcheck(torch.ops.vidaccel.gated_residual_adaln.default, (*inputs, 1e-6))
    torch.library.opcheck(torch.ops.vidaccel.gated_residual_adaln_rows.default, (*inputs, 1e-6))
    compiled = torch.compile(fused, backend="aot_eager", fullgraph=True)
    assert all(torch.equal(a, b) for a, b in zip(compiled(*inputs), fused(*inputs), strict=True))
    assert_close(gradients(compiled, inputs), gradients(reference, double(inputs)), 1e-5)


def test_the_gradient_of_a_tangent_is_refused():
    x, *others = draw((1, 2, 8))
    with torch.autograd.forward_ad.dual_level(), pytest.raises(NotImplementedError, match="no_grad"):
        fused(torch.autograd.forward_ad.make_dual(x.requires_grad_(), x.detach()), *others)


def test_bad_input_says_what_is_supported():
    x, y, *vectors = draw((2, 3, 8))
    with pytest.raises(ValueError, match=r"y has shape \(2, 2, 8\), expected \(2, 3, 8\)"):
        fused(x, y[:, 1:], *vectors)
    with pytest.raises(ValueError, match="float32, float16, bfloat16"):
        fused(x.double(), y, *vectors)
    with pytest.raises(ValueError, match="rows of up to 8192, not 8200; use kernels=reference"):
        fused(*draw((1, 1, 8200)))
