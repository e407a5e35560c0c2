"""Text padding cut off before a transformer runs, and the mask dropped from attention where nothing is left to mask.

    padding = trim_text(pipe.transformer, family)
    ...
    padding.remove()

HunyuanVideo's pipelines pad every text to one length and mask the padding in each attention of each block. It costs
arithmetic, and the mask costs more: flash attention takes none. Cut to the longest text of the batch, a single prompt
(or prompts of one length) needs no mask. No video token changes by more than rounding, because padding is masked
wherever it is read. A pass costs a synchronisation or two, to read lengths.

Families that have no mask (Wan attends to its padding) are left as they are.

B batch, L text tokens, E their width
"""

import inspect
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from vidaccel.errors import UserError
from vidaccel.families.base import BlockList, DiTFamily
from vidaccel.families.walk import blocks_of
from vidaccel.runtime.fuse import take_any_mask


def masks_text(family: DiTFamily) -> bool:
    """Whether the family's transformers mask the padding of their text."""
    return any(text.mask for text in family.text_tensors)


def trim_text(transformer: nn.Module, family: DiTFamily, need: str | None = None) -> "TextPadding":
    """Cut padding from now on; see the module. Blocks may be hooked and fused already.

    Args:
        transformer: of `family`.
        family: its record.
        need: names who cannot do with a mask, so that a batch which needs one is the user's mistake.
    """
    return TextPadding(transformer, family, need)


class TextPadding:
    """The hooks of one transformer, until `remove`."""

    def __init__(self, transformer: nn.Module, family: DiTFamily, need: str | None = None):
        self._need, self._family = need, family
        self._arguments = _argument_names(transformer)
        self._undo: list[Callable[[], None]] = []
        self._dense = False
        """Whether the pass that is under way needs no mask."""
        self._known: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
        """Masks seen by a block -> whether they mask nothing. A block that is computed again in a backward pass gets
        the mask of its own pass."""
        if not masks_text(family):
            return
        self._hook(transformer.register_forward_pre_hook(self._cut, with_kwargs=True))
        self._hook(transformer.register_forward_hook(self._end, always_call=True))
        for kind, block in blocks_of(transformer, family):
            self._hook(block.register_forward_pre_hook(partial(self._drop, kind), with_kwargs=True))
            if family.needs_mask:
                self._undo.append(take_any_mask(block, family))

    def remove(self) -> None:
        """The transformer as it was. A second call does nothing."""
        while self._undo:
            self._undo.pop()()

    def _hook(self, handle) -> None:
        self._undo.append(handle.remove)

    def _cut(self, transformer: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        """A forward pre-hook: inputs by their names, wherever they stood."""
        named = dict(zip(self._arguments, args, strict=False)) | kwargs
        self._dense = True
        for text in self._family.text_tensors:
            mask = named.get(text.mask)
            if mask is not None:
                named[text.argument], named[text.mask], dense = cut(named[text.argument], mask, text.least)
                self._dense &= dense
        if self._need and not self._dense:
            raise UserError(
                f"{self._need} takes no mask, and the texts of this batch differ in length",
                "generate them one by one, or set attention=native",
            )
        for blank in self._family.blank_inputs:
            values = named.get(blank.argument)
            if blank.masked and values is not None and not values.any():
                named[blank.argument] = values[:, :0]
        return (), named

    def _end(self, transformer: nn.Module, inputs: tuple, output) -> None:
        self._dense = False

    def _drop(self, kind: BlockList, block: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        """A block's arguments, without the mask where it masks nothing."""
        position = kind.arguments.index(kind.mask)
        mask = kwargs[kind.mask] if kind.mask in kwargs else args[position]
        if mask is None or not self._known.setdefault(mask, self._dense):
            return args, kwargs
        if kind.mask in kwargs:
            return args, kwargs | {kind.mask: None}
        return (*args[:position], None, *args[position + 1 :]), kwargs


def cut(text: Tensor, mask: Tensor, least: int = 0) -> tuple[Tensor, Tensor, bool]:
    """text [B, L, E] and mask [B, L] up to the last column that a sample uses, and whether all that is left is used."""
    used = mask.bool()
    last = (used.any(0) * torch.arange(1, mask.shape[1] + 1, device=mask.device)).amax() if mask.shape[1] else 0
    length = max(int(last), least)
    return text[:, :length], mask[:, :length], bool(used[:, :length].all())


def _argument_names(transformer: nn.Module) -> list[str]:
    return list(inspect.signature(type(transformer).forward).parameters)[1:]
