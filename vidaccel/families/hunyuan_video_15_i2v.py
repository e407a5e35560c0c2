"""HunyuanVideo-1.5, image to video: the text-to-video transformer with the image in the place of its blanks.

The image's latent stands in the first frame of the further channels, with a mask behind it, and SigLIP's tokens beside
the text. The pipeline takes no height and width: it chooses among sizes of its own by the image's.
"""

from dataclasses import replace

from vidaccel.families.base import Condition
from vidaccel.families.hunyuan_video_15 import HUNYUAN_VIDEO_15

HUNYUAN_VIDEO_15_I2V = replace(
    HUNYUAN_VIDEO_15,
    name="hunyuan_video_15_i2v",
    title="HunyuanVideo-1.5 image to video",
    pipelines=("HunyuanVideo15ImageToVideoPipeline",),
    blank_inputs=(),
    conditions=(
        Condition("image_latents"),
        Condition("image_embeds", "image_embeds", tokens="image", width_config="image_embed_dim"),
    ),
    sized_by_image=True,
)
