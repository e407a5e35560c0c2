"""SkyReels V2, image to video: fed with an image as Wan 2.1 is."""

from dataclasses import replace

from vidaccel.families.skyreels_v2 import SKYREELS_V2, unmasked
from vidaccel.families.wan_i2v import WAN_I2V

SKYREELS_V2_I2V = replace(
    SKYREELS_V2,
    name="skyreels_v2_i2v",
    title="SkyReels V2 image to video",
    pipelines=("SkyReelsV2ImageToVideoPipeline",),
    defaults=replace(SKYREELS_V2.defaults, guidance=5.0, shift=5.0),
    costs=replace(WAN_I2V.costs, blocks={name: unmasked(each) for name, each in WAN_I2V.costs.blocks.items()}),
    static_embedders=WAN_I2V.static_embedders,
    conditions=WAN_I2V.conditions,
)
