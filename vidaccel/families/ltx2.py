"""LTX-2, text to video with sound: LTX-Video's kind of block, with a second, narrower stream of audio tokens beside it.

Text goes from its encoder through connectors, one for each stream. The transformer gives velocities of both; students,
features and the like are of videos, so that it is run, cached and planned. The pipeline can make further passes a step,
with self-attention passed over in some blocks and with the streams apart; each has a context of its own. Here it makes
none unless told, and guides sound as the video. What is planned is LTX-2 itself: 2.3 has more modulation.
"""

from vidaccel.families.base import (
    BlockList,
    Condition,
    Denoiser,
    DiTFamily,
    Guidance,
    SamplingDefaults,
    SequenceSplit,
    SizedInput,
    TextTensor,
)
from vidaccel.families.costs import Argument, BlockCosts, FamilyCosts

_AUDIO = ("audio_num_attention_heads", "audio_attention_head_dim")
_MASK = Argument((1, 1, "text"))
_ROTATIONS = {
    "video_rotary_emb": Argument((1, "video", "width"), "float32", copies=2),
    "audio_rotary_emb": Argument((1, "audio", _AUDIO), "float32", copies=2),
    "ca_video_rotary_emb": Argument((1, "video", "audio_cross_attention_dim"), "float32", copies=2),
    "ca_audio_rotary_emb": Argument((1, "audio", "audio_cross_attention_dim"), "float32", copies=2),
}

