"""A transformer's weights by the names of its authors (families/original.py), and back by diffusers' own conversion.

D width
"""

import re
from collections.abc import Mapping

import torch
from diffusers.loaders.single_file_utils import convert_hunyuan_video_transformer_to_diffusers
from torch import Tensor

from vidaccel.errors import UserError
from vidaccel.families.base import DiTFamily
from vidaccel.families.original import ORIGINALS, PART, Original
from vidaccel.families.released import original_name

SINGLE_STREAM = ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")
"""What HunyuanVideo's `linear1` holds one below another: D rows each, the last all that are left."""


def require_original(family: DiTFamily) -> Original:
    """The layout of that family's original files; `UserError` where it is not known."""
    if family.name not in ORIGINALS:
        raise UserError(
            f"what the authors of {family.title} call its weights is not known here",
            "export a folder, which diffusers loads: -o FOLDER",
        )
    return ORIGINALS[family.name]


def as_original(weights: Mapping[str, Tensor], family: DiTFamily, width: int) -> dict[str, Tensor]:
    """All of a transformer's weights, by their original names; those that are not joined are the tensors given.

    Args:
        weights: by diffusers' names.
        family: of the transformer.
        width: D.

    Raises:
        UserError: the layout of the family is not known, or has no name for one of them.
    """
    layout = require_original(family)
    parts: dict[str, dict[int, Tensor]] = {}
    unknown = []
    for own, weight in weights.items():
        name = own
        for ours, theirs in layout.renamed:
            name = re.sub(ours, theirs, name)
        if name == own and not name.startswith(layout.kept):
            unknown.append(name)
        whole, _, rest = name.partition(PART)
        number, _, end = rest.partition(".")
        parts.setdefault(f"{whole}.{end}" if rest else name, {})[int(number or 0)] = weight
    made = {}
    for name, found in parts.items():
        rows = [found[i] for i in sorted(found)]
        weight = rows[0] if len(rows) == 1 else torch.cat(rows)
        made[name] = torch.cat(weight.chunk(2)[::-1]) if name.startswith(layout.swapped) else weight
    there = {name: torch.empty(weight.shape, device="meta") for name, weight in made.items()}
    back = {name: weight.shape for name, weight in as_diffusers(there, family, width).items()}
    unknown += [name for name, weight in weights.items() if back.get(name) != weight.shape and name not in unknown]
    if unknown:
        raise UserError(
            f"{len(unknown)} weights of this {family.transformer} have no original name, such as {unknown[0]}",
            "export a folder, which diffusers loads: -o FOLDER",
        )
    return made


def as_diffusers(weights: Mapping[str, Tensor], family: DiTFamily, width: int) -> dict[str, Tensor]:
    """Weights of a family that `ORIGINALS` has, by diffusers' names."""
    if (convert := ORIGINALS[family.name].convert) is not None:
        return convert(dict(weights))
    made: dict[str, Tensor] = {}
    for name, weight in weights.items():
        made |= hunyuan_as_diffusers(original_name(name, family.name) or name, weight, width)
    return made


def hunyuan_as_diffusers(name: str, weight: Tensor, width: int) -> dict[str, Tensor]:
    """One weight of HunyuanVideo, in the parts that diffusers has; all are views of it where they can be.

    Raises:
        ValueError: it does not come apart in three.
    """
    made = {name: weight}
    if "single_blocks." in name and ".linear1." in name:  # which diffusers splits for HunyuanVideo's own D alone
        parts = (weight[:width], weight[width : 2 * width], weight[2 * width : 3 * width], weight[3 * width :])
        made = {name.replace("linear1", part): rows for part, rows in zip(SINGLE_STREAM, parts, strict=True)}
    return convert_hunyuan_video_transformer_to_diffusers(made)
