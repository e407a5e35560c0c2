"""What the authors of a family call the weights of its transformer, as data: the names of files that programs without
diffusers load, ComfyUI among them.

diffusers converts such files and has no way back. A family's way back is a list of regular expressions here, all of
which are applied in their order; the conversion there is what each is tested against.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers

from vidaccel.families.released import DOUBLE_STREAM_15, LAYOUTS

PART = "#"
"""In a name behind that of a layer, before a number: it is that part of the layer, whose parts' rows lie one below
another."""


@dataclass(frozen=True)
class Original:
    """The layout of a family's original files."""

    renamed: tuple[tuple[str, str], ...]
    """Regular expressions on diffusers' names, and what takes the place of what they match."""
    kept: tuple[str, ...] = ()
    """How names begin that are the same in both."""
    swapped: tuple[str, ...] = ()
    """How original names begin of layers whose two halves change places: diffusers has the scale before the shift."""
    convert: Callable[[dict[str, Any]], dict[str, Any]] | None = None
    """diffusers' conversion of all weights, by name; None where they are converted one by one, as HunyuanVideo's."""


def _hunyuan(*own: tuple[str, str]) -> Original:
    """HunyuanVideo's names; what `own` says comes first. In HunyuanVideo-1.5, whose authors have q, k and v apart,
    they are one layer as in HunyuanVideo: so ComfyUI has them in both."""
    attention = [
        (rf"^({blocks}.*\.)attn\.{ours.format(letter)}\.", rf"\g<1>{theirs}{PART}{i}.")
        for blocks, ours, theirs in (
            ("txt_in", "to_{}", "self_attn_qkv"),
            ("double_blocks", "to_{}", "img_attn_qkv"),
            ("double_blocks", "add_{}_proj", "txt_attn_qkv"),
            ("single_blocks", "to_{}", "linear1"),
        )
        for i, letter in enumerate("qkv")
    ]
    embedders = [
        (rf"^{ours}\.linear_{i + 1}\.", f"{theirs}.mlp.{2 * i}.")
        for ours, theirs in (
            (r"context_embedder\.time_text_embed\.timestep_embedder", "txt_in.t_embedder"),
            (r"time_text_embed\.timestep_embedder", "time_in"),
            (r"time_text_embed\.guidance_embedder", "guidance_in"),
        )
        for i in (0, 1)
    ]
    renamed = (
        *own,
        *embedders,
        (r"^time_text_embed\.text_embedder\.linear_1\.", "vector_in.in_layer."),
        (r"^time_text_embed\.text_embedder\.linear_2\.", "vector_in.out_layer."),
        (r"^context_embedder\.time_text_embed\.text_embedder\.", "txt_in.c_embedder."),
        (r"^context_embedder\.proj_in\.", "txt_in.input_embedder."),
        (r"^context_embedder\.token_refiner\.refiner_blocks\.", "txt_in.individual_token_refiner.blocks."),
        (r"^x_embedder\.", "img_in."),
        (r"^norm_out\.linear\.", "final_layer.adaLN_modulation.1."),
        (r"^proj_out\.", "final_layer.linear."),
        (r"^transformer_blocks\.", "double_blocks."),
        (r"^single_transformer_blocks\.", "single_blocks."),
        *attention,
        (r"^(txt_in\..*\.)attn\.to_out\.0\.", r"\g<1>self_attn_proj."),
        (r"^(txt_in\..*\.)norm_out\.linear\.", r"\g<1>adaLN_modulation.1."),
        (r"^(txt_in\..*\.)ff\.net\.", r"\g<1>mlp.net."),
        (r"^(double_blocks\..*\.)norm1\.linear\.", r"\g<1>img_mod.linear."),
        (r"^(double_blocks\..*\.)norm1_context\.linear\.", r"\g<1>txt_mod.linear."),
        (r"^(double_blocks\..*\.)attn\.norm_([qk])\.", r"\g<1>img_attn_\g<2>_norm."),
        (r"^(double_blocks\..*\.)attn\.norm_added_([qk])\.", r"\g<1>txt_attn_\g<2>_norm."),
        (r"^(double_blocks\..*\.)attn\.to_out\.0\.", r"\g<1>img_attn_proj."),
        (r"^(double_blocks\..*\.)attn\.to_add_out\.", r"\g<1>txt_attn_proj."),
        (r"^(double_blocks\..*\.)ff\.net\.", r"\g<1>img_mlp.net."),
        (r"^(double_blocks\..*\.)ff_context\.net\.", r"\g<1>txt_mlp.net."),
        (r"^(single_blocks\..*\.)proj_mlp\.", rf"\g<1>linear1{PART}3."),
        (r"^(single_blocks\..*\.)proj_out\.", r"\g<1>linear2."),
        (r"^(single_blocks\..*\.)norm\.linear\.", r"\g<1>modulation.linear."),
        (r"^(single_blocks\..*\.)attn\.norm_([qk])\.", r"\g<1>\g<2>_norm."),
        (r"\.net\.0\.proj\.", ".fc1."),
        (r"\.net\.2\.", ".fc2."),
    )
    return Original(renamed, swapped=("final_layer.adaLN_modulation.1.",))


