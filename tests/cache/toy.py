"""A transformer whose every number can be worked out by hand: each block doubles its video tokens."""

from dataclasses import replace

import torch
from diffusers.models.cache_utils import CacheMixin
from torch import Tensor, nn

from vidaccel.families.base import BlockList
from vidaccel.families.wan import WAN
from vidaccel.forecasters.base import Cached, Tokens

TOKENS = ("hidden_states", "encoder_hidden_states")
TOY = replace(
    WAN,
    name="toy",
    block_lists=(
        BlockList("doubles", arguments=(*TOKENS, "temb", "freqs"), returns=TOKENS),
        BlockList("singles", arguments=(*TOKENS, "temb", "rope"), returns=TOKENS),
    ),
    static_embedders=("texts.embedder",),
)
"""Two lists, as in HunyuanVideo, whose fourth argument has two names."""
BY_KEYWORD = replace(
    TOY,
    block_lists=tuple(
        BlockList(name, arguments=(*TOKENS, "temb", "rotary"), returns=TOKENS, keywords=True)
        for name in ("doubles", "singles")
    ),
)
"""The same for a `Toy(keywords=True)`."""


BESIDE = replace(
    TOY,
    side_lists=(
        BlockList("sides", arguments=("hidden_states", "control"), returns=("hint", "control"), added_after="hinted"),
    ),
)
"""With blocks beside the trunk, for a `Hinted`."""


class Double(nn.Module):
    """Video x 2, text + 1; counts how often it ran."""

    def __init__(self):
        super().__init__()
        self.runs = 0

    def forward(self, hidden_states, encoder_hidden_states, temb, rotary, *extra):
        self.runs += 1
        return hidden_states * 2, encoder_hidden_states + 1


class Text(nn.Module):
    """As many text tokens as video, all `number`; counts how often it ran."""

    def __init__(self):
        super().__init__()
        self.number, self.runs = 0.0, 0

    def forward(self, video, scale=1.0):
        self.runs += 1
        return torch.full_like(video, scale * self.number)


class Toy(nn.Module, CacheMixin):
    """3 x + 1 -> `blocks` doublings -> y - temb: with x = 1 and four blocks, 4 x 2^4 = 64."""

    _supports_gradient_checkpointing = True

    def __init__(self, doubles: int = 2, singles: int = 2, keywords: bool = False):
        super().__init__()
        self.keywords = keywords
        self.doubles = nn.ModuleList(Double() for _ in range(doubles))
        self.singles = nn.ModuleList(Double() for _ in range(singles))
        self.texts = nn.ModuleDict({"embedder": Text()})
        self.gradient_checkpointing = False

    def forward(self, x: Tensor, temb: float = 0.0, fail: bool = False) -> tuple[Tensor]:
        video, text = 3 * x + 1, self.texts["embedder"](x, scale=1.0)
        for block in (*self.doubles, *self.singles):
            arguments = video, text, temb, "rotary", "extra"
            if self.gradient_checkpointing and torch.is_grad_enabled():
                video, text = self._gradient_checkpointing_func(block, *arguments)
            elif self.keywords:  # in another order than the block's own
                video, text = block(rotary="rotary", temb=temb, encoder_hidden_states=text, hidden_states=video)
            else:
                video, text = block(*arguments)
        if fail:
            raise ArithmeticError("in the head")
        return (video - temb,)

    @property
    def runs(self) -> list[int]:
        return [block.runs for block in (*self.doubles, *self.singles)]


class Side(nn.Module):
    """A hint of 10 times what it is handed, which it hands on as one more; counts how often it ran."""

    def __init__(self):
        super().__init__()
        self.runs = 0

    def forward(self, hidden_states, control):
        self.runs += 1
        return 10 * control, control + 1


class Hinted(Toy):
    """A `Toy` to whose tokens 10 is added after the first doubling and 20 after the third: with x = 1 four blocks make
    ((4 x 2 + 10) x 4 + 20) x 2 = 184."""

    def __init__(self, hinted: tuple[int, ...] = (0, 2)):
        super().__init__()
        self.config = {"hinted": hinted}
        self.sides = nn.ModuleList(Side() for _ in hinted)

    def forward(self, x: Tensor) -> tuple[Tensor]:
        video, text, control, hints = 3 * x + 1, self.texts["embedder"](x, scale=1.0), torch.ones_like(x), []
        for side in self.sides:
            hint, control = side(video, control)
            hints.append(hint)
        for index, block in enumerate((*self.doubles, *self.singles)):
            video, text = block(video, text, 0.0, "rotary")
            if index in self.config["hinted"]:
                video = video + hints.pop(0)
        return (video,)


class Plus:
    """Cached tokens + what enters the trunk; notes what it was called with."""

    history = 1

    def __init__(self):
        self.calls: list[tuple[dict, tuple[Cached, ...], Tensor | None]] = []

    def __call__(self, arguments: dict, memory: tuple[Cached, ...], t: Tensor | None) -> Tokens:
        self.calls.append((arguments, memory, t))
        return {"hidden_states": memory[0].tokens["hidden_states"] + arguments["hidden_states"]}
