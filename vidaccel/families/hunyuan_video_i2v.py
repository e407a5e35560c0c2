"""HunyuanVideo, image to video: the image's latent stands clean in the first frame, whose tokens are modulated as those
of time 0 (`token_replace`), and a language model reads the image beside the text.

The two kinds of tokens are told apart by how many a frame has, which blocks are given with the second embedding.
Embedder of the timestep and modulations are called twice. Models of the same class with further channels for the image
(`latent_concat`) are run and cached.
"""

from dataclasses import replace

from vidaccel.families.base import BlockList, Condition
from vidaccel.families.costs import Argument, BlockCosts
from vidaccel.families.hunyuan_video import HUNYUAN_VIDEO

_COSTS = HUNYUAN_VIDEO.costs
_ARGUMENTS = {"token_replace_emb": Argument((1, "width")), "num_tokens": "frame"}


def _given_more(kind: BlockList) -> BlockList:
    return replace(kind, arguments=(*kind.arguments, *_ARGUMENTS))


def _called_twice(costs: BlockCosts, norm: str) -> BlockCosts:
    return replace(costs, layers=((norm, "one+1"), *costs.layers), arguments=costs.arguments | _ARGUMENTS)


HUNYUAN_VIDEO_I2V = replace(
    HUNYUAN_VIDEO,
    name="hunyuan_video_i2v",
    title="HunyuanVideo image to video",
    pipelines=("HunyuanVideoImageToVideoPipeline",),
    block_lists=tuple(map(_given_more, HUNYUAN_VIDEO.block_lists)),
    costs=replace(
        _COSTS,
        layers=(("time_text_embed.timestep_embedder.*", "one+1"), *_COSTS.layers),
        blocks={
            "transformer_blocks": _called_twice(_COSTS.blocks["transformer_blocks"], "norm1.*"),
            "single_transformer_blocks": _called_twice(_COSTS.blocks["single_transformer_blocks"], "norm.*"),
        },
    ),
    conditions=(Condition("image_latents", first_frame=True),),
    texts_see_image=True,
    rounds_times=False,
    split=None,
    fused=None,
    batched=False,  # it takes one image for each prompt
)
