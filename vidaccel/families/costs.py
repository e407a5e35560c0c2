"""What each part of a family's transformer works on, as data: FLOPs and memory are computed from it.

A *stream* is a number of rows: `one` (the conditioning vector), `video` or `text` tokens, `all` of them, or one of
several texts by its name in the configuration. A Linear or patch convolution costs 2 FLOPs a weight and row of its
stream, an attention 4 D a pair of query and key, and nothing else is counted: PyTorch's counter leaves out norms,
rotations and activation functions as well, and tests/bench/measures/test_flops.py holds the sums against it, to the
last FLOP. So all that a family adds is a table of `layer name -> stream`.
"""

from dataclasses import dataclass

Layers = tuple[tuple[str, str], ...]
"""(pattern of a layer's dotted name, as fnmatch reads it; stream), the first that matches holds."""

Attentions = tuple[tuple[str, str], ...]
"""(stream of the queries, stream of the keys) of each attention."""


@dataclass(frozen=True)
class Argument:
    """A tensor that a block is called with besides the tokens, or that an embedder gives."""

    shape: tuple[int | str, ...]
    """Sizes, or what they are: a stream, `width` D or `head` D / H."""
    dtype: str = "model"
    """`model` is the one of the weights."""
    copies: int = 1
    """2 is a tuple of two such tensors (cosines and sines)."""


@dataclass(frozen=True)
class BlockWork:
    """One block of a list."""

    layers: Layers
    attentions: Attentions
    branches: tuple[str, ...]
    """Streams of the tensors that a cache of every residual branch (FORA, TaylorSeer) keeps of the block."""
    arguments: dict[str, Argument]
    """By the names in the record's BlockList."""


@dataclass(frozen=True)
class FamilyWork:
    """One family's transformer."""

    layers: Layers
    """Of embedders and output head."""
    attentions: dict[str, Attentions]
    """Of embedders: list of modules -> attentions of each of them."""
    blocks: dict[str, BlockWork]
    """By name of the block list."""
    fusions: tuple[str, ...]
    """Stream of each fusion MLP of the predictor, which is also what the cache holds."""
    static_embedders: tuple[Argument, ...]
    """What the record's `static_embedders` embedders give."""


_ROTATIONS = Argument(("video", "head"), "float32", copies=2)
_WAN_ROTATIONS = Argument((1, "video", 1, "head"), "float32", copies=2)
_REFINER = (("*time_text_embed.*", "one"), ("*.norm_out.*", "one"))
_DOUBLE_STREAM = {
    "layers": (
        ("norm*", "one"),
        ("attn.add_*", "text"),
        ("attn.to_add_out", "text"),
        ("ff_context.*", "text"),
        ("*", "video"),
    ),
    "attentions": (("all", "all"),),
    "branches": ("all", "all"),
}

WORK: dict[str, FamilyWork] = {
    "hunyuan_video": FamilyWork(
        layers=(
            ("x_embedder.*", "video"),
            ("proj_out", "video"),
            *_REFINER,
            ("context_embedder.*", "prompt"),
            ("*", "one"),
        ),
        attentions={"context_embedder.token_refiner.refiner_blocks": (("prompt", "prompt"),)},
        blocks={
            "transformer_blocks": BlockWork(
                **_DOUBLE_STREAM,
                arguments={
                    "temb": Argument((1, "width")),
                    "attention_mask": Argument((1, 1, 1, "all"), "bool"),
                    "freqs_cis": _ROTATIONS,
                },
            ),
            "single_transformer_blocks": BlockWork(
                layers=(("norm.*", "one"), ("*", "all")),
                attentions=(("all", "all"),),
                branches=("all",),
                arguments={
                    "temb": Argument((1, "width")),
                    "attention_mask": Argument((1, 1, 1, "all"), "bool"),
                    "image_rotary_emb": _ROTATIONS,
                },
            ),
        },
        fusions=("all",),
        static_embedders=(_ROTATIONS, Argument((1, "prompt", "width"))),
    ),
    "hunyuan_video_15": FamilyWork(
        layers=(
            ("x_embedder.*", "video"),
            ("proj_out", "video"),
            *_REFINER,
            ("context_embedder.*", "prompt"),
            ("context_embedder_2.*", "glyphs"),
            ("image_embedder.*", "image"),
            ("*", "one"),
        ),
        attentions={"context_embedder.token_refiner.refiner_blocks": (("prompt", "prompt"),)},
        blocks={
            "transformer_blocks": BlockWork(
                **_DOUBLE_STREAM,
                arguments={
                    "temb": Argument((1, "width")),
                    "attention_mask": Argument((1, "text"), "bool"),
                    "freqs_cis": _ROTATIONS,
                },
            ),
        },
        fusions=("video", "text"),
        static_embedders=(_ROTATIONS, *(Argument((1, text, "width")) for text in ("prompt", "glyphs", "image"))),
    ),
    "wan": FamilyWork(
        layers=(
            ("patch_embedding", "video"),
            ("proj_out", "video"),
            ("condition_embedder.text_embedder.*", "prompt"),
            ("*", "one"),
        ),
        attentions={},
        blocks={
            "blocks": BlockWork(
                layers=(("attn2.to_[kv]", "text"), ("*", "video")),
                attentions=(("video", "video"), ("video", "text")),
                branches=("video", "video", "video"),
                arguments={
                    "temb": Argument((1, 6, "width")),
                    "rotary_emb": _WAN_ROTATIONS,
                },
            ),
        },
        fusions=("video",),
        static_embedders=(_WAN_ROTATIONS, Argument((1, "prompt", "width"))),
    ),
}
"""Of every family in the catalogue, by name."""
