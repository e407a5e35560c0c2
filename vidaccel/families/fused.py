"""What the fused blocks of all families share: a mark, the processor's base, and how modulation is made.

A family's own are in its folder, as `FUSED_BLOCKS` and `FUSED_PROCESSORS` (stock class -> fused class) of the module
that its record names. A fused block is a subclass of the stock one and of `FusedBlock`, adds no parameter or buffer,
and restates the forward to call fused ops; a fused processor is made from the stock one and the name of the kernels.

B batch, N tokens, D width, H heads
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from torch import Tensor, nn

from vidaccel.kernels.adaln.op import adaln, adaln_rows
from vidaccel.kernels.gated_residual_adaln.op import gated_residual_adaln, gated_residual_adaln_rows
from vidaccel.kernels.quantize_rows.reference import Rows


class FusedBlock:
    """Base of the fused form of a block, before its stock class."""

    kernels: str
    """Set by `runtime.fuse`: what its ops run on."""


class FusedProcessor:
    """What a fused attention processor keeps of the stock one: diffusers sets these two on the instance."""

    def __init__(self, stock, kernels: str):
        self._attention_backend = stock._attention_backend
        self._parallel_config = stock._parallel_config
        self.kernels = kernels

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """q, k, v [B, N, H, D] -> [B, N, H D]."""
        out = dispatch_attention_fn(
            q,
            k,
            v,
            attn_mask=mask,
            backend=self._attention_backend,
            parallel_config=self._parallel_config,
        )
        return out.flatten(2, 3).to(q.dtype)


def take_rows(*layers: Any) -> bool:
    """Whether each of these layers would bring what it is given to float8 by itself: then it takes `Rows` as well."""
    return all(hasattr(layer, "rows") for layer in layers)


def quantised_once(x: Tensor | Rows, *layers: Any) -> Tensor | Rows:
    """`x` for layers that all take it: in float8, where it is not and they take that."""
    return layers[0].rows(x) if isinstance(x, Tensor) and take_rows(*layers) else x


def norm_before(*layers: Any) -> Callable[..., Any]:
    """adaLN of what these layers take: in float8 at once, if they take that."""
    return adaln_rows if take_rows(*layers) else adaln


def gated_norm_before(*layers: Any) -> Callable[..., Any]:
    """As `norm_before`, after a gated residual."""
    return gated_residual_adaln_rows if take_rows(*layers) else gated_residual_adaln


def token_count(x: Tensor | Rows) -> int:
    """N of x [B, N, D]."""
    return (x if isinstance(x, Tensor) else x.values).shape[1]


def split_tokens(x: Tensor | Rows, lengths: list[int]) -> Sequence[Any]:
    """x [B, N + L, D] as parts of so many tokens."""
    if isinstance(x, Tensor):
        return x.split(lengths, dim=1)
    return [Rows(*parts) for parts in zip(x.values.split(lengths, dim=1), x.scales.split(lengths, dim=1), strict=True)]


def join_tokens(*parts: Any) -> Any:
    """What `split_tokens` took apart."""
    if isinstance(parts[0], Tensor):
        return torch.cat(parts, dim=1)
    bytes = torch.cat([part.values.view(torch.uint8) for part in parts], dim=1)
    return Rows(bytes.view(torch.float8_e4m3fn), torch.cat([part.scales for part in parts], dim=1))


def modulation(norm: nn.Module, temb: Tensor, parts: int) -> tuple[Tensor, ...]:
    """The [B, D] vectors that diffusers' AdaLayerNormZero makes of the timestep embedding: shift, scale, gate, ..."""
    return norm.linear(norm.silu(temb)).chunk(parts, dim=1)
