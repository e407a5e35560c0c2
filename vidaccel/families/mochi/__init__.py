"""Mochi, text to video: double-stream blocks whose text is narrower than the video, gated behind a norm.

Its times rise from noise to the video, where its velocities lead as well; its pipeline gives the scheduler times of its
own, half of them in small even steps, and makes the two passes of guidance in one doubled batch. Residual branches end
in a norm, so that what makes a block the identity is its gates, which come from the modulation. The last block leaves
texts as they are. Attention takes a mask and leaves out what it masks.
"""

from vidaccel.families.base import BlockList, Denoiser, DiTFamily, Guidance, SamplingDefaults, TextTensor
from vidaccel.families.costs import Argument, BlockCosts, FamilyCosts

_TOKENS = ("hidden_states", "encoder_hidden_states")

MOCHI = DiTFamily(
    name="mochi",
    title="Mochi",
    pipelines=("MochiPipeline",),
    transformer="MochiTransformer3DModel",
    denoisers=(Denoiser("transformer"),),
    block_lists=(
        BlockList(
            "transformer_blocks",
            arguments=(*_TOKENS, "temb", "encoder_attention_mask", "image_rotary_emb"),
            returns=_TOKENS,
            keywords=True,
            mask="encoder_attention_mask",
            branches=("attn1", "ff", "ff_context"),
            residual_layers=("norm1.linear", "norm1_context.linear"),
            widths={"encoder_hidden_states": ("pooled_projection_dim",)},
        ),
    ),
    timestep_embedder="time_embed.timestep_embedder",
    text_tensors=(
        TextTensor(
            "prompt_embeds",
            "encoder_hidden_states",
            stored="prompt_embeds",
            shape=("prompt", "text_embed_dim"),
            mask="encoder_attention_mask",
        ),
        TextTensor("prompt_attention_mask", "encoder_attention_mask", stored="prompt_mask", shape=("prompt",)),
    ),
    guidance=Guidance(cfg_argument="guidance_scale", doubled=True),
    defaults=SamplingDefaults(steps=64, guidance=4.5, num_frames=19, height=480, width=848, fps=30, shift=None),
    size_multiple=16,
    costs=FamilyCosts(
        layers=(
            ("patch_embed.proj", "video"),
            ("proj_out", "video"),
            ("time_embed.caption_proj", "prompt"),
            ("time_embed.pooler.to_kv", "prompt+1"),
            ("*", "one"),
        ),
        attentions={"time_embed.pooler": (("one", "prompt+1", "text_embed_dim"),)},
        blocks={
            "transformer_blocks": BlockCosts(
                layers=(
                    ("norm*", "one"),
                    ("attn1.add_*", "text"),
                    ("attn1.to_add_out", "text"),
                    ("ff_context.*", "text"),
                    ("*", "video"),
                ),
                attentions=(("all", "all"),),
                branches=("video", "text", "video", "text"),
                arguments={
                    "temb": Argument((1, "width")),
                    "encoder_attention_mask": Argument((1, "text"), "bool"),
                    "image_rotary_emb": Argument(("video", "num_attention_heads", "half"), "float32", copies=2),
                },
            ),
        },
        fusions=("video", "text"),
        static_embedders=(
            Argument(("video", "num_attention_heads", "half"), "float32", copies=2),
            Argument((1, "width")),
            Argument((1, "prompt", "pooled_projection_dim")),
        ),
        products={"rope": ("pos_frequencies", "video")},
    ),
    rises=True,
    times="vidaccel.families.mochi.times:times",
    rounds_times=True,
    least_steps=2,
    compression=(6, 8),
    compression_attributes=("vae_temporal_scale_factor", "vae_spatial_scale_factor"),
    static_embedders=("rope", "time_embed.pooler", "time_embed.caption_proj"),
    needs_mask=True,
)
