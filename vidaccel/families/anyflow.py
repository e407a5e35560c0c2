"""AnyFlow, text to video: Wan's trunk as a flow map, which is told of each latent frame where its step begins and ends.

Its released models are students of mean velocities, with guidance inside, for any number of steps. The embedding of the
end is mixed with that of the beginning, and both are repeated for every token, so that blocks get a modulation of each.
Its pipeline tells r itself, takes latents frame by frame and makes the two passes of guidance, where there are any, in
one doubled batch. KV-cached models, of `AnyFlowFARPipeline`, are refused.
"""

from dataclasses import replace

from vidaccel.families.base import Guidance
from vidaccel.families.costs import Argument
from vidaccel.families.wan import WAN

(_BLOCKS,) = WAN.block_lists
_COSTS = WAN.costs
_ARGUMENTS = {
    "temb": Argument((1, "video", 6, "width")),
    "rotary_emb": Argument((1, 1, "video", "half"), "complex128", names=("query", "key")),
    "attention_mask": None,
}

ANYFLOW = replace(
    WAN,
    name="anyflow",
    title="AnyFlow",
    pipelines=("AnyFlowPipeline",),
    transformer="AnyFlowTransformer3DModel",
    block_lists=(replace(_BLOCKS, arguments=(*_BLOCKS.arguments, "attention_mask")),),
    guidance=Guidance(cfg_argument="guidance_scale", doubled=True),
    defaults=replace(WAN.defaults, guidance=1.0, shift=5.0),
    costs=replace(
        _COSTS,
        layers=(
            ("condition_embedder.time_*", "frames"),
            ("condition_embedder.delta_embedder.*", "frames"),
            *_COSTS.layers,
        ),
        blocks={"blocks": replace(_COSTS.blocks["blocks"], arguments=_ARGUMENTS)},
        static_embedders=(Argument((1, "prompt", "width")),),
    ),
    r_argument="r_timestep",
    times_per_frame=True,
    latents="BTCHW",
    rotary=None,
    static_embedders=("condition_embedder.text_embedder",),
    split=None,
    fused=None,
)
