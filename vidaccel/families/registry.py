"""The families that vidaccel knows, and which of them a pipeline class belongs to."""

from collections.abc import Collection
from typing import Any

from vidaccel.errors import UserError
from vidaccel.families.anyflow import ANYFLOW
from vidaccel.families.base import DiTFamily
from vidaccel.families.cogvideox import COGVIDEOX
from vidaccel.families.cogvideox_i2v import COGVIDEOX_I2V
from vidaccel.families.hunyuan_video import HUNYUAN_VIDEO
from vidaccel.families.hunyuan_video_15 import HUNYUAN_VIDEO_15
from vidaccel.families.hunyuan_video_15_i2v import HUNYUAN_VIDEO_15_I2V
from vidaccel.families.hunyuan_video_i2v import HUNYUAN_VIDEO_I2V
from vidaccel.families.ltx2 import LTX2
from vidaccel.families.ltx_video import LTX_VIDEO
from vidaccel.families.mochi import MOCHI
from vidaccel.families.sana_video import SANA_VIDEO
from vidaccel.families.skyreels_v2 import SKYREELS_V2
from vidaccel.families.skyreels_v2_i2v import SKYREELS_V2_I2V
from vidaccel.families.wan import WAN
from vidaccel.families.wan22 import WAN22
from vidaccel.families.wan22_i2v import WAN22_I2V
from vidaccel.families.wan_i2v import WAN_I2V
from vidaccel.families.wan_vace import WAN_VACE

FAMILIES: dict[str, DiTFamily] = {
    family.name: family
    for family in (
        ANYFLOW,
        COGVIDEOX,
        COGVIDEOX_I2V,
        HUNYUAN_VIDEO,
        HUNYUAN_VIDEO_15,
        HUNYUAN_VIDEO_15_I2V,
        HUNYUAN_VIDEO_I2V,
        LTX2,
        LTX_VIDEO,
        MOCHI,
        SANA_VIDEO,
        SKYREELS_V2,
        SKYREELS_V2_I2V,
        WAN,
        WAN22,
        WAN22_I2V,
        WAN_I2V,
        WAN_VACE,
    )
}
"""Every family by name."""

PIPELINES: dict[str, DiTFamily] = {
    name: family
    for family in sorted(FAMILIES.values(), key=lambda family: -len(family.denoisers))
    for name in family.pipelines
}
"""By diffusers pipeline class its family, of several that share it the one with the fewest denoisers."""


_FORCING = "moves each latent frame along a grid of its own (diffusion forcing), so that a pass is of no one step"
_CAUSAL = "keeps keys and values of earlier frames within its blocks, which a step that leaves them out would not"
_LEVELS = "is sampled at EDM's noise levels and scales what its transformer takes and gives, as no step grid here does"
_ANCESTRAL = "predicts noise and draws some anew at each step, of which what a full step has left knows nothing"
_LAST = "has latents with channels last, positions of its text, and blocks that call their tokens otherwise"
_ANEW = "begins its video tokens anew midway through its blocks, with those before as text: that is no one trunk"

UNSUPPORTED: dict[str, str] = {
    "AllegroPipeline": _ANCESTRAL,
    "AnyFlowFARPipeline": _CAUSAL,
    "Cosmos2VideoToWorldPipeline": _LEVELS,
    "Cosmos2_5_PredictBasePipeline": _LEVELS,
    "CosmosTextToWorldPipeline": _LEVELS,
    "CosmosVideoToWorldPipeline": _LEVELS,
    "Kandinsky5I2VPipeline": _LAST,
    "Kandinsky5T2VPipeline": _LAST,
    "MotifVideoImage2VideoPipeline": _ANEW,
    "MotifVideoPipeline": _ANEW,
    "SkyReelsV2DiffusionForcingImageToVideoPipeline": _FORCING,
    "SkyReelsV2DiffusionForcingPipeline": _FORCING,
    "SkyReelsV2DiffusionForcingVideoToVideoPipeline": _FORCING,
    "WanAnimatePipeline": "makes its video in pieces, each from the last, of a video of poses and one of a face",
}
"""By diffusers pipeline class why it is of no family: what predicted steps would get wrong, or no record says."""


def family_of_pipeline(class_name: str, parts: Collection[str] = ()) -> DiTFamily:
    """The family of a diffusers pipeline class, of several that share it the one with the most denoisers that are among
    the names of the pipeline's `parts`; `UserError` naming the supported classes if there is none."""
    if class_name in UNSUPPORTED:
        raise UserError(f"{class_name} {UNSUPPORTED[class_name]}", f"supported: {', '.join(PIPELINES)}")
    if class_name not in PIPELINES:
        raise UserError(f"no model family is known for the pipeline {class_name}", f"supported: {', '.join(PIPELINES)}")
    others = [family for family in FAMILIES.values() if class_name in family.pipelines and len(family.denoisers) > 1]
    having = [family for family in others if all(each.attribute in parts for each in family.denoisers)]
    return max(having, key=lambda family: len(family.denoisers), default=PIPELINES[class_name])


def family_of(pipe: Any) -> DiTFamily:
    """`family_of_pipeline` of a diffusers pipeline in memory."""
    known = {denoiser.attribute for family in FAMILIES.values() for denoiser in family.denoisers}
    return family_of_pipeline(type(pipe).__name__, [name for name in known if getattr(pipe, name, None) is not None])
