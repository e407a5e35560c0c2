"""CogVideoX, image to video: the image's latent stands behind the noise in the first frame, in channels of its own."""

from dataclasses import replace

from vidaccel.families.base import Condition
from vidaccel.families.cogvideox import COGVIDEOX

COGVIDEOX_I2V = replace(
    COGVIDEOX,
    name="cogvideox_i2v",
    title="CogVideoX image to video",
    pipelines=("CogVideoXImageToVideoPipeline",),
    conditions=(Condition("image_latents"),),
    batched=False,  # it takes one image for each prompt
)
