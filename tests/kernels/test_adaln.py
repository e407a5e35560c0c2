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
from vidaccel.kernels.adaln.op import adaln, adaln_rows
from vidaccel.kernels.adaln.reference import adaln as reference

fused = functools.partial(adaln, kernels="fused")
shapes = st.tuples(st.integers(1, 3), st.sampled_from([1, 2, 7, 33]), st.sampled_from([1, 3, 16, 63, 130]))


def draw(shape, dtype=torch.float32, seed=0, size=1.0):
    B, _, D = shape
    return [
        normal(*shape, dtype=dtype, seed=seed, size=size),
        normal(B, D, dtype=dtype, seed=seed + 1),
        normal(B, D, dtype=dtype, seed=seed + 2),
    ]


@few_examples
@given(shape=shapes, dtype=st.sampled_from(DTYPES), seed=st.integers(0, 9))
def test_output(shape, dtype, seed):
    inputs = draw(shape, dtype, seed)
    assert_close(outputs(fused, inputs), outputs(reference, double(inputs)), TOLERANCE[dtype])


@few_examples
@given(shape=shapes, dtype=st.sampled_from(DTYPES), seed=st.integers(0, 9))
def test_gradients(shape, dtype, seed):
    if shape[2] < 3:  # one entry normalises to zero and two to a sign: nothing is left to differentiate
        return
    inputs = draw(shape, dtype, seed)
    assert_close(gradients(fused, inputs), gradients(reference, double(inputs)), 2 * TOLERANCE[dtype])


@few_examples
@given(shape=shapes, dtype=st.sampled_from(DTYPES), moving=st.lists(st.booleans(), min_size=3, max_size=3))
def test_tangents(shape, dtype, moving):
    if shape[2] < 3 or not any(moving):
        return
    inputs, directions = draw(shape, dtype), draw(shape, dtype, seed=5)
    directions = [d if moves else None for d, moves in zip(directions, moving, strict=True)]
    expected = tangents(reference, double(inputs), double(directions))
    assert_close(tangents(fused, inputs, directions), expected, 2 * TOLERANCE[dtype])


def test_large_magnitudes_keep_float32_accuracy():
    inputs = draw((2, 5, 48), size=1e6)
    assert_close(outputs(fused, inputs), outputs(reference, double(inputs)), 1e-5)


def test_rows_may_lie_anywhere_in_memory():
    x, scale, shift = draw((2, 9, 24))
    modulation = torch.cat([scale, shift], dim=1)
    for strided in (x[:, 2:7], x.transpose(1, 2).contiguous().transpose(1, 2), x[:1].expand(2, -1, -1)):
        inputs = [strided, *modulation.chunk(2, dim=1)]
        assert_close(outputs(fused, inputs), outputs(reference, double(inputs)), 1e-5)
        assert_close(gradients(fused, inputs), gradients(reference, double(inputs)), 1e-5)


def test_the_tangent_under_torch_func_is_the_same():
    inputs, directions = tuple(draw((1, 4, 16))), tuple(draw((1, 4, 16), seed=5))
    with torch.no_grad():
        got = torch.func.jvp(fused, inputs, directions)
    assert_close(got, tangents(fused, inputs, directions), 1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1, 16), (2, 7, 63)])
def test_rows_in_float8_are_near_float64(shape, dtype):
    inputs = draw(shape, dtype)
    wanted = reference(*double(inputs))
    for kernels in ("fused", "reference"):
        assert_rows_close(adaln_rows(*inputs, kernels=kernels), wanted)


def test_the_op_is_registered_soundly():
    x, scale, shift = draw((2, 3, 16))
    leaves = tuple(tensor.requires_grad_() for tensor in (x, scale, shift))
    torch.library.opcheck(torch.ops.vidaccel.adaln.default, (*leaves, 1e-6))
    torch.library.opcheck(torch.ops.vidaccel.adaln_rows.default, (*draw((2, 3, 16)), 1e-6))
    compiled = torch.compile(fused, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x, scale, shift), fused(x, scale, shift))
    assert fused(x.to("meta"), scale.to("meta"), shift.to("meta")).shape == x.shape


def test_the_gradient_of_a_tangent_is_refused():
    x, scale, shift = draw((1, 2, 8))
    with torch.autograd.forward_ad.dual_level(), pytest.raises(NotImplementedError, match="no_grad"):
        fused(torch.autograd.forward_ad.make_dual(x.requires_grad_(), x.detach()), scale, shift)


def test_bad_input_says_what_is_supported():
    x, scale, shift = draw((2, 3, 8))
    with pytest.raises(ValueError, match=r"scale has shape \(1, 8\), expected \(2, 8\)"):
        fused(x, scale[:1], shift)
    with pytest.raises(ValueError, match="float32, float16, bfloat16"):
        fused(x.double(), scale, shift)
    with pytest.raises(ValueError, match="one device, not on .* and meta"):
        fused(x, scale, shift.to("meta"))
    with pytest.raises(ValueError, match=r"\[B, N, D\]"):
        fused(x[0], scale, shift)
    with pytest.raises(ValueError, match="rows of up to 8192, not 8200; use kernels=reference"):
        fused(*draw((1, 1, 8200)))
