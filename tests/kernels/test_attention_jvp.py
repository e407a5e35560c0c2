import functools
import json

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch.autograd import forward_ad

from tests.kernels.compare import DEVICE, DTYPES, assert_close, double, few_examples, normal, outputs, relative_error
from vidaccel.kernels.attention_jvp.op import AttentionTangents, attention_jvp

fused = functools.partial(attention_jvp, kernels="fused")
reference = functools.partial(attention_jvp, kernels="reference")
# Float32 sums of exponentials and centred products: a few units in the last place more than a normalisation.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 1e-2}
lengths = st.sampled_from([1, 2, 17, 64, 97])


def draw(B=1, H=2, M=33, N=70, D=32, dtype=torch.float32, seed=0, size=1.0):
    """q, k, v, dq, dk, dv; `size` scales q and k, so scores grow with its square."""
    shapes = [(B, H, M, D), (B, H, N, D), (B, H, N, D)] * 2
    sizes = [size, size, 1.0, 1.0, 1.0, 1.0]
    return [normal(*s, dtype=dtype, seed=seed + i, size=f) for i, (s, f) in enumerate(zip(shapes, sizes, strict=True))]


@few_examples
@given(
    M=lengths, N=lengths, D=st.sampled_from([32, 48, 64, 128]), dtype=st.sampled_from(DTYPES), seed=st.integers(0, 9)
)
def test_output_and_tangent(M, N, D, dtype, seed):
    inputs = draw(M=M, N=N, D=D, dtype=dtype, seed=seed)
    assert_close(outputs(fused, inputs), outputs(reference, double(inputs)), TOLERANCE[dtype])


@few_examples
@given(B=st.integers(1, 3), N=st.sampled_from([1, 31, 80]), data=st.data())
def test_text_of_different_lengths_is_padded_at_the_end(B, N, data):
    inputs = draw(B=B, M=9, N=N)
    kept = torch.tensor([data.draw(st.integers(0, N)) for _ in range(B)], device=inputs[0].device)
    mask = torch.arange(N, device=inputs[0].device) < kept[:, None]
    got = outputs(functools.partial(fused, mask=mask), inputs)
    assert_close(got, outputs(functools.partial(reference, mask=mask), double(inputs)), 1e-5)
    for b in range(B):
        alone = [t[b : b + 1] if i in (0, 3) else t[b : b + 1, :, : kept[b]] for i, t in enumerate(inputs)]
        if kept[b] > 0:
            assert_close([tensor[b : b + 1] for tensor in got], outputs(reference, double(alone)), 1e-5)
        else:
            assert all(torch.equal(tensor[b], torch.zeros_like(tensor[b])) for tensor in got)


def test_any_boolean_mask_and_rows_without_a_key():
    inputs = draw(B=2, M=21, N=40)
    mask = normal(2, 1, 21, 40, seed=3) > 0
    mask[:, :, 4] = False
    got = outputs(functools.partial(fused, mask=mask), inputs)
    assert_close(got, outputs(functools.partial(reference, mask=mask), double(inputs)), 1e-5)
    assert all(not tensor[:, :, 4].any() for tensor in got)


@pytest.fixture
def described(monkeypatch):
    """The kernel with tensor descriptors, which the first configuration goes without."""
    from vidaccel.kernels.attention_jvp import fused as module

    chosen = [config for config in module.CONFIGS if config.kwargs["DESCRIBED"]][:1]
    monkeypatch.setattr(module._attention, "configs", chosen)


