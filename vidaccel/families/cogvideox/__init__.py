"""CogVideoX, text to video: one list of blocks on [text; video] as one sequence, with a modulation each.

It predicts v of a diffusion process, is sampled by DDIM with timesteps of its own, takes latents frame by frame
[B, T, C, H, W], makes the two passes of guidance in one doubled batch, and has rotations made by its pipeline (but for
the 2B model, which adds positions to the tokens). The embedding of its timestep is narrower than its tokens.
"""

from vidaccel.families.base import (
    BlockList,
    DecoderConfig,
    Denoiser,
    DiTFamily,
    Guidance,
    SamplingDefaults,
    SizedInput,
    TextTensor,
)
from vidaccel.families.costs import Argument, BlockCosts, FamilyCosts

COGVIDEOX = DiTFamily(
    name="cogvideox",
    title="CogVideoX",
    pipelines=("CogVideoXPipeline",),
    transformer="CogVideoXTransformer3DModel",
    denoisers=(Denoiser("transformer"),),
    block_lists=(
        BlockList(
            "transformer_blocks",
            arguments=("hidden_states", "encoder_hidden_states", "temb", "image_rotary_emb"),
            returns=("hidden_states", "encoder_hidden_states"),
            keywords=True,
            joint=True,
            branches=("attn1", "ff"),
            residual_layers=("attn1.to_out.0", "ff.net.2"),
        ),
    ),
    timestep_embedder="time_embedding",
    text_tensors=(
        TextTensor(
            "prompt_embeds", "encoder_hidden_states", stored="prompt_embeds", shape=("prompt", "text_embed_dim")
        ),
    ),
    guidance=Guidance(cfg_argument="guidance_scale", doubled=True),
    defaults=SamplingDefaults(steps=50, guidance=6.0, num_frames=49, height=480, width=720, fps=8, shift=None),
    size_multiple=16,
    costs=FamilyCosts(
        layers=(
            ("patch_embed.proj", "video"),
            ("patch_embed.text_proj", "prompt"),
            ("proj_out", "video"),
            ("*", "one"),
        ),
        attentions={},
        blocks={
            "transformer_blocks": BlockCosts(
                layers=(("norm*", "one"), ("*", "all")),
                attentions=(("all", "all"),),
                branches=("video", "text", "all"),
                arguments={
                    "temb": Argument((1, "time_embed_dim")),
                    "image_rotary_emb": Argument(("video", "head"), "float32", copies=2),
                },
            ),
        },
        fusions=("all",),
        static_embedders=(Argument((1, "prompt", "width")),),
    ),
    predicts="v",
    latents="BTCHW",
    latent_frame_step=2,
    chunked_autoencoder="AutoencoderKLCogVideoX",
    sized_inputs=(SizedInput("image_rotary_emb", function="vidaccel.families.cogvideox.rotary:rotations"),),
    static_embedders=("patch_embed.text_proj",),
    decoder=DecoderConfig("block_out_channels", "layers_per_block"),
)
