"""The families that vidaccel knows, and which of them a pipeline class belongs to."""

from vidaccel.errors import UserError
from vidaccel.families.base import DiTFamily
from vidaccel.families.cogvideox import COGVIDEOX
from vidaccel.families.hunyuan_video import HUNYUAN_VIDEO
from vidaccel.families.hunyuan_video_15 import HUNYUAN_VIDEO_15
from vidaccel.families.hunyuan_video_15_i2v import HUNYUAN_VIDEO_15_I2V
from vidaccel.families.ltx_video import LTX_VIDEO
from vidaccel.families.wan import WAN
from vidaccel.families.wan_i2v import WAN_I2V

FAMILIES: dict[str, DiTFamily] = {
    family.name: family
    for family in (COGVIDEOX, HUNYUAN_VIDEO, HUNYUAN_VIDEO_15, HUNYUAN_VIDEO_15_I2V, LTX_VIDEO, WAN, WAN_I2V)
}
"""Every family by name."""

PIPELINES: dict[str, DiTFamily] = {name: family for family in FAMILIES.values() for name in family.pipelines}
"""Every family by the diffusers pipeline classes it describes."""


def family_of_pipeline(class_name: str) -> DiTFamily:
    """The family of a diffusers pipeline class; `UserError` naming the supported classes if there is none."""
    if class_name not in PIPELINES:
        raise UserError(f"no model family is known for the pipeline {class_name}", f"supported: {', '.join(PIPELINES)}")
    return PIPELINES[class_name]
