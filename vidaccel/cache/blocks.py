"""The hooks on the blocks of a trunk: what is traced when blocks are compiled.

A block reads one attribute, `trunk.now`, and the last one writes `trunk.now.left`.
"""

from dataclasses import dataclass, field
from typing import Any, Protocol

from diffusers.hooks import ModelHook
from diffusers.hooks.hooks import BaseState, StateManager
from torch import Tensor, nn

from vidaccel.models.family import BlockList
from vidaccel.predictor.forecasters import Cached, Forecaster, Tokens


@dataclass(eq=False)
class Pass:
    """A pass of the transformer while it lasts, and longer where backward recomputes its blocks."""

    forecaster: Forecaster | None
    memory: tuple[Cached, ...]
    t: Tensor | None
    context: str
    final: bool
    left: Tokens = field(default_factory=dict)
    """Set by the last block if it runs."""


class Owner(Protocol):
    """What a block asks of its trunk."""

    now: Pass | None
    """The pass that is under way; None if it is to be left alone."""
    open: "OpenContext"
    """The context that is open."""

    def reset(self) -> None:
        """Forget what is remembered."""


class OpenContext(StateManager):
    """Which context `transformer.cache_context` has in force: diffusers tells every StateManager that a hook holds."""

    def __init__(self):
        super().__init__(BaseState)

    @property
    def name(self) -> str | None:
        return self._context.name if self._context else None


class _Block(ModelHook):
    """What all blocks share: they run unless a forecaster is in force."""

    def __init__(self, trunk: Owner, kind: BlockList, last: bool):
        super().__init__()
        self.trunk, self.kind, self.last = trunk, kind, last

    def new_forward(self, module: nn.Module, *args, **kwargs) -> Any:
        now = self.trunk.now
        if now is not None and now.forecaster is not None:
            return self._returned(self.predict(self._named(args, kwargs), now))
        output = self.fn_ref.original_forward(*args, **kwargs)
        if self.last and now is not None:
            outputs = output if isinstance(output, tuple) else (output,)
            now.left = {name: tokens.detach() for name, tokens in zip(self.kind.returns, outputs, strict=True)}
        return output

    def predict(self, arguments: dict[str, Tensor], now: Pass) -> dict[str, Tensor]:
        """Tokens by name from a block's arguments by name; the first block has them made."""
        return arguments

    def _named(self, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
        """By the record's names; HunyuanVideo passes more behind them."""
        return dict(zip(self.kind.arguments, args, strict=False)) | kwargs

    def _returned(self, tokens: dict[str, Tensor]) -> Tensor | tuple[Tensor, ...]:
        """As the block itself returns them."""
        returned = tuple(tokens[name] for name in self.kind.returns)
        return returned if len(returned) > 1 else returned[0]


class FollowingBlock(_Block):
    """Any block but the first: on a predicted pass it hands its tokens on."""


class FirstBlock(_Block):
    """The first block: on a predicted pass its tokens are the forecaster's."""

    _is_stateful = True

    def __init__(self, trunk: Owner, kind: BlockList, last: bool):
        super().__init__(trunk, kind, last)
        self.open = trunk.open

    def predict(self, arguments: dict[str, Tensor], now: Pass) -> dict[str, Tensor]:
        return arguments | now.forecaster(arguments, now.memory, now.t)

    def reset_state(self, module: nn.Module) -> nn.Module:
        """Pipelines of diffusers ask for this at the end of a generation."""
        self.trunk.reset()
        return module
