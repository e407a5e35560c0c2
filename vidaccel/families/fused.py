"""What the fused blocks of all families share: a mark, the processor's base, and how modulation is made.

A family's own are in its folder, as `FUSED_BLOCKS` and `FUSED_PROCESSORS` (stock class -> fused class) of the module
that its record names. A fused block is a subclass of the stock one and of `FusedBlock`, adds no parameter or buffer,
and restates the forward to call fused ops; a fused processor is made from the stock one and the name of the kernels.

B batch, N tokens, D width, H heads
"""

from diffusers.models.attention_dispatch import dispatch_attention_fn
from torch import Tensor, nn

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


def quantised_once(x: Tensor, *layers: nn.Module) -> Tensor | Rows:
    """`x` for layers that all take it: in float8, if that is what each of them would make of it by itself."""
    makers = [getattr(layer, "rows", None) for layer in layers]
    return makers[0](x) if makers[0] is not None and all(makers) else x


def modulation(norm: nn.Module, temb: Tensor, parts: int) -> tuple[Tensor, ...]:
    """The [B, D] vectors that diffusers' AdaLayerNormZero makes of the timestep embedding: shift, scale, gate, ..."""
    return norm.linear(norm.silu(temb)).chunk(parts, dim=1)
