"""The hooks on the blocks of a trunk, what is traced when blocks are compiled, and on the embedders before it.

A block reads one attribute, `trunk.current_pass`, and the last one writes `trunk.current_pass.left`.
"""

from dataclasses import dataclass, field
from typing import Any, Protocol

from diffusers.hooks import ModelHook
from diffusers.hooks.hooks import BaseState, StateManager
from torch import Tensor, nn

from vidaccel.compat.diffusers import set_stateful
from vidaccel.compat.torch import call_of, compiled_call, set_compiled_call
from vidaccel.families.base import BlockList
from vidaccel.families.walk import as_output, named_arguments, named_outputs
from vidaccel.forecasters.base import Cached, Forecaster, Tokens


@dataclass(eq=False)
class TrunkPass:
    """A pass of the transformer while it lasts, and longer where backward recomputes its blocks."""

    forecaster: Forecaster | None
    memory: tuple[Cached, ...]
    t: Tensor | None
    context: str
    final: bool
    passes: int = 1
    left: Tokens = field(default_factory=dict)
    """Set by the last block if it runs."""
    answer: Tokens = field(default_factory=dict)
    """The forecaster's, for a trunk to whose tokens something is added between its blocks."""
    held: dict[str, Any] = field(default_factory=dict)
    """Set by the embedders that are held, if the blocks run."""


class Owner(Protocol):
    """What a block asks of its trunk."""

    current_pass: TrunkPass | None
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
        try:
            return self.context.name
        except ValueError:  # none is in force
            return None


class StaticEmbedder:
    """Calls an embedder, unless the pass is predicted and what it gave in the last full one is remembered. A forecaster
    that `recomputes` has it called all the same.

    It takes the place that PyTorch has for a compiled module's call, and what is there if it is: a hook on `forward`
    would be within the graph of HunyuanVideo's text refiner, which `compile_repeated_blocks` compiles.
    """

    def __init__(self, trunk: Owner, path: str, module: nn.Module):
        self._trunk, self._path, self._module = trunk, path, module
        self.take_place()

    def take_place(self) -> None:
        """Again, where the module was compiled since, which put something else there."""
        if (there := compiled_call(self._module)) is not self:
            self._compiled = there
            set_compiled_call(self._module, self)

    def __call__(self, *args, **kwargs) -> Any:
        current_pass = self._trunk.current_pass
        if (
            current_pass is not None
            and current_pass.forecaster is not None
            and not getattr(current_pass.forecaster, "recomputes", False)
            and self._path in current_pass.memory[0].held
        ):
            return current_pass.memory[0].held[self._path]
        output = (self._compiled or call_of(self._module))(*args, **kwargs)
        if current_pass is not None and current_pass.forecaster is None:
            current_pass.held[self._path] = _detached(output)
        return output

    def remove(self) -> None:
        """Leave the module as it was, or as it has been compiled since."""
        if compiled_call(self._module) is self:
            set_compiled_call(self._module, self._compiled)


class BlockHook(ModelHook):
    """On each block of a trunk: it runs, unless a forecaster is in force. The first block's then has the tokens made,
    the others' hand theirs on, and the last one's gives those that were made where others are added in between.

    One class serves the first, the last and the other blocks, and looks at which it is only where they differ:
    torch.compile makes a graph for each answer, and the graphs of all blocks of a model count towards one limit.
    """

    def __init__(self, trunk: Owner, kind: BlockList, first: bool, last: bool, beside: bool = False):
        """`beside` says that the trunk has blocks beside it: the last block then gives the answer itself."""
        super().__init__()
        self.trunk, self.kind, self.first, self.last, self.beside = trunk, kind, first, last, beside
        set_stateful(self, first)
        self.open = trunk.open if first else None
        """Where diffusers finds it."""

    def new_forward(self, module: nn.Module, *args, **kwargs) -> Any:
        current_pass = self.trunk.current_pass
        if current_pass is not None and current_pass.forecaster is not None:
            return self.predicted(current_pass, args, kwargs)
        output = self.fn_ref.original_forward(*args, **kwargs)
        if self.last and current_pass is not None:
            left = named_outputs(self.kind, output)
            current_pass.left = {name: tokens.detach() for name, tokens in left.items()}
        return output

    def reset_state(self, module: nn.Module) -> nn.Module:
        """Pipelines of diffusers ask for this at the end of a generation."""
        self.trunk.reset()
        return module

    def predicted(self, current_pass: TrunkPass, args: tuple, kwargs: dict[str, Any]) -> Tensor | tuple[Tensor, ...]:
        """As the block itself would return it."""
        tokens = named_arguments(self.kind, args, kwargs)
        if self.first:
            answer = current_pass.forecaster(tokens, current_pass.memory, current_pass.t)
            tokens = tokens | answer
            if self.beside:
                current_pass.answer = answer
        elif self.beside and self.last:
            tokens = tokens | current_pass.answer
        return as_output(self.kind, tokens)


class SideHook(ModelHook):
    """On each block beside a trunk: it runs, unless a forecaster is in force, and then gives zeros, of no size, since
    they are added to tokens."""

    def __init__(self, trunk: Owner, kind: BlockList):
        super().__init__()
        self.trunk, self.kind = trunk, kind

    def new_forward(self, module: nn.Module, *args, **kwargs) -> Any:
        current_pass, original = self.trunk.current_pass, self.fn_ref.original_forward
        assert original is not None
        if current_pass is None or current_pass.forecaster is None:
            return original(*args, **kwargs)
        return self.predicted(current_pass, args, kwargs)

    def predicted(self, current_pass: TrunkPass, args: tuple, kwargs: dict[str, Any]) -> Tensor | tuple[Tensor, ...]:
        """As the block itself would return it."""
        tokens: Tensor = named_arguments(self.kind, args, kwargs)["hidden_states"]
        return as_output(self.kind, {name: tokens.new_zeros(()) for name in self.kind.returns})


class Absent(nn.Module):
    """In the place of a block whose weights are sharded, which any call of it would gather."""

    def __init__(self, hook: BlockHook | SideHook):
        super().__init__()
        self.hook = hook

    def forward(self, *args, **kwargs) -> Any:
        current_pass = self.hook.trunk.current_pass
        assert current_pass is not None
        return self.hook.predicted(current_pass, args, kwargs)


def _detached(output: Tensor | tuple[Tensor, ...]) -> Tensor | tuple[Tensor, ...]:
    return output.detach() if isinstance(output, Tensor) else tuple(part.detach() for part in output)
