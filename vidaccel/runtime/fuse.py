"""Puts the fused kernels into a loaded diffusers transformer, and takes them out again.

    fusion = fuse(pipe.transformer, kernels="auto")
    ...
    fusion.restore()

Two things change, and parameters, buffers and state-dict names stay what they were:

- an attention gets a processor that norms and rotates queries and keys in one op (`qk_norm_rope`);
- a transformer block becomes an instance of a subclass whose forward calls `adaln` and `gated_residual_adaln` where the
  stock forward writes gate, residual and modulation out. The class of that one instance changes, so deep copies, FSDP
  and a second model in the same process are unaffected.

Which blocks have a fused form is their family's matter (families/<name>/fused.py), and nowhere else is a forward
restated; tests/runtime/test_fuse.py holds each against its stock block. Fuse before anything hooks, shards or compiles
the blocks: a hook keeps the forward that it found.
"""

import importlib
import logging
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from vidaccel.compat.torch import forward_pre_hooks
from vidaccel.errors import UserError
from vidaccel.families.base import DiTFamily
from vidaccel.families.fused import FusedBlock
from vidaccel.families.registry import FAMILIES
from vidaccel.kernels import select

logger = logging.getLogger(__name__)


def fuse(model: nn.Module, kernels: str = "auto", device: torch.device | None = None) -> "Fusion":
    """Fuses every block of `model` that has a fused form, and logs which those are; the others stay as they are.

    `device` is where it computes, if its weights are elsewhere.
    """
    chosen = select.choose(kernels, device or next(model.parameters()).device)
    forms = _forms_of_class(type(model))
    blocks = [module for module in model.modules() if type(module) in forms.blocks]
    if not blocks and kernels == "fused":
        known = ", ".join(family.title for family in FAMILIES.values() if family.fused)
        raise UserError(
            f"kernels=fused, but no block of {type(model).__name__} has a fused form", f"fused are those of {known}"
        )
    hooked = [block for block in blocks if "forward" in vars(block) or forward_pre_hooks(block)]
    if hooked:
        raise UserError(
            f"{len(hooked)} blocks of {type(model).__name__} already carry hooks, which would keep the stock forward",
            "fuse the model first, then attach",
        )
    counts = Counter(type(block).__name__ for block in blocks)
    logger.info("kernels: %s in %s", chosen, ", ".join(f"{n} {name}" for name, n in counts.items()) or "no block")
    return Fusion(blocks, forms, chosen)


def fuse_like(block: nn.Module, original: nn.Module) -> None:
    """Fuse a stock block, but for its processors, as `original`, which is of the same kind, is fused."""
    if isinstance(original, FusedBlock):
        block.__class__, block.kernels = type(original), original.kernels


@dataclass(frozen=True)
class FusedForms:
    """Stock class -> fused class."""

    blocks: dict[type, type[nn.Module]] = field(default_factory=dict)
    processors: dict[type, Callable[[Any, str], Any]] = field(default_factory=dict)


def fused_forms(family: DiTFamily) -> FusedForms:
    """Of the family's blocks and attention processors; empty where it has none."""
    if family.fused is None:
        return FusedForms()
    module = importlib.import_module(family.fused)
    return FusedForms(module.FUSED_BLOCKS, module.FUSED_PROCESSORS)


def take_any_mask(block: nn.Module, family: DiTFamily) -> Callable[[], None]:
    """Put the fused processors, on reference kernels, in the place of a block's stock ones, which know one form of mask
    and cannot do without; what puts them back."""
    processors = fused_forms(family).processors
    stock: list[tuple[Any, Any]] = []
    attention: Any
    for attention in block.children():
        processor = getattr(attention, "processor", None)
        if type(processor) in processors:
            stock.append((attention, processor))
            attention.set_processor(processors[type(processor)](processor, "reference"))

    def undo() -> None:
        for attention, processor in stock:
            attention.set_processor(processor)

    return undo


def _forms_of_class(cls: type) -> FusedForms:
    """Those of the family whose transformer this class is, or is a subclass of, as sharding makes one."""
    names = {base.__name__ for base in cls.__mro__}
    return next((fused_forms(family) for family in FAMILIES.values() if family.transformer in names), FusedForms())


class Fusion:
    """What `fuse` changed in one model; `restore` undoes it. Also a context manager."""

    def __init__(self, blocks: list[nn.Module], forms: FusedForms, kernels: str):
        self._undo: list[Callable[[], None]] = []
        for block in blocks:
            for attention in block.children():
                processor = forms.processors.get(type(getattr(attention, "processor", None)))
                if processor is not None:
                    self._replace_processor(attention, processor(attention.processor, kernels))
            self._replace_class(block, forms.blocks[type(block)], kernels)

    def restore(self) -> None:
        """The model as it was. A second call does nothing."""
        while self._undo:
            self._undo.pop()()

    def __enter__(self) -> "Fusion":
        return self

    def __exit__(self, *error) -> None:
        self.restore()

    def _replace_processor(self, attention: nn.Module, processor) -> None:
        stock = attention.processor
        attention.set_processor(processor)
        self._undo.append(lambda: attention.set_processor(stock))

    def _replace_class(self, block: nn.Module, fused: type[nn.Module], kernels: str) -> None:
        stock = type(block)
        block.__class__, block.kernels = fused, kernels

        def undo() -> None:
            block.__class__ = stock
            del block.kernels

        self._undo.append(undo)
