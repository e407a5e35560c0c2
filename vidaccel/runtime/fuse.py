"""Puts the fused kernels into a loaded diffusers transformer, and takes them out again.

    fusion = fuse(pipe.transformer, kernels="auto")
    ...
    fusion.restore()

Two things change, and parameters, buffers and state-dict names stay what they were:

- an attention gets a processor that norms and rotates queries and keys in one op (`qk_norm_rope`);
- a transformer block becomes an instance of a subclass whose forward calls `adaln` and `gated_residual_adaln` where the
  stock forward writes gate, residual and modulation out. The class of that one instance changes, so deep copies, FSDP
  and a second model in the same process are unaffected.

This is the one place that restates a forward; tests/runtime/test_fuse.py holds each against its stock block. Fuse
before anything hooks, shards or compiles the blocks: a hook keeps the forward that it found.

B batch, N video tokens, L text tokens, D width, H heads.
"""

import logging
from collections import Counter
from collections.abc import Callable

import torch
import torch.nn.functional as F
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.transformers.transformer_hunyuan_video import (
    HunyuanVideoAttnProcessor2_0,
    HunyuanVideoSingleTransformerBlock,
    HunyuanVideoTransformerBlock,
)
from diffusers.models.transformers.transformer_hunyuan_video15 import (
    HunyuanVideo15AttnProcessor2_0,
    HunyuanVideo15TransformerBlock,
)
from diffusers.models.transformers.transformer_wan import WanAttnProcessor, WanTransformerBlock
from torch import Tensor, nn

from vidaccel.compat.torch import forward_pre_hooks
from vidaccel.errors import UserError
from vidaccel.kernels import select
from vidaccel.kernels.adaln.op import adaln
from vidaccel.kernels.gated_residual_adaln.op import gated_residual_adaln
from vidaccel.kernels.qk_norm_rope.op import qk_norm_rope

logger = logging.getLogger(__name__)


def fuse(model: nn.Module, kernels: str = "auto") -> "Fusion":
    """Fuses every block of `model` that has a fused form, and logs which those are; the others stay as they are."""
    chosen = select.choose(kernels, next(model.parameters()).device)
    blocks = [module for module in model.modules() if type(module) in FUSED_BLOCKS]
    if not blocks and kernels == "fused":
        known = ", ".join(sorted(block.__name__ for block in FUSED_BLOCKS))
        raise UserError(
            f"kernels=fused, but no block of {type(model).__name__} has a fused form", f"fused are: {known}"
        )
    hooked = [block for block in blocks if "forward" in vars(block) or forward_pre_hooks(block)]
    if hooked:
        raise UserError(
            f"{len(hooked)} blocks of {type(model).__name__} already carry hooks, which would keep the stock forward",
            "fuse the model first, then attach",
        )
    counts = Counter(type(block).__name__ for block in blocks)
    logger.info("kernels: %s in %s", chosen, ", ".join(f"{n} {name}" for name, n in counts.items()) or "no block")
    return Fusion(model, blocks, chosen)


class Fusion:
    """What `fuse` changed in one model; `restore` undoes it. Also a context manager."""

    def __init__(self, model: nn.Module, blocks: list[nn.Module], kernels: str):
        self._undo: list[Callable[[], None]] = []
        for block in blocks:
            for attention in block.children():
                processor = FUSED_PROCESSORS.get(type(getattr(attention, "processor", None)))
                if processor is not None:
                    self._replace_processor(attention, processor(attention.processor, kernels))
            self._replace_class(block, FUSED_BLOCKS[type(block)], kernels)

    def restore(self) -> None:
        """The model as it was. A second call does nothing."""
        while self._undo:
            self._undo.pop()()

    def __enter__(self) -> "Fusion":
        return self

    def __exit__(self, *error) -> None:
        self.restore()

    def _replace_processor(self, attention: nn.Module, processor) -> None:
        stock = attention.processor
        attention.set_processor(processor)
        self._undo.append(lambda: attention.set_processor(stock))

    def _replace_class(self, block: nn.Module, fused: type[nn.Module], kernels: str) -> None:
        stock = type(block)
        block.__class__, block.kernels = fused, kernels

        def undo() -> None:
            block.__class__ = stock
            del block.kernels

        self._undo.append(undo)


class _Processor:
    """What a fused attention processor keeps of the stock one: diffusers sets these two on the instance."""

    def __init__(self, stock, kernels: str):
        self._attention_backend = stock._attention_backend
        self._parallel_config = stock._parallel_config
        self.kernels = kernels

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
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


