"""Weights that others have released in layouts of their own, as data: by which names a file is recognised, and what
they are called here (method.md, section 5).

A file's names are the base model's original ones. diffusers' own conversion of HunyuanVideo knows most of them, those
of HunyuanVideo-1.5's blocks and refiner too; a layout says the rest.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from vidaccel.errors import UserError

OUTER = ("", "model.", "module.", "predictor.")
"""What may stand before all names of a file."""
BLOCKS = "blocks."
"""Where a predictor's blocks are in vidaccel's."""
ADDED = "conditioning."
"""Before names of weights that the transformer has no place for: those of `Conditioning`."""


@dataclass(frozen=True)
class Layout:
    """One kind of released file."""

    title: str
    """What it holds, in messages."""
    what: str
    """`student` or `predictor`."""
    families: tuple[str, ...]
    """Names of the families whose pipelines take it."""
    telling: tuple[str, ...]
    """How names begin that no other kind has together."""
    licence: str
    """What the weights are under, said whenever they are loaded."""
    renamed: tuple[tuple[str, str], ...] = ()
    """Parts of names that diffusers' conversion does not know, and what they become before it."""
    halved: tuple[str, ...] = ()
    """Modules, by their names in the file, whose weights count half."""
    blocks: int = 0
    """Transformer blocks of a predictor."""
    call: Mapping[str, Any] = field(default_factory=dict)
    """How its authors sample with it, as in a model's run.json."""


HUNYUAN_LICENCE = "derived from a model under the Tencent Hunyuan Community License"
DOUBLE_STREAM_15 = tuple(
    (f"{stream}_attn_{letter}.", f"attn.{name.format(letter)}.")
    for stream, name in (("img", "to_{}"), ("txt", "add_{}_proj"))
    for letter in "qkv"
)
"""HunyuanVideo-1.5's are three layers where HunyuanVideo has one."""

LAYOUTS = (
    Layout(
        "DisCa's predictor for HunyuanVideo",
        "predictor",
        ("hunyuan_video",),
        telling=("fusion_mlp.", "mm_single_blocks."),
        licence=HUNYUAN_LICENCE,
        renamed=(
            ("fusion_mlp.0.", "fusions.tokens.inner."),
            ("fusion_mlp.2.", "fusions.tokens.outer."),
            ("mm_single_blocks.", "single_blocks."),
        ),
        blocks=2,
    ),
    Layout(
        "DisCa's predictor for HunyuanVideo-1.5 image to video",
        "predictor",
        ("hunyuan_video_15_i2v",),
        telling=("fusion_mlp_img.", "fusion_mlp_txt.", "double_blocks."),
        licence=HUNYUAN_LICENCE,
        renamed=(
            ("fusion_mlp_img.0.", "fusions.hidden_states.inner."),
            ("fusion_mlp_img.2.", "fusions.hidden_states.outer."),
            ("fusion_mlp_txt.0.", "fusions.encoder_hidden_states.inner."),
            ("fusion_mlp_txt.2.", "fusions.encoder_hidden_states.outer."),
            *DOUBLE_STREAM_15,
        ),
        blocks=2,
    ),
    Layout(
        "a Restricted MeanFlow student of HunyuanVideo",
        "student",
        ("hunyuan_video",),
        telling=("time_r_in.", "double_blocks.", "single_blocks."),
        licence=HUNYUAN_LICENCE,
        renamed=(
            ("time_r_in.mlp.0.", f"{ADDED}embedders.r.linear_1."),
            ("time_r_in.mlp.2.", f"{ADDED}embedders.r.linear_2."),
        ),
        halved=("time_in.mlp.2", "time_r_in.mlp.2"),  # (time(t) + time_r(r)) / 2: both end in a linear layer
        call={"steps": 20, "guidance": 6.0, "shift": 5.0, "two_pass": False},
    ),
    Layout(
        "a MeanFlow student of HunyuanVideo-1.5",
        "student",
        ("hunyuan_video_15", "hunyuan_video_15_i2v"),
        telling=("time_r_in.", "double_blocks.", "byt5_in."),
        licence=HUNYUAN_LICENCE,
        renamed=(
            ("time_in.mlp.0.", "time_embed.timestep_embedder.linear_1."),
            ("time_in.mlp.2.", "time_embed.timestep_embedder.linear_2."),
            ("time_r_in.mlp.0.", "time_embed.timestep_embedder_r.linear_1."),
            ("time_r_in.mlp.2.", "time_embed.timestep_embedder_r.linear_2."),
            ("byt5_in.layernorm.", "context_embedder_2.norm."),
            *((f"byt5_in.fc{i}.", f"context_embedder_2.linear_{i}.") for i in (1, 2, 3)),
            ("vision_in.proj.0.", "image_embedder.norm_in."),
            ("vision_in.proj.1.", "image_embedder.linear_1."),
            ("vision_in.proj.3.", "image_embedder.linear_2."),
            ("vision_in.proj.4.", "image_embedder.norm_out."),
            ("cond_type_embedding.", "cond_type_embed."),
            *DOUBLE_STREAM_15,
        ),
        call={"steps": 8, "guidance": 1.0, "two_pass": False},
    ),
)
"""All that are known."""


COMFYUI = (
    (r"_attn\.(qkv|proj)\.", r"_attn_\1."),
    (r"(_mod)\.lin\.", r"\1.linear."),
    (r"(_mlp|blocks\.\d+\.mlp)\.0\.", r"\1.fc1."),
    (r"(_mlp|blocks\.\d+\.mlp)\.2\.", r"\1.fc2."),
    (r"c_embedder\.in_layer\.", "c_embedder.linear_1."),
    (r"c_embedder\.out_layer\.", "c_embedder.linear_2."),
    (r"(t_embedder|time_in)\.in_layer\.", r"\1.mlp.0."),
    (r"(t_embedder|time_in)\.out_layer\.", r"\1.mlp.2."),
)
"""What ComfyUI calls layers of HunyuanVideo-1.5, as regular expressions, and what they are originally called."""


def original_name(name: str, family: str) -> str | None:
    """A weight's name, ComfyUI's or the original one, as diffusers' conversion of HunyuanVideo takes it; None for a
    family whose names are not known, or whose pipeline has a loader of its own."""
    layout = next((each for each in LAYOUTS if each.what == "student" and family in each.families), None)
    if layout is None or family == "hunyuan_video":
        return None
    for theirs, original in COMFYUI:
        name = re.sub(theirs, original, name)
    for theirs, ours in layout.renamed:
        name = name.replace(theirs, ours)
    return name


def recognised(names: Sequence[str], file: object) -> tuple[Layout, str]:
    """The layout that a file's names have, and what stands before all of them; `UserError` if they have none."""
    for layout in LAYOUTS:
        for outer in OUTER:
            if all(any(name.startswith(outer + part) for name in names) for part in layout.telling):
                return layout, outer
    first = f"its {len(names)} weights are called like {min(names)}" if names else "it holds no weights"
    raise UserError(
        f"{file} is in no layout that is known: {first}",
        f"known are {'; '.join(layout.title for layout in LAYOUTS)}; anything else has to be a folder",
    )
