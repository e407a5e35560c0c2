"""HunyuanVideo, text to video: double-stream blocks, then single-stream blocks on [video; text].

What HunyuanVideo-1.5 has in common with it is named here and used there.
"""

from vidaccel.families.base import (
    BlockList,
    DecoderConfig,
    Denoiser,
    DiTFamily,
    Guidance,
    SamplingDefaults,
    SequenceSplit,
    TextTensor,
)
from vidaccel.families.costs import Argument, BlockCosts, FamilyCosts

TOKENS = ("hidden_states", "encoder_hidden_states")
DOUBLE_STREAM = BlockList(
    "transformer_blocks",
    arguments=(*TOKENS, "temb", "attention_mask", "freqs_cis"),
    returns=TOKENS,
    mask="attention_mask",
    branches=("attn", "ff", "ff_context"),
    residual_layers=("attn.to_out.0", "attn.to_add_out", "ff.net.2", "ff_context.net.2"),
)
ROTATIONS = Argument(("video", "head"), "float32", copies=2)
SPLIT = SequenceSplit(outputs={"rope": (0, 0), "x_embedder": (1,)})
CONDITIONING_LAYERS = (("*time_text_embed.*", "one"), ("*.norm_out.*", "one"))
"""Within the text refiner too."""
REFINER_ATTENTIONS = {"context_embedder.token_refiner.refiner_blocks": (("prompt", "prompt"),)}


def double_stream_costs(mask: Argument) -> BlockCosts:
    """Of a double-stream block that is given such a mask."""
    return BlockCosts(
        layers=(
            ("norm*", "one"),
            ("attn.add_*", "text"),
            ("attn.to_add_out", "text"),
            ("ff_context.*", "text"),
            ("*", "video"),
        ),
        attentions=(("all", "all"),),
        branches=("all", "all"),
        arguments={"temb": Argument((1, "width")), "attention_mask": mask, "freqs_cis": ROTATIONS},
    )


_MASK = Argument((1, 1, 1, "all"), "bool")

HUNYUAN_VIDEO = DiTFamily(
    name="hunyuan_video",
    title="HunyuanVideo",
    pipelines=("HunyuanVideoPipeline",),
    transformer="HunyuanVideoTransformer3DModel",
    denoisers=(Denoiser("transformer"),),
    block_lists=(
        DOUBLE_STREAM,
        BlockList(
            "single_transformer_blocks",
            arguments=(*TOKENS, "temb", "attention_mask", "image_rotary_emb"),
            returns=TOKENS,
            joint=True,
            mask="attention_mask",
            branches=("proj_out",),
            feeding=("attn", "proj_mlp"),
            residual_layers=("proj_out",),
        ),
    ),
    timestep_embedder="time_text_embed.timestep_embedder",
    text_tensors=(
        TextTensor(
            "prompt_embeds",
            "encoder_hidden_states",
            stored="prompt_embeds",
            shape=("prompt", "text_embed_dim"),
            mask="encoder_attention_mask",
            least=1,  # the refiner averages over it
        ),
        TextTensor("pooled_prompt_embeds", "pooled_projections", stored="pooled", shape=("pooled_projection_dim",)),
        TextTensor("prompt_attention_mask", "encoder_attention_mask", stored="prompt_mask", shape=("prompt",)),
    ),
    guidance=Guidance(cfg_argument="true_cfg_scale", embedded_argument="guidance_scale"),
    defaults=SamplingDefaults(steps=50, guidance=6.0, num_frames=129, height=720, width=1280, fps=24, shift=5.0),
    size_multiple=16,
    costs=FamilyCosts(
        layers=(
            ("x_embedder.*", "video"),
            ("proj_out", "video"),
            *CONDITIONING_LAYERS,
            ("context_embedder.*", "prompt"),
            ("*", "one"),
        ),
        attentions=REFINER_ATTENTIONS,
        blocks={
            "transformer_blocks": double_stream_costs(_MASK),
            "single_transformer_blocks": BlockCosts(
                layers=(("norm.*", "one"), ("*", "all")),
                attentions=(("all", "all"),),
                branches=("all",),
                arguments={"temb": Argument((1, "width")), "attention_mask": _MASK, "image_rotary_emb": ROTATIONS},
            ),
        },
        fusions=("all",),
        static_embedders=(ROTATIONS, Argument((1, "prompt", "width"))),
    ),
    rounds_times=True,
    rotary="rope",
    static_embedders=("rope", "context_embedder"),
    g_config="guidance_embeds",
    g_argument="guidance",
    chunked_autoencoder="AutoencoderKLHunyuanVideo",
    split=SPLIT,
    fused="vidaccel.families.hunyuan_video.fused",
    decoder=DecoderConfig("block_out_channels", "layers_per_block"),
)