class HunyuanVideoProcessor(_Processor):
    """Joint attention of video and text, for HunyuanVideo's two kinds of block and for HunyuanVideo-1.5."""

    def __call__(
        self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, image_rotary_emb=None
    ) -> tuple[Tensor, Tensor]:
        text_length = encoder_hidden_states.shape[1]
        single_stream = attn.add_q_proj is None
        if single_stream:
            hidden_states = torch.cat([hidden_states, encoder_hidden_states], dim=1)
        q, k, v = (
            project(hidden_states).unflatten(2, (attn.heads, -1)) for project in (attn.to_q, attn.to_k, attn.to_v)
        )
        text = None
        if not single_stream:
            projections = attn.add_q_proj, attn.add_k_proj, attn.add_v_proj
            text_q, text_k, text_v = (
                project(encoder_hidden_states).unflatten(2, (attn.heads, -1)) for project in projections
            )
            text = text_q, text_k, attn.norm_added_q.weight, attn.norm_added_k.weight
            v = torch.cat([v, text_v], dim=1)
        q, k = qk_norm_rope(
            q,
            k,
            attn.norm_q.weight,
            attn.norm_k.weight,
            *image_rotary_emb,
            text=text,
            eps=attn.norm_q.eps,
            kernels=self.kernels,
        )
        out = self._attend(q, k, v, self._key_mask(attention_mask, q.shape[1]))
        video, text = out.split([out.shape[1] - text_length, text_length], dim=1)
        if single_stream:
            return video, text
        return attn.to_out[1](attn.to_out[0](video)), attn.to_add_out(text)

    def _key_mask(self, mask: Tensor | None, tokens: int) -> Tensor | None:
        """[B, 1, 1, N + L], or None if every key takes part. HunyuanVideo-1.5 gives its blocks the text's part [B, L].

        Stock 1.5 also masks the queries of padding, in a mask of N + L squared; what those rows hold is read by nobody.
        """
        if mask is None:
            return None
        if mask.ndim == 2:
            mask = F.pad(mask.bool(), (tokens - mask.shape[1], 0), value=True)[:, None, None]
        return mask


class WanProcessor(_Processor):
    """Wan's self-attention, whose norm spans all heads. Its cross-attention has no rotation and stays stock."""

    def __init__(self, stock: WanAttnProcessor, kernels: str):
        super().__init__(stock, kernels)
        self.stock = stock

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, rotary_emb=None) -> Tensor:
        if rotary_emb is None:
            return self.stock(attn, hidden_states, encoder_hidden_states, attention_mask, rotary_emb)
        if attn.fused_projections:
            q, k, v = attn.to_qkv(hidden_states).chunk(3, dim=-1)
        else:
            q, k, v = attn.to_q(hidden_states), attn.to_k(hidden_states), attn.to_v(hidden_states)
        q, k, v = (x.unflatten(2, (attn.heads, -1)) for x in (q, k, v))
        cos, sin = (angle.flatten(0, 2) for angle in rotary_emb)
        q, k = qk_norm_rope(
            q, k, attn.norm_q.weight, attn.norm_k.weight, cos, sin, eps=attn.norm_q.eps, kernels=self.kernels
        )
        out = self._attend(q, k, v, attention_mask)
        return attn.to_out[1](attn.to_out[0](out))


class _DoubleStream:
    """The forward that HunyuanVideo's and HunyuanVideo-1.5's double-stream blocks share."""

    def forward(
        self, hidden_states, encoder_hidden_states, temb, attention_mask=None, freqs_cis=None, *_args
    ) -> tuple[Tensor, Tensor]:
        x, y = hidden_states, encoder_hidden_states
        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = _modulation(self.norm1, temb, 6)
        c_shift, c_scale, c_gate, c_shift_mlp, c_scale_mlp, c_gate_mlp = _modulation(self.norm1_context, temb, 6)
        attended, c_attended = self.attn(
            hidden_states=adaln(x, scale, shift, eps=self.norm1.norm.eps, kernels=self.kernels),
            encoder_hidden_states=adaln(y, c_scale, c_shift, eps=self.norm1_context.norm.eps, kernels=self.kernels),
            attention_mask=attention_mask,
            image_rotary_emb=freqs_cis,
        )
        x, normed = gated_residual_adaln(
            x, attended, gate, scale_mlp, shift_mlp, eps=self.norm2.eps, kernels=self.kernels
        )
        y, c_normed = gated_residual_adaln(
            y, c_attended, c_gate, c_scale_mlp, c_shift_mlp, eps=self.norm2_context.eps, kernels=self.kernels
        )
        x = torch.addcmul(x, gate_mlp[:, None], self.ff(normed))
        y = torch.addcmul(y, c_gate_mlp[:, None], self.ff_context(c_normed))
        return x, y


