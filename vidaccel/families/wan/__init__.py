"""Wan 2.1, text to video: one list of blocks with cross-attention, so text goes in and does not come out.

The timestep embedding is taken from the inner `time_embedder`: the blocks' modulation and the output head's both derive
from it. Defaults are those of the 480p models.
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

_ROTATIONS = Argument((1, "video", 1, "head"), "float32", copies=2)

WAN = DiTFamily(
    name="wan",
    title="Wan 2.1",
    pipelines=("WanPipeline",),
    transformer="WanTransformer3DModel",
    denoisers=(Denoiser("transformer"),),
    block_lists=(
        BlockList(
            "blocks",
            arguments=("hidden_states", "encoder_hidden_states", "temb", "rotary_emb"),
            returns=("hidden_states",),
            branches=("attn1", "attn2", "ffn"),
            residual_layers=("attn1.to_out.0", "attn2.to_out.0", "ffn.net.2"),
        ),
    ),
    timestep_embedder="condition_embedder.time_embedder",
    text_tensors=(
        TextTensor("prompt_embeds", "encoder_hidden_states", stored="prompt_embeds", shape=("prompt", "text_dim")),
    ),
    guidance=Guidance(cfg_argument="guidance_scale"),
    defaults=SamplingDefaults(steps=50, guidance=5.0, num_frames=81, height=480, width=832, fps=16, shift=3.0),
    size_multiple=16,
    costs=FamilyCosts(
        layers=(
            ("patch_embedding", "video"),
            ("proj_out", "video"),
            ("condition_embedder.text_embedder.*", "prompt"),
            ("*", "one"),
        ),
        attentions={},
        blocks={
            "blocks": BlockCosts(
                layers=(("attn2.to_[kv]", "text"), ("*", "video")),
                attentions=(("video", "video"), ("video", "text")),
                branches=("video", "video", "video"),
                arguments={"temb": Argument((1, 6, "width")), "rotary_emb": _ROTATIONS},
            ),
        },
        fusions=("video",),
        static_embedders=(_ROTATIONS, Argument((1, "prompt", "width"))),
    ),
    rotary="rope",
    static_embedders=("rope", "condition_embedder.text_embedder"),
    chunked_autoencoder="AutoencoderKLWan",
    split=SequenceSplit(),
    fused="vidaccel.families.wan.fused",
    decoder=DecoderConfig("decoder_base_dim", "num_res_blocks", base="base_dim"),
)
