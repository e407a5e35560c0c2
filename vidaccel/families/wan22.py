"""Wan 2.2 A14B, text to video: two of Wan's transformers, one for the noisiest times and one for the rest.

The pipeline's class is that of Wan 2.1, and which takes a step follows from its timestep: the second one those below
`boundary_ratio`. Each has a scale of guidance of its own. Defaults are those of its authors.
"""

from dataclasses import replace

from vidaccel.families.base import Denoiser
from vidaccel.families.wan import WAN

WAN22 = replace(
    WAN,
    name="wan22",
    title="Wan 2.2 A14B",
    denoisers=(Denoiser("transformer", until=0.875, until_config="boundary_ratio"), Denoiser("transformer_2")),
    guidance=replace(WAN.guidance, second_argument="guidance_scale_2"),
    defaults=replace(WAN.defaults, steps=40, guidance=4.0, guidance_2=3.0, height=720, width=1280, shift=12.0),
)
