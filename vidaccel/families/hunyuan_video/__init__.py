"""HunyuanVideo, text to video: double-stream blocks, then single-stream blocks on [video; text]."""

from vidaccel.families.base import BlockList, Denoiser, DiTFamily, Guidance, SamplingDefaults, TextTensor

TOKENS = ("hidden_states", "encoder_hidden_states")

HUNYUAN_VIDEO = DiTFamily(
    name="hunyuan_video",
    title="HunyuanVideo",
    pipelines=("HunyuanVideoPipeline",),
    transformer="HunyuanVideoTransformer3DModel",
    denoisers=(Denoiser("transformer"),),
    block_lists=(
        BlockList("transformer_blocks", arguments=(*TOKENS, "temb", "attention_mask", "freqs_cis"), returns=TOKENS),
        BlockList(
            "single_transformer_blocks",
            arguments=(*TOKENS, "temb", "attention_mask", "image_rotary_emb"),
            returns=TOKENS,
            joint=True,
        ),
    ),
    timestep_embedder="time_text_embed.timestep_embedder",
    text_tensors=(
        TextTensor("prompt_embeds", "encoder_hidden_states", stored="prompt_embeds"),
        TextTensor("pooled_prompt_embeds", "pooled_projections", stored="pooled"),
        TextTensor("prompt_attention_mask", "encoder_attention_mask", stored="prompt_mask"),
    ),
    guidance=Guidance(cfg_argument="true_cfg_scale", embedded_argument="guidance_scale"),
    defaults=SamplingDefaults(steps=50, guidance=6.0, num_frames=129, height=720, width=1280, fps=24, shift=5.0),
    size_multiple=16,
    static_embedders=("rope", "context_embedder"),
    g_config="guidance_embeds",
    g_argument="guidance",
)