def _wan() -> Original:
    letters = [(rf"\.to_{letter}\.", f".{letter}.") for letter in "qkv"]
    renamed = (
        (r"^condition_embedder\.(time|text)_embedder\.linear_1\.", r"\g<1>_embedding.0."),
        (r"^condition_embedder\.(time|text)_embedder\.linear_2\.", r"\g<1>_embedding.2."),
        (r"^condition_embedder\.time_proj\.", "time_projection.1."),
        (r"^condition_embedder\.image_embedder\.norm1\.", "img_emb.proj.0."),
        (r"^condition_embedder\.image_embedder\.ff\.net\.0\.proj\.", "img_emb.proj.1."),
        (r"^condition_embedder\.image_embedder\.ff\.net\.2\.", "img_emb.proj.3."),
        (r"^condition_embedder\.image_embedder\.norm2\.", "img_emb.proj.4."),
        (r"^scale_shift_table$", "head.modulation"),
        (r"^proj_out\.", "head.head."),
        (r"(blocks\.\d+\.)scale_shift_table$", r"\g<1>modulation"),
        (r"\.attn1\.", ".self_attn."),
        (r"\.attn2\.", ".cross_attn."),
        *letters,
        (r"\.to_out\.0\.", ".o."),
        (r"\.add_([kv])_proj\.", r".\g<1>_img."),
        (r"\.norm_added_k\.", ".norm_k_img."),
        (r"(blocks\.\d+\.)norm2\.", r"\g<1>norm3."),
        (r"\.ffn\.net\.0\.proj\.", ".ffn.0."),
        (r"\.ffn\.net\.2\.", ".ffn.2."),
        (r"^(vace_blocks\..*\.)proj_in\.", r"\g<1>before_proj."),
        (r"^(vace_blocks\..*\.)proj_out\.", r"\g<1>after_proj."),
    )
    return Original(
        renamed, kept=("patch_embedding.", "vace_patch_embedding."), convert=convert_wan_transformer_to_diffusers
    )


def _of_15() -> Original:
    """The names around the blocks are those of the released student, which has one embedder more."""
    (layout,) = (each for each in LAYOUTS if each.what == "student" and "hunyuan_video_15" in each.families)
    around = [each for each in layout.renamed if each not in DOUBLE_STREAM_15]
    return _hunyuan(*((f"^{re.escape(ours)}", theirs) for theirs, ours in around))


ORIGINALS = {
    **dict.fromkeys(("hunyuan_video", "hunyuan_video_i2v"), _hunyuan()),
    **dict.fromkeys(("hunyuan_video_15", "hunyuan_video_15_i2v"), _of_15()),
    **dict.fromkeys(("wan", "wan_i2v", "wan22", "wan22_i2v", "wan_vace", "skyreels_v2", "skyreels_v2_i2v"), _wan()),
}
"""By the name of a family."""
