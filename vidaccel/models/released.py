"""Weight files that others have released, strictly: recognised by their names, converted to ours, all of them used.

A name at a time goes through what its layout says (families/released.py) and through diffusers' own conversion, first
without the weight, so that a file that does not fit is refused before any of it is read. Weights are views into the
mapped file until they are cast or moved: no second copy of a file is ever in memory.

D width
"""

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import safe_open
from torch import Tensor, nn

from vidaccel.compat.diffusers import built_with
from vidaccel.errors import UserError
from vidaccel.families.base import DiTFamily
from vidaccel.families.released import ADDED, BLOCKS, Layout, recognised
from vidaccel.models.conditioning import Conditioning, ConditioningConfig
from vidaccel.models.folder import PICKLES, safetensors_header
from vidaccel.models.original import hunyuan_as_diffusers

log = logging.getLogger(__name__)
SHOWN = 3
"""Names of weights in a message."""


@dataclass(frozen=True)
class Released:
    """A released file whose layout is known."""

    file: Path
    layout: Layout
    outer: str
    """What stands before its names."""
    shapes: Mapping[str, tuple[int, ...]]
    """Of its weights, by their names in the file."""

    @classmethod
    def opened(cls, path: str | Path, what: str, family: DiTFamily) -> Self:
        """The file, its header read.

        Args:
            path: of a safetensors file.
            what: `student` or `predictor`.
            family: of the pipeline that is to take it.

        Raises:
            UserError: there is no such file, it is a pickle or broken, of no known layout, or for something else.
        """
        file = Path(path).expanduser()
        if not file.is_file():
            raise UserError(
                f"there is no file {file}", "a released file has to be here: download it (`hf download REPO FILE`)"
            )
        if file.suffix in PICKLES:
            raise UserError(f"{file} is a pickle, which can run code when it is loaded", "take the safetensors file")
        shapes = {name: shape for name, (_, shape) in safetensors_header(file).items()}
        layout, outer = recognised(list(shapes), file)
        if layout.what != what:
            raise UserError(f"{file} is {layout.title}, and a {what} is asked for", f"give it as {layout.what}={file}")
        if family.name not in layout.families:
            raise UserError(
                f"{file} is {layout.title}, and this is {family.title}", "take the model that it was made for"
            )
        return cls(file, layout, outer, shapes)

    def weights(self, expected: Mapping[str, Tensor], width: int) -> dict[str, Tensor]:
        """All of its weights, by our names, as they are stored.

        Args:
            expected: what there have to be, by our names; of its tensors only the shapes count.
            width: D.

        Raises:
            UserError: a weight is missing, too many or of another shape; each kind is counted, and the first are named.
        """
        self._check(expected, width)
        log.info("%s: %s (%s)", self.file, self.layout.title, self.layout.licence)
        found = {}
        with safe_open(self.file, framework="pt") as opened:
            for name in self.shapes:
                weight, bare = opened.get_tensor(name), name.removeprefix(self.outer)
                weight = weight / 2 if bare.rpartition(".")[0] in self.layout.halved else weight
                found |= self._converted(bare, weight, width)
        return found

    def _check(self, expected: Mapping[str, Tensor], width: int) -> None:
        left, sources = dict(expected), dict[str, str]()
        foreign, misfits = [], []
        for name, shape in self.shapes.items():
            bare = name.removeprefix(self.outer) if name.startswith(self.outer) else None
            made = {} if bare is None else self._converted(bare, torch.empty(shape, device="meta"), width)
            if not made or not made.keys() <= left.keys():
                foreign.append(name)
                continue
            wrong = [own for own, weight in made.items() if weight.shape != left.pop(own).shape]
            sources |= dict.fromkeys(made, name)
            if wrong:
                there = list(expected[wrong[0]].shape)
                misfits.append(f"{name} {list(shape)}, where {wrong[0]} is {there}")
        missing = sorted({self._named_as(name, sources) for name in left})
        found = [
            f"{len(names)} {what}: {', '.join(names[:SHOWN])}{', ...' if len(names) > SHOWN else ''}"
            for names, what in (
                (missing, "missing"),
                (foreign, "that it has no place for"),
                (misfits, "of another shape"),
            )
            if names
        ]
        if found:
            raise UserError(
                f"{self.file} is not wholly {self.layout.title} of width {width}; of its weights {'; '.join(found)}",
                "take the model that it was made for; if it is that one, download the file again",
            )

    def _converted(self, name: str, weight: Tensor, width: int) -> dict[str, Tensor]:
        """One weight of the file, in the parts and by the names that it has here; all are views of it where it can be.

        Parts of a wrong shape come of a weight of a wrong shape.
        """
        for theirs, ours in self.layout.renamed:
            name = name.replace(theirs, ours)
        try:
            made = hunyuan_as_diffusers(name, weight, width)
        except ValueError:  # of a weight that does not come apart in three
            return {}
        if self.layout.what == "predictor":
            made = {re.sub(r"^(single_)?transformer_blocks\.", BLOCKS, name): part for name, part in made.items()}
        return made

    def _named_as(self, missing: str, sources: Mapping[str, str]) -> str:
        """A weight that the file lacks by the name that it would have there, told from its likes, in another block or
        of the same layer, whose names are `sources`; else as far as the layout says it."""
        for end, other in (("", ""), (".weight", ".bias"), (".bias", ".weight")):
            like = _without_block(missing.removesuffix(end) + other) if missing.endswith(end) else None
            theirs = next((theirs for own, theirs in sources.items() if like == _without_block(own)), None)
            if theirs is not None:
                block = re.search(r"blocks\.(\d+)\.", missing)
                named = re.sub(r"(blocks\.)\d+\.", rf"\g<1>{block[1]}.", theirs) if block else theirs
                return named.removesuffix(other) + end
        for theirs, ours in self.layout.renamed:
            missing = missing.replace(ours, theirs)
        return missing


def _without_block(name: str) -> str:
    return re.sub(r"(blocks\.)\d+\.", r"\1", name)


def released_student(
    released: Released, cls: type[nn.Module], config: Mapping[str, Any], family: DiTFamily, dtype: torch.dtype
) -> tuple[nn.Module, Conditioning | None]:
    """The student that a file holds, as a transformer of `cls`, and its embedding of r where the class has none.

    Args:
        released: the file.
        cls: diffusers' class of the family's transformers.
        config: of the transformer that it takes the place of.
        family: its record.
        dtype: to hold the transformer in; the embedding of r is float32.

    Raises:
        UserError: as of `Released.weights`.
    """
    built = dict(config) | ({family.r_config: True} if family.r_config else {})
    made: Any = cls
    with torch.device("meta"):
        transformer = made.from_config(built_with(built))
    width = transformer.config.num_attention_heads * transformer.config.attention_head_dim
    conditioning = None
    expected = transformer.state_dict()
    if not family.r_config:
        call = released.layout.call
        described = ConditioningConfig(family.name, width, ("r",), steps=call["steps"], shift=call["shift"])
        conditioning = Conditioning(described).eval()
        expected |= {f"{ADDED}{name}": weight for name, weight in conditioning.state_dict().items()}
    weights = released.weights(expected, width)
    if conditioning is not None:
        conditioning.load_state_dict({name: weights.pop(f"{ADDED}{name}") for name in conditioning.state_dict()})
    transformer.load_state_dict({name: weight.to(dtype) for name, weight in weights.items()}, assign=True)
    return transformer.eval(), conditioning
