"""Wan 2.1 VACE, text to video under control: Wan's trunk, to which blocks of its own beside it add hints.

Those blocks run first, on what a control video, a mask and reference images become, and what they give is added after
some blocks of the trunk. Called without any of these, the pipeline makes a video of text alone. Reference images stand
in latent frames of their own before the video's.
"""

from dataclasses import replace

from vidaccel.families.base import BlockList, Condition
from vidaccel.families.costs import Argument
from vidaccel.families.wan import WAN

_COSTS = WAN.costs
_TRUNK = _COSTS.blocks["blocks"]
_HINTS = BlockList(
    "vace_blocks",
    arguments=("hidden_states", "encoder_hidden_states", "control_hidden_states", "temb", "rotary_emb"),
    returns=("conditioning_states", "control_hidden_states"),
    added_after="vace_layers",
)

WAN_VACE = replace(
    WAN,
    name="wan_vace",
    title="Wan 2.1 VACE",
    pipelines=("WanVACEPipeline",),
    transformer="WanVACETransformer3DModel",
    side_lists=(_HINTS,),
    costs=replace(
        _COSTS,
        layers=(("vace_patch_embedding", "video"), *_COSTS.layers),
        blocks={
            "blocks": _TRUNK,
            "vace_blocks": replace(
                _TRUNK,
                branches=(),
                arguments={**_TRUNK.arguments, "control_hidden_states": Argument((1, "video", "width"))},
            ),
        },
    ),
    conditions=(Condition("control", "control_hidden_states", channels_config="vace_in_channels", made_of="video"),),
    split=None,
    batched=False,
    untrained="is called with a control video, a mask and images",
)
