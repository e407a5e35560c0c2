"""Wan 2.1, image to video: Wan's trunk, fed with channels of the image beside the latent's and, before the text, tokens
of CLIP's image encoder.

diffusers (0.42.1) takes all but the last 512 tokens of the blocks' text for the image's, so that a text has 512. Other
models of the same pipeline class, Wan 2.2's, have no image encoder.
"""

from dataclasses import replace

from vidaccel.families.base import Condition
from vidaccel.families.costs import Argument
from vidaccel.families.wan import WAN

_COSTS = WAN.costs
_BLOCKS = replace(
    _COSTS.blocks["blocks"],
    layers=(("attn2.add_[kv]_proj", "image"), ("attn2.to_[kv]", "prompt"), ("*", "video")),
    attentions=(("video", "video"), ("video", "prompt"), ("video", "image")),
)

WAN_I2V = replace(
    WAN,
    name="wan_i2v",
    title="Wan 2.1 image to video",
    pipelines=("WanImageToVideoPipeline",),
    conditions=(
        Condition("image_latents"),
        Condition("image_embeds", "encoder_hidden_states_image", tokens="image", width_config="image_dim"),
    ),
    costs=replace(
        _COSTS,
        layers=(("condition_embedder.image_embedder.*", "image"), *_COSTS.layers),
        blocks={"blocks": _BLOCKS},
        static_embedders=(*_COSTS.static_embedders, Argument((1, "image", "width"))),
    ),
    static_embedders=(*WAN.static_embedders, "condition_embedder.image_embedder"),
)
