"""Each op against what diffusers runs in its place, eager and compiled, at HunyuanVideo's size and at a tenth of it.

Bytes and operations are the least that the work needs, as in the docstrings of the kernels: an op that reads something
twice shows it as a lower share of the ceiling.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from diffusers.models.embeddings import apply_rotary_emb
from torch import Tensor
from torch.autograd import forward_ad

from studies.gpu.measure import CUDA, DEVICE, Rows, compiled
from vidaccel.kernels.adaln.op import adaln
from vidaccel.kernels.attention_jvp.op import attention_jvp
from vidaccel.kernels.gated_residual_adaln.op import gated_residual_adaln
from vidaccel.kernels.qk_norm_rope.op import qk_norm_rope
from vidaccel.kernels.quantize_rows.op import quantize_rows

KERNELS = "fused" if CUDA else "reference"


@dataclass(frozen=True)
class Size:
    """What the ops work on: N video tokens of H heads of width D; batch 1."""

    N: int
    H: int = 24
    D: int = 128
    dtype: torch.dtype = torch.bfloat16

    @property
    def W(self) -> int:
        return self.H * self.D

    def row(self) -> dict:
        return {"N": self.N, "H": self.H, "D": self.D, "dtype": str(self.dtype).removeprefix("torch.")}

    def normal(self, *shape: int, seed: int = 0) -> Tensor:
        generator = torch.Generator(DEVICE).manual_seed(seed)
        return torch.randn(shape, generator=generator, device=DEVICE, dtype=self.dtype)


def ceilings(rows: Rows, size: Size) -> None:
    """What this machine can do: a copy of 2 GiB each way, and a product of 8192 x 8192 matrices of random numbers."""
    source = torch.empty(2 << 30 if CUDA else 1 << 20, dtype=torch.uint8, device=DEVICE).random_()
    target = torch.empty_like(source)
    rows.measure("copy", "torch", {}, lambda: target.copy_(source), bytes=2 * source.numel())
    n = 8192 if CUDA else 64
    a, b = size.normal(n, n, seed=1), size.normal(n, n, seed=2)
    rows.measure("matmul", "torch", {"n": n}, lambda: a @ b, flops=2 * n**3)


def _three_ways(rows: Rows, name: str, size: Size, stock: Callable, ours: Callable, inputs: list, **least) -> None:
    with torch.no_grad():
        exact = stock(*(tensor.float() for tensor in inputs))
        exact = exact[0] if isinstance(exact, tuple) else exact
        for variant, op in (("eager", stock), ("compiled", compiled(stock)), ("vidaccel", ours)):
            rows.measure(name, variant, size.row(), functools.partial(op, *inputs), exact=exact, **least)


def _with_gradients(rows: Rows, name: str, size: Size, stock: Callable, ours: Callable, inputs: list, **least) -> None:
    """Forward and backward together, gradients with respect to every input; the output is like the first."""
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    weights = torch.randn_like(inputs[0])

    def both(op: Callable) -> tuple[Tensor, ...]:
        return torch.autograd.grad(op(*leaves), leaves, weights)

    for variant, op in (("eager", stock), ("compiled", compiled(stock)), ("vidaccel", ours)):
        rows.measure(f"{name} with gradients", variant, size.row(), functools.partial(both, op), **least)


def _with_tangents(rows: Rows, name: str, size: Size, stock: Callable, ours: Callable, inputs: list, **least) -> None:
    """Output and forward derivative along every input."""

    def dual(op: Callable) -> None:
        with torch.no_grad(), forward_ad.dual_level():
            op(*(forward_ad.make_dual(tensor, tensor) for tensor in inputs))

    for variant, op in (("eager", stock), ("vidaccel", ours)):
        rows.measure(f"{name} with tangents", variant, size.row(), functools.partial(dual, op), **least)


def norms(rows: Rows, size: Size, everything: bool) -> None:
    """adaln and gated_residual_adaln; `everything` adds gradients and tangents."""
    x, y = size.normal(1, size.N, size.W, seed=1), size.normal(1, size.N, size.W, seed=2)
    gate, scale, shift = (size.normal(1, size.W, seed=3 + i) for i in range(3))
    one = size.N * size.W * x.element_size()

    def stock_adaln(x, scale, shift):
        return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale[:, None]) + shift[:, None]

    def stock_gated(x, y, gate, scale, shift):
        h = x + y * gate[:, None]
        return h, stock_adaln(h, scale, shift)

    cases = (
        ("adaln", stock_adaln, functools.partial(adaln, kernels=KERNELS), [x, scale, shift], 2, 4),
        (
            "gated_residual_adaln",
            stock_gated,
            functools.partial(gated_residual_adaln, kernels=KERNELS),
            [x, y, gate, scale, shift],
            4,
            8,
        ),
    )
    for name, stock, ours, inputs, forward, tangent in cases:
        _three_ways(rows, name, size, stock, ours, inputs, bytes=forward * one)
        if everything:
            if name == "adaln":  # the others have no backward pass of their own
                _with_gradients(rows, name, size, stock, ours, inputs, bytes=5 * one)
            _with_tangents(rows, name, size, stock, ours, inputs, bytes=tangent * one)


def rows_in_float8(rows: Rows, size: Size, everything: bool) -> None:
    """quantize_rows as a single-stream block needs it: attention beside GELU of four times its width."""
    left, x = size.normal(1, size.N, size.W, seed=1), size.normal(1, size.N, 4 * size.W, seed=2)

    def stock(x, left):
        joined = torch.cat([left, F.gelu(x, approximate="tanh")], dim=2).float()
        scales = joined.abs().amax(2) / 448
        return (joined / scales[..., None]).to(torch.float8_e4m3fn), scales

    def ours(x, left):
        return quantize_rows(x, left=left, gelu=True, kernels=KERNELS)

    if not everything:  # it has neither gradients nor tangents
        least = size.N * (5 * size.W * (x.element_size() + 1) + 4)
        _three_ways(rows, "quantize_rows", size, stock, ours, [x, left], bytes=least)


def rotary(rows: Rows, size: Size, everything: bool) -> None:
    """qk_norm_rope with 256 text tokens that have weights of their own, as in a double-stream block."""
    L = 256 if CUDA else 4
    q, k = size.normal(1, size.N, size.H, size.D, seed=1), size.normal(1, size.N, size.H, size.D, seed=2)
    text_q, text_k = size.normal(1, L, size.H, size.D, seed=3), size.normal(1, L, size.H, size.D, seed=4)
    weight = size.normal(size.D, seed=5)
    angle = torch.rand(size.N, size.D // 2, device=DEVICE).repeat_interleave(2, dim=1)
    cos, sin = angle.cos(), angle.sin()
    least = 4 * (size.N + L) * size.W * q.element_size() + 2 * cos.numel() * 4

    def norm(x):
        return (x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype) * weight.to(
            x.dtype
        )

    def stock(q, k, text_q, text_k):
        q, k = (apply_rotary_emb(norm(x), (cos, sin), sequence_dim=1) for x in (q, k))
        return torch.cat([q, norm(text_q)], dim=1), torch.cat([k, norm(text_k)], dim=1)

    def ours(q, k, text_q, text_k):
        return qk_norm_rope(q, k, weight, weight, cos, sin, text=(text_q, text_k, weight, weight), kernels=KERNELS)

    inputs = [q, k, text_q, text_k]
    _three_ways(rows, "qk_norm_rope", size, stock, ours, inputs, bytes=least)
    if everything:
        _with_tangents(rows, "qk_norm_rope", size, stock, ours, inputs, bytes=2 * least)


def attention(rows: Rows, size: Size, everything: bool) -> None:
    """attention_jvp against torch's forward attention, whose rate is the yardstick."""
    q, k, v, dq, dk, dv = (size.normal(1, size.N, size.H, size.D, seed=i).transpose(1, 2) for i in range(6))
    mask = torch.arange(size.N, device=DEVICE)[None] < size.N - size.N // 50
    product = 2 * size.N**2 * size.W
    inputs = q, k, v, dq, dk, dv
    row = functools.partial(rows.measure, "attention_jvp", budget=1.0, most=10)

    with torch.no_grad():
        forward = functools.partial(F.scaled_dot_product_attention, q, k, v)
        row("torch forward, no tangent", size.row(), forward, flops=2 * product)
        masked = functools.partial(forward, attn_mask=mask[:, None, None])
        row("torch forward with text mask, no tangent", size.row(), masked, flops=2 * product)
        ours = functools.partial(attention_jvp, *inputs, kernels=KERNELS)
        row("vidaccel", size.row(), ours, flops=6 * product, exact=forward())
        if CUDA and not everything:
            _tuned(rows, size)
        if everything:
            row("vidaccel with text mask", size.row(), functools.partial(ours, mask=mask), flops=6 * product)
            eager = functools.partial(attention_jvp, *inputs, kernels="reference")
            row("eager", size.row(), eager, flops=6 * product)


