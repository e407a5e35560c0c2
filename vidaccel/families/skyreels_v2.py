"""SkyReels V2, text to video: Wan's blocks, with a mask as a fifth argument, which is None without diffusion forcing.

Models of diffusion forcing have pipelines of their own, which are refused.
"""

from dataclasses import replace

from vidaccel.families.base import BlockList
from vidaccel.families.costs import BlockCosts
from vidaccel.families.wan import WAN


def masked(kind: BlockList) -> BlockList:
    return replace(kind, arguments=(*kind.arguments, "attention_mask"))


def unmasked(costs: BlockCosts) -> BlockCosts:
    return replace(costs, arguments=costs.arguments | {"attention_mask": None})


SKYREELS_V2 = replace(
    WAN,
    name="skyreels_v2",
    title="SkyReels V2",
    pipelines=("SkyReelsV2Pipeline",),
    transformer="SkyReelsV2Transformer3DModel",
    block_lists=tuple(map(masked, WAN.block_lists)),
    defaults=replace(WAN.defaults, guidance=6.0, num_frames=97, height=544, width=960, fps=24, shift=8.0),
    costs=replace(WAN.costs, blocks={name: unmasked(each) for name, each in WAN.costs.blocks.items()}),
    split=None,
    fused=None,
)
