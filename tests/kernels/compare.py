"""How a fused op is compared with its float64 reference: output, gradients and tangents on the same random inputs."""

from collections.abc import Callable, Sequence

import torch
from hypothesis import Phase, settings
from torch import Tensor
from torch.autograd import forward_ad

from vidaccel.kernels.quantize_rows.reference import Rows

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Triton's interpreter computes bf16 products wrongly, so bf16 is left to the GPU.
DTYPES = (torch.float32, torch.float16, torch.bfloat16) if DEVICE == "cuda" else (torch.float32, torch.float16)
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}

few_examples = settings(
    derandomize=True, deadline=None, max_examples=8 if DEVICE == "cpu" else 12, phases=(Phase.explicit, Phase.generate)
)


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0, size: float = 1.0) -> Tensor:
    """Normal numbers that depend on shape and seed alone, on the device under test."""
    generator = torch.Generator().manual_seed(seed * 7919 + sum(shape))
    return (size * torch.randn(shape, generator=generator)).to(dtype).to(DEVICE)


def relative_error(got: Tensor, expected: Tensor) -> float:
    """||got - expected|| / ||expected|| in float64; plain ||got|| where zeros are expected. NaN stays NaN."""
    difference = (got.detach().double() - expected.detach().double()).norm()
    size = expected.detach().double().norm()
    return (difference / size).item() if size > 0 else difference.item()


def assert_close(got: Sequence[Tensor], expected: Sequence[Tensor], tolerance: float) -> None:
    for index, (g, e) in enumerate(zip(got, expected, strict=True)):
        assert g.shape == e.shape, index
        assert relative_error(g, e) <= tolerance, (index, relative_error(g, e))


def assert_rows_close(rows: Rows, expected: Tensor) -> None:
    """Every number within half a step of float8, of its own size or of the least that is normal; a row's largest is
    448, and a row of zeros has the scale 1."""
    scales, expected = rows.scales.double()[..., None], expected.double()
    assert rows.values.dtype == torch.float8_e4m3fn and rows.values.shape == expected.shape
    assert rows.scales.dtype == torch.float32 and rows.scales.shape == expected.shape[:-1]
    step = torch.maximum(expected.abs() / 16, scales * 2.0**-10)
    assert ((rows.values.double() * scales - expected).abs() <= step * 1.0001 + scales * 1e-3).all()
    most = expected.abs().amax(-1)
    torch.testing.assert_close(rows.scales.double(), torch.where(most > 0, most / 448, 1.0), rtol=1e-5, atol=1e-9)


def outputs(op: Callable, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    with torch.no_grad():
        result = op(*inputs)
    return result if isinstance(result, tuple) else (result,)


def gradients(op: Callable, inputs: Sequence[Tensor], seed: int = 1) -> tuple[Tensor, ...]:
    """Gradients of a random weighted sum of all outputs with respect to all inputs."""
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    result = op(*leaves)
    result = result if isinstance(result, tuple) else (result,)
    weights = [normal(*r.shape, dtype=torch.float16, seed=seed + i).to(r.dtype) for i, r in enumerate(result)]
    return torch.autograd.grad(result, leaves, weights, materialize_grads=True)


def tangents(op: Callable, inputs: Sequence[Tensor], directions: Sequence[Tensor | None]) -> tuple[Tensor, ...]:
    """Outputs, then their tangents, when the inputs move along `directions` (None: that input stays)."""
    with torch.no_grad(), forward_ad.dual_level():
        pairs = zip(inputs, directions, strict=True)
        result = op(*(x if d is None else forward_ad.make_dual(x, d) for x, d in pairs))
        parts = [forward_ad.unpack_dual(r) for r in (result if isinstance(result, tuple) else (result,))]
        still = (torch.zeros_like(p.primal) if p.tangent is None else p.tangent for p in parts)
        return *(p.primal for p in parts), *still


def double(tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
    return [None if tensor is None else tensor.double() for tensor in tensors]
