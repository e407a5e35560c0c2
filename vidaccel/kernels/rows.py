"""Triton pieces that several ops share: normalisation of a row held in registers, its Jacobian, and rows in float8.

The Jacobian of a normalisation is symmetric, so one function serves the forward derivative (applied to the tangent of
the input) and the backward pass (applied to the gradient of the output):

    layer norm  y = (x - mean x) r:   J v = r (v - mean(v) - y mean(y v)),   r = 1 / sqrt(var x + eps)
    RMS norm    y = x r:              J v = r (v - y mean(y v)),             r = 1 / sqrt(mean x^2 + eps)

Statistics are float32 and taken in two passes over registers (mean first, then the centred variance), so that a large
mean costs no digits. A row is padded to a power of two; `valid` marks the D real entries.
"""

from collections.abc import Callable

import triton
import triton.language as tl

from vidaccel.kernels.quantize_rows import reference

LARGEST, ZERO = tl.constexpr(reference.LARGEST), tl.constexpr(reference.ZERO)


def autotuned(configs: list[triton.Config], key: list[str], possible: Callable | None = None):
    """`triton.autotune` with results cached on disk; in the interpreter, which cannot time, the first config alone.

    `possible(configs, arguments, **constants)` says which of them can run with these arguments; by default all.
    """
    prune = {"early_config_prune": possible} if possible else None
    chosen = configs[:1] if interpreted() else configs
    return triton.autotune(chosen, key=key, prune_configs_by=prune, cache_results=not interpreted())


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter."""
    return triton.knobs.runtime.interpret


@triton.jit
def layer_norm(x, valid, D, eps):
    """x [BLOCK] float32 -> (x - mean) * rstd, zero where padded; mean; rstd."""
    mean = tl.sum(tl.where(valid, x, 0.0), axis=0) / D
    centred = tl.where(valid, x - mean, 0.0)
    rstd = tl.rsqrt(tl.sum(centred * centred, axis=0) / D + eps)
    return centred * rstd, mean, rstd


@triton.jit
def layer_norm_jacobian(v, normed, rstd, valid, D):
    """J v for one row; v [BLOCK] must be zero where padded."""
    mean = tl.sum(v, axis=0) / D
    projection = tl.sum(v * normed, axis=0) / D
    return tl.where(valid, rstd * (v - mean - normed * projection), 0.0)


@triton.jit
def float8_scale(most):
    """Of a row whose largest number is this; and the scale's inverse, which its numbers are multiplied by: a division
    each would take longer than memory does. Both exactly rounded, as Triton's own division is not."""
    scale = tl.where(most < ZERO, 1.0, tl.div_rn(most, LARGEST))
    return scale, tl.div_rn(1.0, scale)


@triton.jit
def float8(x, ROUNDED: tl.constexpr):
    """x as float8_e4m3fn, to nearest, ties to even.

    Triton's interpreter cuts digits off and is right where there are none to cut, so there they are rounded away first:
    adding and subtracting a power of two leaves three binary digits after the first, and none below 2^-9.
    """
    if ROUNDED:
        power = (x.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
        large = tl.maximum(power, 0.015625) * 1572864.0  # 2^-6, the least normal number, and 1.5 * 2^20
        x = (x + large) - large
    return x.to(tl.float8e4nv)
