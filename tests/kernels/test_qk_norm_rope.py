import functools

import pytest
import torch
from diffusers.models.embeddings import apply_rotary_emb, get_1d_rotary_pos_embed
from diffusers.models.normalization import RMSNorm
from hypothesis import given
from hypothesis import strategies as st

from tests.kernels.compare import (
    DEVICE,
    DTYPES,
    TOLERANCE,
    assert_close,
    double,
    few_examples,
    gradients,
    normal,
    outputs,
    tangents,
)
from vidaccel.kernels.qk_norm_rope.op import qk_norm_rope
from vidaccel.kernels.qk_norm_rope.reference import qk_norm_rope as reference


def draw(shape, across=False, text=0, dtype=torch.float32, seed=0):
    """q, k, their weights, and if there is text its q, k and weights."""
    B, N, H, D = shape
    weight = (H * D,) if across else (D,)
    shapes = [shape, shape, weight, weight]
    if text:
        shapes += [(B, text, H, D), (B, text, H, D), weight, weight]
    return [normal(*s, dtype=dtype, seed=seed + i) for i, s in enumerate(shapes)]


def angles(tokens, D):
    cos, sin = get_1d_rotary_pos_embed(D, tokens, use_real=True)
    return cos.to(DEVICE), sin.to(DEVICE)


def call(op, cos, sin, **options):
    """The op as a function of its differentiable inputs alone."""

    def run(q, k, q_weight, k_weight, *text):
        c, s = (x.to(torch.promote_types(q.dtype, torch.float32)) for x in (cos, sin))
        return op(q, k, q_weight, k_weight, c, s, text=text or None, **options)

    return run


cases = st.fixed_dictionaries(
    {
        "shape": st.sampled_from([(1, 1, 1, 2), (2, 7, 3, 16), (1, 5, 2, 24), (2, 3, 4, 32)]),
        "rotated": st.sampled_from([0.0, 0.5, 1.0]),
        "across": st.booleans(),
        "text": st.sampled_from([0, 1, 4]),
    }
)


def both(case):
    N, D = case["shape"][1], case["shape"][3]
    cos, sin = angles(int(N * case["rotated"]), D)
    return (
        call(qk_norm_rope, cos, sin, kernels="fused"),
        call(reference, cos, sin),
    )


@few_examples
@given(case=cases, dtype=st.sampled_from(DTYPES))
def test_output(case, dtype):
    fused, exact = both(case)
    inputs = draw(case["shape"], case["across"], case["text"], dtype)
    assert_close(outputs(fused, inputs), outputs(exact, double(inputs)), TOLERANCE[dtype])


@few_examples
@given(case=cases, dtype=st.sampled_from(DTYPES))
def test_gradients(case, dtype):
    """They are the reference's: nothing fused runs where they are asked for."""
    if case["shape"][3] == 2:  # a pair normalises to a direction: nearly nothing is left to differentiate
        return
    fused, exact = both(case)
    inputs = draw(case["shape"], case["across"], case["text"], dtype)
    assert_close(gradients(fused, inputs), gradients(exact, double(inputs)), 2 * TOLERANCE[dtype])


@few_examples
@given(case=cases, dtype=st.sampled_from(DTYPES))
def test_tangents(case, dtype):
    if case["shape"][3] == 2:
        return
    fused, exact = both(case)
    inputs = draw(case["shape"], case["across"], case["text"], dtype)
    directions = draw(case["shape"], case["across"], case["text"], dtype, seed=30)
    directions = [None if i % 4 > 1 else d for i, d in enumerate(directions)]
    expected = tangents(exact, double(inputs), double(directions))
    assert_close(tangents(fused, inputs, directions), expected, 2 * TOLERANCE[dtype])


def test_the_layout_is_that_of_diffusers():
    q, k, q_weight, k_weight = draw((2, 6, 3, 16))
    cos, sin = angles(6, 16)
    norm = RMSNorm(16, eps=1e-6).to(DEVICE)
    norm.weight.data = q_weight
    stock = apply_rotary_emb(norm(q), (cos, sin), sequence_dim=1)
    for kernels in ("reference", "fused"):
        got, _ = qk_norm_rope(q, k, q_weight, k_weight, cos, sin, kernels=kernels)
        assert_close([got], [stock], 1e-6)


def test_strided_inputs():
    cos, sin = angles(3, 16)
    packed = normal(2, 9, 2, 3 * 16)
    q, k, _ = packed.chunk(3, dim=-1)
    weights = draw((1, 1, 2, 16))[2:]
    for inputs in ([q[:, 2:6], k[:, 5:], *weights], [q.mT.contiguous().mT, k, *weights]):
        fused, exact = call(qk_norm_rope, cos, sin, kernels="fused"), call(reference, cos, sin)
        assert_close(outputs(fused, inputs), outputs(exact, double(inputs)), 1e-5)
        assert_close(gradients(fused, inputs), gradients(exact, double(inputs)), 1e-5)


def test_the_op_is_registered_soundly():
    q, k, q_weight, k_weight, *text = draw((2, 4, 2, 16), text=3)
    cos, sin = angles(4, 16)
    inputs = q, k, q_weight, k_weight
    torch.library.opcheck(torch.ops.vidaccel.qk_norm_rope.default, (*inputs, cos, sin, *text, 1e-6))
    torch.library.opcheck(torch.ops.vidaccel.qk_norm_rope.default, (*inputs, cos, sin, *[None] * 4, 1e-6))
    fused = functools.partial(qk_norm_rope, kernels="fused")
    compiled = torch.compile(fused, backend="aot_eager", fullgraph=True)
    for got, expected in zip(compiled(*inputs, cos, sin), fused(*inputs, cos, sin), strict=True):
        assert torch.equal(got, expected)
    got, expected = gradients(call(compiled, cos, sin), inputs), gradients(call(reference, cos, sin), double(inputs))
    assert_close(got, expected, 1e-5)


def test_bad_input_says_what_is_supported():
    q, k, q_weight, k_weight = draw((2, 4, 2, 16))
    cos, sin = angles(5, 16)
    with pytest.raises(ValueError, match="cos turns 5 tokens, but q has 4"):
        qk_norm_rope(q, k, q_weight, k_weight, cos, sin)
    with pytest.raises(ValueError, match=r"expected \(16,\) or \(32,\)"):
        qk_norm_rope(q, k, q_weight[:8], k_weight[:8], cos[:4], sin[:4])
    with pytest.raises(ValueError, match="D even"):
        qk_norm_rope(q[..., :5], k[..., :5], q_weight[:5], k_weight[:5], cos[:4, :5], sin[:4, :5])
    with torch.autograd.forward_ad.dual_level(), pytest.raises(NotImplementedError, match="q_weight"):
        moving = torch.autograd.forward_ad.make_dual(q_weight, q_weight)
        qk_norm_rope(q, k, moving, k_weight, cos[:4], sin[:4], kernels="fused")
