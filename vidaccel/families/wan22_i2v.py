"""Wan 2.2 A14B, image to video: channels of the image stand beside the latent's, as in Wan 2.1, and no tokens of it."""

from dataclasses import replace

from vidaccel.families.base import Condition
from vidaccel.families.wan22 import WAN22

_FIRST, _SECOND = WAN22.denoisers

WAN22_I2V = replace(
    WAN22,
    name="wan22_i2v",
    title="Wan 2.2 A14B image to video",
    pipelines=("WanImageToVideoPipeline",),
    denoisers=(replace(_FIRST, until=0.9), _SECOND),
    defaults=replace(WAN22.defaults, guidance=3.5, guidance_2=3.5, shift=5.0),
    conditions=(Condition("image_latents"),),
)