@pytest.mark.skipif(
    DEVICE == "cuda" and torch.cuda.get_device_capability() < (9, 0), reason="descriptors are for Hopper's copy engine"
)
@pytest.mark.parametrize(("N", "D"), [(1, 32), (64, 128), (97, 48), (130, 64)])
@pytest.mark.parametrize("dtype", [dtype for dtype in DTYPES if dtype != torch.float32])
def test_tensor_descriptors_read_the_same(described, N, D, dtype):
    inputs = draw(B=2, M=33, N=N, D=D, dtype=dtype)
    lengths = torch.tensor([N, N // 2], device=inputs[0].device)
    mask = torch.arange(N, device=inputs[0].device) < lengths[:, None]
    assert_close(outputs(fused, inputs), outputs(reference, double(inputs)), TOLERANCE[dtype])
    got = outputs(functools.partial(fused, mask=mask), inputs)
    assert_close(got, outputs(functools.partial(reference, mask=mask), double(inputs)), TOLERANCE[dtype])


def test_descriptors_are_for_rows_that_the_copy_engine_can_address(monkeypatch):
    from vidaccel.kernels.attention_jvp import fused as module

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    named = {"q_ptr": torch.empty(0)}
    assert module._possible(module.CONFIGS, named, ALIGNED=True) == module.CONFIGS
    by_address = module._possible(module.CONFIGS, named, ALIGNED=False, D=64)
    assert by_address and not any(config.kwargs["DESCRIBED"] for config in by_address)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert module._possible(module.CONFIGS, named, ALIGNED=True) == by_address
    rows = torch.empty(1, 2, 5, 72, dtype=torch.float16)
    assert module._aligned(rows[..., :64]) and module._aligned(rows[..., 8:])
    assert not module._aligned(rows[..., 4:]) and not module._aligned(rows[..., :66].contiguous())


@pytest.mark.parametrize("size", [100.0, 30.0])
def test_scores_of_ten_thousand_are_no_worse_than_eager(size):
    inputs = draw(M=40, N=90, D=64, size=size)
    assert (inputs[0] @ inputs[1].mT / 8).abs().max() > 3e3
    exact = outputs(reference, double(inputs))
    for got, eager, expected in zip(outputs(fused, inputs), outputs(reference, inputs), exact, strict=True):
        assert relative_error(got, expected) <= max(1.2 * relative_error(eager, expected), 1e-5)


@pytest.mark.parametrize("masks", [None, (1, 1, 1, 4), (1, 1, 4, 4)], ids=["nothing", "keys", "pairs"])
def test_what_a_tuning_is_stored_under_is_plain(masks, monkeypatch):
    """Triton keeps tunings as JSON, which knows none of its own constants."""
    from vidaccel.kernels.attention_jvp import fused as module

    launched = []

    class Kernel:
        def __getitem__(self, grid):
            return lambda *args, **constants: launched.append(constants)

    monkeypatch.setattr(module, "_attention", Kernel())
    inputs = draw(B=1, H=1, M=4, N=4, dtype=torch.float16)
    mask = None if masks is None else torch.ones(masks, dtype=torch.bool, device=DEVICE).expand(1, 1, 4, 4)
    module.attention_jvp(*inputs, mask, 0.5)
    (constants,) = launched
    assert json.loads(json.dumps(constants)) == constants


def test_a_tangent_shared_by_all_keys_is_centred_away():
    q, k, v, _, _, _ = draw(M=16, N=64)
    still = [torch.zeros_like(tensor) for tensor in (q, k, v)]
    dk = torch.full_like(k, 1e4)  # moves every score of a row alike: softmax does not see it
    _, tangent = fused(q, k, v, still[0], dk, still[2])
    _, eager = reference(q, k, v, still[0], dk, still[2])
    assert tangent.norm() <= 2 * eager.norm()


def test_the_output_matches_torch_attention_and_keeps_its_layout():
    q, k, v, *duals = (tensor.transpose(1, 2).contiguous().transpose(1, 2) for tensor in draw(M=45, N=60))
    output, tangent = fused(q, k, v, *duals)
    assert relative_error(output, F.scaled_dot_product_attention(q, k, v)) <= 1e-6
    assert output.stride() == tangent.stride() == q.stride()


def test_strided_inputs():
    base = draw(B=2, M=20, N=20)
    cut = [tensor[:, :, 3:] for tensor in base]
    assert_close(outputs(fused, cut), outputs(reference, double(cut)), 1e-5)
    strided = [tensor.mT.contiguous().mT for tensor in base]
    assert_close(outputs(fused, strided), outputs(reference, double(strided)), 1e-5)


@pytest.mark.parametrize("kernels", ["fused", "reference"])
def test_the_mode_routes_duals_and_leaves_the_rest_alone(kernels):
    q, k, v, dq, dk, dv = draw()
    expected = reference(q, k, v, dq, dk, torch.zeros_like(dv))
    with torch.no_grad(), forward_ad.dual_level(), AttentionTangents(kernels):
        pair = F.scaled_dot_product_attention(forward_ad.make_dual(q, dq), forward_ad.make_dual(k, dk), value=v)
        assert_close(forward_ad.unpack_dual(pair * 1), expected, 1e-5)
        plain = F.scaled_dot_product_attention(q, k, v, is_causal=False)
        assert forward_ad.unpack_dual(plain).tangent is None


def test_the_mode_computes_in_the_type_it_is_given():
    q, k, v, dq, dk, dv = draw()
    with torch.no_grad(), forward_ad.dual_level(), AttentionTangents("fused", dtype=torch.float16):
        pair = forward_ad.unpack_dual(F.scaled_dot_product_attention(forward_ad.make_dual(q, dq), k, v))
    expected = reference(q, k, v, dq, torch.zeros_like(dk), torch.zeros_like(dv))
    assert pair.primal.dtype == torch.float32
    assert 1e-6 < relative_error(pair.tangent, expected[1]) < 5e-3


def test_the_op_is_registered_soundly():
    inputs = draw(M=5, N=7)
    torch.library.opcheck(torch.ops.vidaccel.attention_jvp.default, (*inputs, None, 0.2))
    torch.library.opcheck(
        torch.ops.vidaccel.attention_jvp.default,
        (*inputs, torch.ones(1, 2, 5, 7, dtype=torch.bool, device=inputs[0].device), 0.2),
    )


def test_bad_input_says_what_is_supported():
    inputs = draw(M=5, N=7)
    with pytest.raises(ValueError, match=r"head dim 8 is not supported; 16 to 128 are"):
        fused(*(tensor[..., :8] for tensor in inputs))
    with pytest.raises(ValueError, match="scale must be positive, got 0"):
        fused(*draw(), scale=0.0)
    with pytest.raises(ValueError, match="mask must be bool"):
        fused(*inputs, mask=torch.zeros(1, 7, device=inputs[0].device))
    with pytest.raises(ValueError, match="one type"):
        fused(*inputs[:5], inputs[5].half())
    apart = torch.empty_strided((1, 2, 7, 32), (1, 32, 2**29, 1), device="meta")
    near = [tensor.to("meta") for tensor in inputs]
    for place in (1, 2, 4, 5):
        with pytest.raises(ValueError, match=r"7 keys over 2\^31 or more elements"):
            fused(*near[:place], apart, *near[place + 1 :])
    with pytest.raises(NotImplementedError, match="no gradient"):
        fused(inputs[0].requires_grad_(), *inputs[1:])
    with (
        torch.no_grad(),
        forward_ad.dual_level(),
        AttentionTangents("fused"),
        pytest.raises(NotImplementedError, match="causal"),
    ):
        F.scaled_dot_product_attention(forward_ad.make_dual(inputs[0], inputs[3]), *inputs[1:3], is_causal=True)
