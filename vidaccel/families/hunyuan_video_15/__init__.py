"""HunyuanVideo-1.5, text to video: double-stream blocks only, CFG by a guider component.

diffusers' `TransformerBlockRegistry` does not know its blocks (0.42), and its pipeline never passes `timestep_r`, which
a transformer built with `use_meanflow` takes. Defaults are those of the 480p model.
"""

from vidaccel.families.base import BlankInput, BlockList, Denoiser, DiTFamily, Guidance, SamplingDefaults, TextTensor

TOKENS = ("hidden_states", "encoder_hidden_states")

HUNYUAN_VIDEO_15 = DiTFamily(
    name="hunyuan_video_15",
    title="HunyuanVideo-1.5",
    pipelines=("HunyuanVideo15Pipeline",),
    transformer="HunyuanVideo15Transformer3DModel",
    denoisers=(Denoiser("transformer"),),
    block_lists=(
        BlockList("transformer_blocks", arguments=(*TOKENS, "temb", "attention_mask", "freqs_cis"), returns=TOKENS),
    ),
    timestep_embedder="time_embed.timestep_embedder",
    text_tensors=(
        TextTensor("prompt_embeds", "encoder_hidden_states", stored="prompt_embeds"),
        TextTensor("prompt_embeds_mask", "encoder_attention_mask", stored="prompt_mask"),
        TextTensor("prompt_embeds_2", "encoder_hidden_states_2", stored="prompt_embeds_2"),
        TextTensor("prompt_embeds_mask_2", "encoder_attention_mask_2", stored="prompt_mask_2"),
    ),
    guidance=Guidance(cfg_argument=None, guider="guider"),
    defaults=SamplingDefaults(steps=50, guidance=6.0, num_frames=121, height=480, width=848, fps=24, shift=5.0),
    size_multiple=16,
    batched_autoencoder=False,  # the mask of its attention fits one video (diffusers 0.42.1)
    static_embedders=("rope", "context_embedder", "context_embedder_2", "image_embedder"),
    r_config="use_meanflow",
    r_argument="timestep_r",
    blank_inputs=(BlankInput("image_embeds", tokens=729, width_config="image_embed_dim"),),
)