def _tuned(rows: Rows, size: Size) -> None:
    """Which configuration attention_jvp was tuned to, by address or by tensor descriptors, and what each took."""
    from vidaccel.kernels.attention_jvp.fused import _attention

    best = getattr(_attention, "best_config", None)  # there is none where it never ran
    if best is not None:
        timings = {str(config): times[0] for config, times in getattr(_attention, "configs_timings", {}).items()}
        rows.add("attention_jvp", "tuned", size.row(), config=str(best), milliseconds=timings)


def attention_package(rows: Rows, size: Size) -> None:
    """attention_jvp and the jvp-flash-attention package on the same inputs, which lie as the package wants them."""
    inputs = [size.normal(1, size.H, size.N, size.D, seed=i) for i in range(6)]
    flops = 12 * size.N**2 * size.W

    def package() -> None:
        from jvp_flash_attention.jvp_attention import JVPAttn

        with forward_ad.dual_level():
            JVPAttn.fwd_dual(*(forward_ad.make_dual(x, dx) for x, dx in zip(inputs[:3], inputs[3:], strict=True)))

    with torch.no_grad():
        row = functools.partial(rows.measure, "attention_jvp beside the package", budget=1.0, most=5, flops=flops)
        row("vidaccel", size.row(), functools.partial(attention_jvp, *inputs, kernels=KERNELS))
        row("jvp-flash-attention", size.row(), package)


def run(rows: Rows, sizes: list[Size]) -> None:
    """Forward passes at every size, then gradients and tangents at the smallest: what is aimed at comes first."""
    ceilings(rows, sizes[0])
    for size, everything in [*((size, False) for size in sizes), (sizes[0], True)]:
        for op in (norms, rows_in_float8, rotary, attention):
            with rows.attempt(op.__name__, "preparation", size.row()):
                op(rows, size, everything)
            torch.compiler.reset()
        if not everything:
            with rows.attempt("attention_jvp beside the package", "preparation", size.row()):
                attention_package(rows, size)