class FusedHunyuanVideoBlock(_DoubleStream, HunyuanVideoTransformerBlock):
    """HunyuanVideo's first twenty blocks."""


class FusedHunyuanVideo15Block(_DoubleStream, HunyuanVideo15TransformerBlock):
    """All blocks of HunyuanVideo-1.5."""


class FusedHunyuanVideoSingleBlock(HunyuanVideoSingleTransformerBlock):
    """HunyuanVideo's last forty blocks: attention and MLP side by side, so no gated residual has a norm after it."""

    def forward(
        self, hidden_states, encoder_hidden_states, temb, attention_mask=None, image_rotary_emb=None, *_args
    ) -> tuple[Tensor, Tensor]:
        lengths = [hidden_states.shape[1], encoder_hidden_states.shape[1]]
        x = torch.cat([hidden_states, encoder_hidden_states], dim=1)
        shift, scale, gate = _modulation(self.norm, temb, 3)
        normed = adaln(x, scale, shift, eps=self.norm.norm.eps, kernels=self.kernels)
        video, text = normed.split(lengths, dim=1)
        attended = self.attn(
            hidden_states=video,
            encoder_hidden_states=text,
            attention_mask=attention_mask,
            image_rotary_emb=image_rotary_emb,
        )
        features = torch.cat([torch.cat(attended, dim=1), self.act_mlp(self.proj_mlp(normed))], dim=2)
        return torch.addcmul(x, gate[:, None], self.proj_out(features)).split(lengths, dim=1)


class FusedWanBlock(WanTransformerBlock):
    """Modulation [B, 6, D] only: Wan 2.2's 5B model modulates each token by itself and keeps the stock forward."""

    def forward(self, hidden_states, encoder_hidden_states, temb, rotary_emb) -> Tensor:
        if temb.ndim == 4:
            return super().forward(hidden_states, encoder_hidden_states, temb, rotary_emb)
        shift, scale, gate, c_shift, c_scale, c_gate = (self.scale_shift_table + temb.float()).unbind(1)
        x = hidden_states
        normed = adaln(x, scale, shift, eps=self.norm1.eps, kernels=self.kernels)
        attended = self.attn1(normed, None, None, rotary_emb)
        if isinstance(self.norm2, nn.Identity):
            x = (x.float() + attended * gate[:, None]).type_as(x)
            normed = x
        else:
            # A learnt affine is a modulation that all samples share.
            affine = (self.norm2.weight - 1).expand_as(gate), self.norm2.bias.expand_as(gate)
            x, normed = gated_residual_adaln(x, attended, gate, *affine, eps=self.norm2.eps, kernels=self.kernels)
        attended = self.attn2(normed, encoder_hidden_states, None, None)
        ones = torch.ones_like(gate)
        x, normed = gated_residual_adaln(x, attended, ones, c_scale, c_shift, eps=self.norm3.eps, kernels=self.kernels)
        return (x.float() + self.ffn(normed).float() * c_gate[:, None]).type_as(x)


def _modulation(norm: nn.Module, temb: Tensor, parts: int) -> tuple[Tensor, ...]:
    """The [B, D] vectors that diffusers' AdaLayerNormZero makes of the timestep embedding: shift, scale, gate, ..."""
    return norm.linear(norm.silu(temb)).chunk(parts, dim=1)


FUSED_BLOCKS = {
    HunyuanVideoTransformerBlock: FusedHunyuanVideoBlock,
    HunyuanVideoSingleTransformerBlock: FusedHunyuanVideoSingleBlock,
    HunyuanVideo15TransformerBlock: FusedHunyuanVideo15Block,
    WanTransformerBlock: FusedWanBlock,
}
FUSED_PROCESSORS = {
    HunyuanVideoAttnProcessor2_0: HunyuanVideoProcessor,
    HunyuanVideo15AttnProcessor2_0: HunyuanVideoProcessor,
    WanAttnProcessor: WanProcessor,
}
