import functools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.kernels.compare import DEVICE, DTYPES, assert_rows_close, few_examples, normal, relative_error
from vidaccel.kernels.adaln.op import adaln_rows
from vidaccel.kernels.gated_residual_adaln.op import gated_residual_adaln_rows
from vidaccel.kernels.quantize_rows.op import quantize_rows
from vidaccel.kernels.quantize_rows.reference import quantize_rows as reference

fused = functools.partial(quantize_rows, kernels="fused")


def exact(x, left=None, gelu=False):
    """What the rows stand for, in float64."""
    x = x.double()
    if gelu:
        x = 0.5 * x * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)))
    return x if left is None else torch.cat([left.double(), x], dim=-1)


@few_examples
@given(
    shape=st.sampled_from([(1, 1), (7, 3), (2, 5, 16), (3, 63), (1, 9, 130)]),
    beside=st.sampled_from([0, 1, 16, 33]),
    gelu=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    size=st.sampled_from([1e-2, 1.0, 30.0]),
)
def test_rows_are_those_of_the_reference_and_near_float64(shape, beside, gelu, dtype, size):
    x = normal(*shape, dtype=dtype, size=size)
    left = normal(*shape[:-1], beside, dtype=dtype, seed=1) if beside else None
    got, expected = fused(x, left=left, gelu=gelu), reference(x, left, gelu)
    assert_rows_close(got, exact(x, left, gelu))
    assert_rows_close(expected, exact(x, left, gelu))
    # A number that lies between two of float8 may fall to either: a rare step of an eighth.
    assert relative_error(got.values.float(), expected.values.float()) <= (0 if DEVICE == "cpu" and not gelu else 5e-3)


def test_every_number_of_float8_and_every_middle_between_two():
    codes = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()  # 0 to 448
    row = torch.cat([codes, (codes[1:] + codes[:-1]) / 2, -codes]).to(DEVICE)
    assert torch.equal(fused(row[None]).values.float(), row.to(torch.float8_e4m3fn).float()[None])
    assert fused(row[None]).scales.item() == 1


def test_rows_of_zeros_and_of_next_to_nothing():
    x = torch.tensor([[0.0, 0.0], [1e-38, -1e-40], [0.0, 3.0]], device=DEVICE)
    for rows in (fused(x), reference(x)):
        assert rows.scales.tolist() == pytest.approx([1, 1, 3 / 448])
        assert rows.values.float().tolist() == [[0, 0], [0, 0], [0, 448]]


def test_a_large_gelu_neither_overflows_nor_is_cut_off():
    x = torch.tensor([[6e4, -6e4, 0.5]], dtype=torch.float16, device=DEVICE)
    assert_rows_close(fused(x, gelu=True), exact(x, gelu=True))


def test_rows_may_lie_anywhere_in_memory():
    x = normal(2, 9, 24)
    for strided in (x[:, 2:7], x.transpose(1, 2), x[:1].expand(2, -1, -1), x[..., 3:20]):
        assert_rows_close(fused(strided), exact(strided))
        assert_rows_close(fused(strided, left=strided), exact(strided, strided))


def test_the_op_is_registered_soundly():
    x, left = normal(3, 16), normal(3, 8, seed=1)
    for inputs in ((x, None, True), (x, left, False)):
        torch.library.opcheck(torch.ops.vidaccel.quantize_rows.default, inputs)
    compiled = torch.compile(fused, backend="aot_eager", fullgraph=True)
    for got, expected in zip(compiled(x[None], left=left[None]), fused(x[None], left=left[None]), strict=True):
        assert torch.equal(got, expected)
    shapes = [part.shape for part in fused(x.to("meta")[None], left=left.to("meta")[None])]
    assert shapes == [(1, 3, 24), (1, 3)]


def test_bad_input_says_what_is_supported():
    x = normal(2, 3, 8)
    with pytest.raises(ValueError, match=r"left has shape \(1, 3, 8\), expected \(2, 3, 8\)"):
        fused(x, left=x[:1])
    with pytest.raises(ValueError, match="float32, float16, bfloat16"):
        fused(x.double())
    with pytest.raises(ValueError, match="rows of up to 32768, not 32769; use kernels=reference"):
        fused(normal(1, 32768), left=normal(1, 1))
    with (
        torch.autograd.forward_ad.dual_level(),
        pytest.raises(NotImplementedError, match="no forward-mode derivative"),
    ):
        quantize_rows(torch.autograd.forward_ad.make_dual(x, x))


def test_no_tangent_is_dropped_on_the_way_to_float8():
    x, vector = normal(1, 2, 8), normal(1, 8)
    ops = {quantize_rows: ("x", "left"), adaln_rows: ("x", "scale", "shift")}
    ops[gated_residual_adaln_rows] = ("x", "y", "gate", "scale", "shift")
    for op, names in ops.items():
        for moving in names:
            given = {name: vector if name in ("gate", "scale", "shift") else x for name in names}
            with (
                torch.autograd.forward_ad.dual_level(),
                pytest.raises(NotImplementedError, match=f"no forward-mode derivative with respect to {moving};"),
            ):
                op(**given | {moving: torch.autograd.forward_ad.make_dual(given[moving], given[moving])})
