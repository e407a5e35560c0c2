"""HunyuanVideo's blocks on fused ops, and what HunyuanVideo-1.5's have in common with them.

B batch, N video tokens, L text tokens, D width, H heads
"""

from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.transformers.transformer_hunyuan_video import (
    HunyuanVideoAttnProcessor2_0,
    HunyuanVideoSingleTransformerBlock,
    HunyuanVideoTransformerBlock,
)
from torch import Tensor

from vidaccel.families.fused import (
    FusedBlock,
    FusedProcessor,
    gated_norm_before,
    join_tokens,
    modulation,
    norm_before,
    quantised_once,
    split_tokens,
    take_rows,
    token_count,
)
from vidaccel.kernels.qk_norm_rope.op import qk_norm_rope


class HunyuanVideoProcessor(FusedProcessor):
    """Joint attention of video and text, for HunyuanVideo's two kinds of block and for HunyuanVideo-1.5."""

    def __call__(
        self, attn, hidden_states, encoder_hidden_states: Any = None, attention_mask=None, image_rotary_emb=None
    ) -> tuple[Tensor, Tensor]:
        text_length = token_count(encoder_hidden_states)
        single_stream = attn.add_q_proj is None
        if single_stream:
            hidden_states = join_tokens(hidden_states, encoder_hidden_states)
        projections = attn.to_q, attn.to_k, attn.to_v
        given = quantised_once(hidden_states, *projections)
        q, k, v = (project(given).unflatten(2, (attn.heads, -1)) for project in projections)
        text = None
        if not single_stream:
            projections = attn.add_q_proj, attn.add_k_proj, attn.add_v_proj
            given = quantised_once(encoder_hidden_states, *projections)
            text_q, text_k, text_v = (project(given).unflatten(2, (attn.heads, -1)) for project in projections)
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
        out = self.attend(q, k, v, self._key_mask(attention_mask, q.shape[1]))
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


class FusedDoubleStream(FusedBlock):
    """The forward that HunyuanVideo's and HunyuanVideo-1.5's double-stream blocks share."""

    attn: Any
    ff: Any
    ff_context: Any
    norm1: Any
    norm1_context: Any
    norm2: Any
    norm2_context: Any

    def forward(
        self, hidden_states, encoder_hidden_states, temb, attention_mask=None, freqs_cis=None, *_args
    ) -> tuple[Tensor, Tensor]:
        x, y = hidden_states, encoder_hidden_states
        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = modulation(self.norm1, temb, 6)
        c_shift, c_scale, c_gate, c_shift_mlp, c_scale_mlp, c_gate_mlp = modulation(self.norm1_context, temb, 6)
        norm = norm_before(self.attn.to_q, self.attn.to_k, self.attn.to_v)
        c_norm = norm_before(self.attn.add_q_proj, self.attn.add_k_proj, self.attn.add_v_proj)
        attended, c_attended = self.attn(
            hidden_states=norm(x, scale, shift, eps=self.norm1.norm.eps, kernels=self.kernels),
            encoder_hidden_states=c_norm(y, c_scale, c_shift, eps=self.norm1_context.norm.eps, kernels=self.kernels),
            attention_mask=attention_mask,
            image_rotary_emb=freqs_cis,
        )
        norm, c_norm = gated_norm_before(self.ff.net[0].proj), gated_norm_before(self.ff_context.net[0].proj)
        x, normed = norm(x, attended, gate, scale_mlp, shift_mlp, eps=self.norm2.eps, kernels=self.kernels)
        y, c_normed = c_norm(
            y, c_attended, c_gate, c_scale_mlp, c_shift_mlp, eps=self.norm2_context.eps, kernels=self.kernels
        )
        x = torch.addcmul(x, gate_mlp[:, None], self.ff(normed))
        y = torch.addcmul(y, c_gate_mlp[:, None], self.ff_context(c_normed))
        return x, y


class FusedHunyuanVideoBlock(FusedDoubleStream, HunyuanVideoTransformerBlock):
    """HunyuanVideo's first twenty blocks."""


class FusedHunyuanVideoSingleBlock(FusedBlock, HunyuanVideoSingleTransformerBlock):
    """HunyuanVideo's last forty blocks: attention and MLP side by side, so no gated residual has a norm after it."""

    def forward(
        self, hidden_states, encoder_hidden_states, temb, attention_mask=None, image_rotary_emb=None, *_args
    ) -> tuple[Tensor, Tensor]:
        lengths = [hidden_states.shape[1], encoder_hidden_states.shape[1]]
        x = torch.cat([hidden_states, encoder_hidden_states], dim=1)
        shift, scale, gate = modulation(self.norm, temb, 3)
        norm = norm_before(self.attn.to_q, self.attn.to_k, self.attn.to_v, self.proj_mlp)
        normed = norm(x, scale, shift, eps=self.norm.norm.eps, kernels=self.kernels)
        video, text = split_tokens(normed, lengths)
        attended = self.attn(
            hidden_states=video,
            encoder_hidden_states=text,
            attention_mask=attention_mask,
            image_rotary_emb=image_rotary_emb,
        )
        attended, features = torch.cat(attended, dim=1), self.proj_mlp(normed)
        project: Any = self.proj_out
        if take_rows(project):
            features = project.rows(features, left=attended, gelu=True)
        else:
            features = torch.cat([attended, self.act_mlp(features)], dim=2)
        return torch.addcmul(x, gate[:, None], project(features)).split(lengths, dim=1)


FUSED_BLOCKS = {
    HunyuanVideoTransformerBlock: FusedHunyuanVideoBlock,
    HunyuanVideoSingleTransformerBlock: FusedHunyuanVideoSingleBlock,
}
FUSED_PROCESSORS = {HunyuanVideoAttnProcessor2_0: HunyuanVideoProcessor}