LTX2 = DiTFamily(
    name="ltx2",
    title="LTX-2",
    pipelines=("LTX2Pipeline",),
    transformer="LTX2VideoTransformer3DModel",
    denoisers=(Denoiser("transformer"),),
    block_lists=(
        BlockList(
            "transformer_blocks",
            arguments=(
                "hidden_states",
                "audio_hidden_states",
                "encoder_hidden_states",
                "audio_encoder_hidden_states",
                "temb",
                "temb_audio",
                "temb_ca_scale_shift",
                "temb_ca_audio_scale_shift",
                "temb_ca_gate",
                "temb_ca_audio_gate",
                "temb_prompt",
                "temb_prompt_audio",
                *_ROTATIONS,
                "encoder_attention_mask",
                "audio_encoder_attention_mask",
            ),
            returns=("hidden_states", "audio_hidden_states"),
            keywords=True,
            mask="encoder_attention_mask",
            branches=(
                "attn1",
                "audio_attn1",
                "attn2",
                "audio_attn2",
                "audio_to_video_attn",
                "video_to_audio_attn",
                "ff",
                "audio_ff",
            ),
            residual_layers=(
                "attn1.to_out.0",
                "audio_attn1.to_out.0",
                "attn2.to_out.0",
                "audio_attn2.to_out.0",
                "audio_to_video_attn.to_out.0",
                "video_to_audio_attn.to_out.0",
                "ff.net.2",
                "audio_ff.net.2",
            ),
            widths={"audio_hidden_states": _AUDIO},
        ),
    ),
    timestep_embedder="time_embed.emb.timestep_embedder",
    text_tensors=(
        TextTensor(
            None,
            "encoder_hidden_states",
            stored="prompt_embeds",
            shape=("prompt", "caption_channels"),
            mask="encoder_attention_mask",
            least=1,  # attention over no text at all is not a number
        ),
        TextTensor(
            None,
            "audio_encoder_hidden_states",
            stored="audio_prompt_embeds",
            shape=("prompt", "caption_channels"),
            mask="audio_encoder_attention_mask",
            least=1,
        ),
        TextTensor(None, "encoder_attention_mask", stored="prompt_mask", shape=("prompt",)),
        TextTensor(None, "audio_encoder_attention_mask", stored="audio_prompt_mask", shape=("prompt",)),
    ),
    guidance=Guidance(cfg_argument="guidance_scale", doubled=True, single_contexts=("uncond_stg", "uncond_modality")),
    defaults=SamplingDefaults(steps=30, guidance=3.0, num_frames=121, height=512, width=768, fps=24, shift=7.8),
    size_multiple=32,
    costs=FamilyCosts(
        layers=(
            ("proj_in", "video"),
            ("proj_out", "video"),
            ("audio_proj_in", "audio"),
            ("audio_proj_out", "audio"),
            ("*caption_projection.*", "prompt"),
            ("*", "one"),
        ),
        attentions={},
        blocks={
            "transformer_blocks": BlockCosts(
                layers=(
                    ("audio_to_video_attn.to_[kv]", "audio"),
                    ("audio_to_video_attn.*", "video"),
                    ("video_to_audio_attn.to_[kv]", "video"),
                    ("video_to_audio_attn.*", "audio"),
                    ("*attn2.to_[kv]", "prompt"),
                    ("audio_*", "audio"),
                    ("*", "video"),
                ),
                attentions=(
                    ("video", "video"),
                    ("video", "prompt"),
                    ("audio", "audio", *_AUDIO),
                    ("audio", "prompt", *_AUDIO),
                    ("video", "audio", *_AUDIO),
                    ("audio", "video", *_AUDIO),
                ),
                branches=("video", "audio") * 4,
                arguments={
                    "audio_encoder_hidden_states": Argument((1, "text", _AUDIO)),
                    "temb": Argument((1, 1, 6, "width")),
                    "temb_audio": Argument((1, 1, 6, _AUDIO)),
                    "temb_ca_scale_shift": Argument((1, 1, 4, "width")),
                    "temb_ca_audio_scale_shift": Argument((1, 1, 4, _AUDIO)),
                    "temb_ca_gate": Argument((1, 1, 1, "width")),
                    "temb_ca_audio_gate": Argument((1, 1, 1, _AUDIO)),
                    "temb_prompt": None,
                    "temb_prompt_audio": None,
                    **_ROTATIONS,
                    "encoder_attention_mask": _MASK,
                    "audio_encoder_attention_mask": _MASK,
                },
            ),
        },
        fusions=("video", "audio"),
        static_embedders=(
            *_ROTATIONS.values(),
            Argument((1, "prompt", "width")),
            Argument((1, "prompt", _AUDIO)),
        ),
    ),
    latents="tokens",
    sized_inputs=(
        SizedInput("num_frames", ("frames",)),
        SizedInput("height", ("height",)),
        SizedInput("width", ("width",)),
    ),
    compression=(8, 32),
    compression_attributes=("vae_temporal_compression_ratio", "vae_spatial_compression_ratio"),
    frame_rate="frame_rate",
    call={
        "stg_scale": 0.0,
        "modality_scale": 1.0,
        "audio_guidance_scale": None,
        "audio_stg_scale": None,
        "audio_modality_scale": None,
    },
    static_embedders=(
        "rope",
        "audio_rope",
        "cross_attn_rope",
        "cross_attn_audio_rope",
        "caption_projection",
        "audio_caption_projection",
    ),
    conditions=(
        Condition(
            "audio",
            "audio_hidden_states",
            tokens="audio",
            width_config="audio_in_channels",
            counted="audio_num_frames",
            made_of="audio_latents",
        ),
    ),
    # diffusers' own plan (0.42.1) is for one kind of rotations, leaves audio whole and fails on the mask of the text.
    split=SequenceSplit(
        outputs={
            **dict.fromkeys(("proj_in", "audio_proj_in"), (1,)),
            # [B, N, D] or, of heads, [B, H, N, D / 2]
            **dict.fromkeys(("rope", "audio_rope", "cross_attn_rope", "cross_attn_audio_rope"), (-2, -2)),
        },
        gathered=("proj_out", "audio_proj_out"),
        beside=("audio_hidden_states",),
        local=("attn2", "audio_attn2"),
    ),
    untrained="makes sound beside its videos",
)
