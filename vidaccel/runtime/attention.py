"""`attention=auto`: the fastest attention backend that is here, by a short measurement of the model's own attention.

Of those of diffusers' dispatcher that need no download, and that are as exact as PyTorch's own choice: sage's quantised
scores are not.

N tokens, H heads, D channels of a head
"""

import logging
import statistics
import time
from functools import cache
from typing import NamedTuple

import torch
from diffusers.models.attention_dispatch import AttentionBackendName, dispatch_attention_fn
from torch import Tensor

from vidaccel.compat.diffusers import attention_constraints, check_attention_backend

log = logging.getLogger(__name__)

OWN = "native"
"""PyTorch's choice among its own."""
CANDIDATES = (OWN, "_native_cudnn", "_native_flash", "flash", "_flash_3", "sage")
TAKE_A_MASK = {OWN, "_native_cudnn"}
FARTHEST = 0.01
"""Of a backend's output from PyTorch's, relative, for it to count: several times what bfloat16 rounds."""
CALLS = 3


class Attention(NamedTuple):
    """What is to be computed, of one sample."""

    N: int
    H: int
    D: int
    dtype: torch.dtype
    masked: bool
    """Whether a mask leaves some of the tokens out."""


class Measured(NamedTuple):
    """Of one backend."""

    seconds: float
    """Of a call, median of `CALLS`."""
    distance: float
    """From PyTorch's own, relative."""


def fastest(attention: Attention, device: torch.device) -> str:
    """The name of the backend for `device`: `native` where there is no choice, as on a CPU."""
    if device.type != "cuda":
        log.info("attention: auto is %s on %s, where there is no choice", OWN, device.type)
        return OWN
    found = measured(attention, device)
    near = {name: row for name, row in found.items() if row.distance <= FARTHEST}
    best = min(near, key=lambda name: near[name].seconds, default=OWN)
    said = ", ".join(f"{name} {1000 * row.seconds:.3g} ms" for name, row in found.items())
    far = ", ".join(sorted(found.keys() - near.keys()))
    log.info(
        "attention=%s, the fastest at %d tokens: %s%s", best, attention.N, said, f" (too far off: {far})" * bool(far)
    )
    return best


@cache
@torch.no_grad()
def measured(attention: Attention, device: torch.device) -> dict[str, Measured]:
    """Every candidate that is here and takes such an attention."""
    generator = torch.Generator(device).manual_seed(0)
    query, key, value = (
        torch.randn(1, *attention[:3], generator=generator, device=device, dtype=attention.dtype) for _ in range(3)
    )
    mask = (
        torch.arange(attention.N, device=device).expand(1, 1, 1, -1) < 0.99 * attention.N if attention.masked else None
    )
    found: dict[str, Measured] = {}
    exact: Tensor | None = None
    for name in CANDIDATES:
        if attention.masked and name not in TAKE_A_MASK:
            continue
        try:
            check_attention_backend(name)
            for fits in attention_constraints(name):
                fits(query=query, key=key, value=value, attn_mask=mask, is_causal=False)
            backend = AttentionBackendName(name)
            out = dispatch_attention_fn(query, key, value, mask, backend=backend).float()
            seconds = [_timed(query, key, value, mask, backend) for _ in range(CALLS)]
            exact = out if exact is None else exact
            found[name] = Measured(statistics.median(seconds), float((out - exact).norm() / exact.norm()))
        except (RuntimeError, ValueError, ImportError) as error:
            log.debug("attention=%s is not possible here: %s", name, error)
    return found


def _timed(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, backend: AttentionBackendName) -> float:
    def wait() -> float:
        if query.is_cuda:
            torch.cuda.synchronize(query.device)
        return time.perf_counter()

    started = wait()
    dispatch_attention_fn(query, key, value, mask, backend=backend)
    return wait() - started
