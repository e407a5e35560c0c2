"""LTX-Video 0.9, text to video: Wan's kind of block, called by keyword, on a long dimension of latent channels.

Its pipeline packs latents to tokens, makes the two passes of guidance in one doubled batch, tells the transformer the
size and the frame rate of the video, and shifts its step grid by the number of tokens, down to a last time that is not
small. The autoencoder of 0.9.1 and later takes the last step of denoising itself, at `decode_timestep`.
"""

from vidaccel.families.base import (
    BlockList,
    DecoderConfig,
    Denoiser,
    DiTFamily,
    Guidance,
    SamplingDefaults,
    SequenceSplit,
    SizedInput,
    TextTensor,
)
from vidaccel.families.costs import Argument, BlockCosts, FamilyCosts

_ROTATIONS = Argument((1, "video", "width"), "float32", copies=2)

LTX_VIDEO = DiTFamily(
    name="ltx_video",
    title="LTX-Video",
    pipelines=("LTXPipeline",),
    transformer="LTXVideoTransformer3DModel",
    denoisers=(Denoiser("transformer"),),
    block_lists=(
        BlockList(
            "transformer_blocks",
            arguments=("hidden_states", "encoder_hidden_states", "temb", "image_rotary_emb", "encoder_attention_mask"),
            returns=("hidden_states",),
            keywords=True,
            mask="encoder_attention_mask",
            branches=("attn1", "attn2", "ff"),
            residual_layers=("attn1.to_out.0", "attn2.to_out.0", "ff.net.2"),
        ),
    ),
    timestep_embedder="time_embed.emb.timestep_embedder",
    text_tensors=(
        TextTensor(
            "prompt_embeds",
            "encoder_hidden_states",
            stored="prompt_embeds",
            shape=("prompt", "caption_channels"),
            mask="encoder_attention_mask",
            least=1,  # attention over no text at all is not a number
        ),
        TextTensor("prompt_attention_mask", "encoder_attention_mask", stored="prompt_mask", shape=("prompt",)),
    ),
    guidance=Guidance(cfg_argument="guidance_scale", doubled=True),
    # The shift is that of its largest trained number of tokens, 4096: e^2.05.
    defaults=SamplingDefaults(steps=50, guidance=3.0, num_frames=161, height=512, width=704, fps=25, shift=7.8),
    size_multiple=32,
    costs=FamilyCosts(
        layers=(("proj_in", "video"), ("proj_out", "video"), ("caption_projection.*", "prompt"), ("*", "one")),
        attentions={},
        blocks={
            "transformer_blocks": BlockCosts(
                layers=(("attn2.to_[kv]", "text"), ("*", "video")),
                attentions=(("video", "video"), ("video", "text")),
                branches=("video", "video", "video"),
                arguments={
                    "temb": Argument((1, 1, 6, "width")),
                    "image_rotary_emb": _ROTATIONS,
                    "encoder_attention_mask": Argument((1, 1, "text")),
                },
            ),
        },
        fusions=("video",),
        static_embedders=(_ROTATIONS, Argument((1, "prompt", "width"))),
    ),
    latents="tokens",
    sized_inputs=(
        SizedInput("num_frames", ("frames",)),
        SizedInput("height", ("height",)),
        SizedInput("width", ("width",)),
        SizedInput("rope_interpolation_scale", ("seconds", "pixels", "pixels")),
    ),
    compression=(8, 32),
    compression_attributes=("vae_temporal_compression_ratio", "vae_spatial_compression_ratio"),
    frame_rate="frame_rate",
    call={"decode_timestep": 0.05, "decode_noise_scale": 0.025},
    rotary="rope",
    static_embedders=("rope", "caption_projection"),
    # diffusers' own plan (0.42.1) splits the text as well, and fails on its mask.
    split=SequenceSplit(outputs={"rope": (1, 1), "proj_in": (1,)}, local=("attn2",)),
    decoder=DecoderConfig("decoder_block_out_channels", "decoder_layers_per_block"),
)
