"""Wan 2.1, text to video: one list of blocks with cross-attention, so text goes in and does not come out.

The timestep embedding is taken from the inner `time_embedder`: the blocks' modulation and the output head's both derive
from it. Defaults are those of the 480p models.
"""

from vidaccel.families.base import BlockList, Denoiser, DiTFamily, Guidance, SamplingDefaults, TextTensor

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
        ),
    ),
    timestep_embedder="condition_embedder.time_embedder",
    text_tensors=(TextTensor("prompt_embeds", "encoder_hidden_states", stored="prompt_embeds"),),
    guidance=Guidance(cfg_argument="guidance_scale"),
    defaults=SamplingDefaults(steps=50, guidance=5.0, num_frames=81, height=480, width=832, fps=16, shift=3.0),
    size_multiple=16,
    static_embedders=("rope", "condition_embedder.text_embedder"),
)
