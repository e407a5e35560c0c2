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
from diffusers.models.transformers.transformer_hunyuan_video15 import HunyuanVideo15AttnProcessor2_0
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from vidaccel.errors import UserError
from vidaccel.families.base import DiTFamily
from vidaccel.runtime.fuse import HunyuanVideoProcessor

TEXTS = {
    "encoder_hidden_states": ("encoder_attention_mask", 1),
    "encoder_hidden_states_2": ("encoder_attention_mask_2", 0),
}
"""Text argument of a transformer -> the argument with its mask, and how many tokens have to stay: what averages the
first over its tokens wants one."""


def masks_text(transformer: nn.Module) -> bool:
    """Whether this transformer masks the padding of its text."""
    return any(mask in _argument_names(transformer) for mask, _ in TEXTS.values())


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
        self._need = need
        self._arguments = _argument_names(transformer)
        self._undo: list[Callable[[], None]] = []
        self._dense = False
        """Whether the pass that is under way needs no mask."""
        self._known: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
        """Masks seen by a block -> whether they mask nothing. A block that is computed again in a backward pass gets
        the mask of its own pass."""
        if not masks_text(transformer):
            return
        self._hook(transformer.register_forward_pre_hook(self._cut, with_kwargs=True))
        self._hook(transformer.register_forward_hook(self._end, always_call=True))
        for kind in family.block_lists:
            position = kind.arguments.index("attention_mask")
            for block in getattr(transformer, kind.name):
                self._hook(block.register_forward_pre_hook(partial(self._drop, position)))
                self._accept_none(block)

    def remove(self) -> None:
        """The transformer as it was. A second call does nothing."""
        while self._undo:
            self._undo.pop()()

    def _hook(self, handle) -> None:
        self._undo.append(handle.remove)

    def _accept_none(self, block: nn.Module) -> None:
        """HunyuanVideo-1.5's own processor cannot do without a mask."""
        for attention in block.children():
            stock = getattr(attention, "processor", None)
            if type(stock) is HunyuanVideo15AttnProcessor2_0:
                attention.set_processor(HunyuanVideoProcessor(stock, "reference"))
                self._undo.append(lambda attention=attention, stock=stock: attention.set_processor(stock))

    def _cut(self, transformer: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        """A forward pre-hook: inputs by their names, wherever they stood."""
        named = dict(zip(self._arguments, args, strict=False)) | kwargs
        self._dense = True
        for text, (mask, least) in TEXTS.items():
            if named.get(mask) is not None:
                named[text], named[mask], dense = cut(named[text], named[mask], least)
                self._dense &= dense
        if self._need and not self._dense:
            raise UserError(
                f"{self._need} takes no mask, and the texts of this batch differ in length",
                "generate them one by one, or set attention=native",
            )
        image = named.get("image_embeds")
        if image is not None and not image.any():
            # HunyuanVideo-1.5 reads an all-zero image as "none" and masks its tokens, whatever their number.
            named["image_embeds"] = image[:, :0]
        return (), named

    def _end(self, transformer: nn.Module, inputs: tuple, output) -> None:
        self._dense = False

    def _drop(self, position: int, block: nn.Module, args: tuple) -> tuple:
        """A block's arguments, without the mask at `position` where it masks nothing."""
        mask = args[position]
        if mask is None or not self._known.setdefault(mask, self._dense):
            return args
        return *args[:position], None, *args[position + 1 :]


def cut(text: Tensor, mask: Tensor, least: int = 0) -> tuple[Tensor, Tensor, bool]:
    """text [B, L, E] and mask [B, L] up to the last column that a sample uses, and whether all that is left is used."""
    used = mask.bool()
    last = (used.any(0) * torch.arange(1, mask.shape[1] + 1, device=mask.device)).amax() if mask.shape[1] else 0
    length = max(int(last), least)
    return text[:, :length], mask[:, :length], bool(used[:, :length].all())


def _argument_names(transformer: nn.Module) -> list[str]:
    return list(inspect.signature(type(transformer).forward).parameters)[1:]
