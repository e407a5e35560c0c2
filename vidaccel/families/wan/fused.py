"""Wan's blocks on fused ops.

B batch, N video tokens, D width, H heads
"""

import torch
from diffusers.models.transformers.transformer_wan import WanAttnProcessor, WanTransformerBlock
from torch import Tensor, nn

from vidaccel.families.fused import FusedBlock, FusedProcessor, gated_norm_before, norm_before, quantised_once
from vidaccel.kernels.qk_norm_rope.op import qk_norm_rope


class WanProcessor(FusedProcessor):
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
            projections = attn.to_q, attn.to_k, attn.to_v
            given = quantised_once(hidden_states, *projections)
            q, k, v = (project(given) for project in projections)
        q, k, v = (x.unflatten(2, (attn.heads, -1)) for x in (q, k, v))
        cos, sin = (angle.flatten(0, 2) for angle in rotary_emb)
        q, k = qk_norm_rope(
            q, k, attn.norm_q.weight, attn.norm_k.weight, cos, sin, eps=attn.norm_q.eps, kernels=self.kernels
        )
        out = self.attend(q, k, v, attention_mask)
        return attn.to_out[1](attn.to_out[0](out))


class FusedWanBlock(FusedBlock, WanTransformerBlock):
    """Modulation [B, 6, D] only: Wan 2.2's 5B model modulates each token by itself and keeps the stock forward."""

    def forward(self, hidden_states, encoder_hidden_states, temb, rotary_emb) -> Tensor:
        if temb.ndim == 4:
            return super().forward(hidden_states, encoder_hidden_states, temb, rotary_emb)
        shift, scale, gate, c_shift, c_scale, c_gate = (self.scale_shift_table + temb.float()).unbind(1)
        x = hidden_states
        norm = norm_before(self.attn1.to_q, self.attn1.to_k, self.attn1.to_v)
        normed = norm(x, scale, shift, eps=self.norm1.eps, kernels=self.kernels)
        attended = self.attn1(normed, None, None, rotary_emb)
        if isinstance(self.norm2, nn.Identity):
            x = (x.float() + attended * gate[:, None]).type_as(x)
            normed = x
        else:
            # A learnt affine is a modulation that all samples share.
            affine = (self.norm2.weight - 1).expand_as(gate), self.norm2.bias.expand_as(gate)
            norm = gated_norm_before(self.attn2.to_q)
            x, normed = norm(x, attended, gate, *affine, eps=self.norm2.eps, kernels=self.kernels)
        attended = self.attn2(normed, encoder_hidden_states, None, None)
        ones = torch.ones_like(gate)
        norm = gated_norm_before(self.ffn.net[0].proj)
        x, normed = norm(x, attended, ones, c_scale, c_shift, eps=self.norm3.eps, kernels=self.kernels)
        return (x.float() + self.ffn(normed).float() * c_gate[:, None]).type_as(x)


FUSED_BLOCKS = {WanTransformerBlock: FusedWanBlock}
FUSED_PROCESSORS = {WanAttnProcessor: WanProcessor}
