"""HunyuanVideo-1.5's blocks on fused ops: HunyuanVideo's double stream."""

from diffusers.models.transformers.transformer_hunyuan_video15 import (
    HunyuanVideo15AttnProcessor2_0,
    HunyuanVideo15TransformerBlock,
)

from vidaccel.families.hunyuan_video.fused import FusedDoubleStream, HunyuanVideoProcessor


class FusedHunyuanVideo15Block(FusedDoubleStream, HunyuanVideo15TransformerBlock):
    """All blocks of HunyuanVideo-1.5."""


FUSED_BLOCKS = {HunyuanVideo15TransformerBlock: FusedHunyuanVideo15Block}
FUSED_PROCESSORS = {HunyuanVideo15AttnProcessor2_0: HunyuanVideoProcessor}
