"""The trunk boundary: one hook on a transformer's blocks that runs them, or puts a forecaster in their place.

Output head and embedders always run, but for embedders that give the same at every step or nearly (the family's
`static_embedders`: rotary embeddings, text), whose last output a predicted pass takes. Between them a pass of the
transformer goes one of two ways:

- *full*: the blocks run as they are, and the tokens that leave the last one are remembered;
- *predicted*: the first block's call is answered by a forecaster, which gets that block's arguments and what is
  remembered; the other blocks hand its answer on. What blocks beside the trunk would add in between (the family's
  `side_lists`) is zero.

Training, collection and search say which, per pass:

    with Trunk(transformer, family) as trunk:
        with torch.no_grad(), trunk.full(t=0.9):
            transformer(...)
        with trunk.predicted(predictor, t=0.8):
            loss(transformer(...)).backward()

In a pipeline `trunk.choose` is asked before each pass. Without either, a pass is left alone and nothing is remembered.

What is remembered is kept apart by context: the name that `transformer.cache_context` has in force ("cond", "uncond"),
else the one that `choose` gives, else "default". It is the last block's output itself, detached and not copied: no head
of any family writes into it. (Outputs of CUDA graphs are overwritten by the next replay: compile blocks without
mode="reduce-overhead".) An exception in a pass forgets everything.

Blocks (blocks.py) only follow `trunk.current_pass`; it is set in hooks of the transformer, outside the blocks, so that
compiled blocks have two static graphs. Those are torch's own hooks and not a `ModelHook`, because CPU offload puts the
transformer's forward back to what it was after each generation.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from diffusers.hooks import HookRegistry
from diffusers.hooks.context_parallel import ContextParallelSplitHook
from torch import Tensor, nn

from vidaccel.cache.blocks import Absent, BlockHook, OpenContext, SideHook, StaticEmbedder, TrunkPass
from vidaccel.cache.memory import Memory
from vidaccel.compat.diffusers import (
    checkpointing,
    forget_listed_hooks,
    hook_registry,
    remove_hook_registry,
    set_checkpointing,
)
from vidaccel.compat.torch import is_sharded
from vidaccel.errors import UserError
from vidaccel.families.base import BlockList, DiTFamily
from vidaccel.families.walk import blocks_of, side_blocks_of
from vidaccel.forecasters.base import Cached, Forecaster

HOOK = "vidaccel_trunk"
DEFAULT_CONTEXT = "default"


@dataclass(frozen=True)
class Mode:
    """Which way a pass goes."""

    forecaster: Forecaster | None = None
    """What stands in for the blocks; None runs them."""
    t: Tensor | None = None
    """Time of the pass, [] or [B]."""
    memory: tuple[Cached, ...] | None = None
    """What the forecaster looks back on instead of what this trunk remembers."""
    context: str = DEFAULT_CONTEXT
    """Context of the pass where the caller of the transformer opened none."""
    final: bool = False
    """Whether it is the context's last: what is remembered of it is freed when the pass ends."""
    passes: int = 1
    """How many it counts as."""


class Trunk:
    """The blocks of one transformer, under the hook from `attach` to `detach`; also a context manager."""

    def __init__(self, transformer: nn.Module, family: DiTFamily, history: int = 1):
        """`history` is the number of full passes to remember a context: the forecaster's own."""
        self.transformer, self.family = transformer, family
        self.choose: Callable[[], Mode] | None = None
        """Asked before a pass for which no mode is in force. It may call `reset`."""
        self.full_passes, self.predicted_passes = 0, 0
        """Passes of either mode that went well."""
        self.current_pass: TrunkPass | None = None
        self._mode: Mode | None = None
        self.remembered = Memory(history)
        """What full passes have left."""
        self.open = OpenContext()
        self._undo: list[Callable[[], None]] = []
        self._absent: dict[str, nn.ModuleList] = {}
        """By the name of a list of blocks, what stands in its place where it is taken out."""
        self._embedders: list[StaticEmbedder] = []
        self._at_end: list[Callable[[], None]] = []
        """What puts the transformer back when the pass ends."""

    @contextmanager
    def full(self, t: float | Tensor | None = None) -> Iterator[None]:
        """Passes in this block run the trunk and are remembered; `t` is their time, for forecasters that ask for it."""
        with self._in_force(Mode(None, _time(t))):
            yield

    @contextmanager
    def predicted(
        self, forecaster: Forecaster, t: float | Tensor | None = None, memory: tuple[Cached, ...] | None = None
    ) -> Iterator[None]:
        """Passes in this block are the forecaster's, from `memory` if given; gradients reach it and the embedders.

        Backward may come after the block: recomputed blocks go the way they went.
        """
        with self._in_force(Mode(forecaster, _time(t), memory)):
            yield

    def memory(self, context: str = DEFAULT_CONTEXT) -> tuple[Cached, ...]:
        """What full passes of a context have left, newest first."""
        return self.remembered.of(context)

    def reset(self) -> None:
        """Forget all contexts."""
        self.remembered.reset()

    def attach(self) -> "Trunk":
        """Put the hooks on.

        Raises:
            UserError: the transformer is attached already, one of diffusers' own caches is enabled, or tokens of blocks
                beside the trunk are added after its last one.
        """
        name = type(self.transformer).__name__
        blocks = blocks_of(self.transformer, self.family)
        if any(HOOK in registry.hooks for _, block in blocks if (registry := hook_registry(block))):
            raise UserError(f"this {name} is attached already", "detach it first, or leave its `with` block")
        if getattr(self.transformer, "is_cache_enabled", False):
            raise UserError(f"a cache of diffusers is enabled on this {name}", "call its disable_cache() first")
        _refuse_late_sides(self.transformer, self.family, len(blocks) - 1)
        sides = side_blocks_of(self.transformer, self.family)
        for index, (kind, block) in enumerate(blocks):
            ends = {"first": index == 0, "last": index == len(blocks) - 1}
            self._hook(kind, block, BlockHook(self, kind, **ends, beside=bool(sides)))
        for kind, block in sides:
            self._hook(kind, block, SideHook(self, kind))
        modules = dict(self.transformer.named_modules())
        for path in self.family.static_embedders:
            if path in modules:  # that of an image is missing from models without one
                self._embedders.append(StaticEmbedder(self, path, modules[path]))
                self._undo.append(self._embedders[-1].remove)
        forget_listed_hooks(self.transformer)
        self._undo.append(self.transformer.register_forward_pre_hook(self._begin).remove)
        self._undo.append(self.transformer.register_forward_hook(self._end, always_call=True).remove)
        return self

    def detach(self) -> None:
        """Take the hooks off and forget everything: the transformer is as it was. A second call does nothing."""
        self.reset()
        while self._undo:
            self._undo.pop()()
        self._absent.clear()
        self._embedders.clear()
        forget_listed_hooks(self.transformer)

    def __enter__(self) -> "Trunk":
        return self.attach()

    def __exit__(self, *error) -> None:
        self.detach()

    @contextmanager
    def _in_force(self, mode: Mode) -> Iterator[None]:
        before, self._mode = self._mode, mode
        try:
            yield
        finally:
            self._mode = before

    def _hook(self, kind: BlockList, block: nn.Module, hook: BlockHook | SideHook) -> None:
        self._absent.setdefault(kind.name, nn.ModuleList()).append(Absent(hook))
        registry = HookRegistry.check_if_exists_or_initialize(block)
        # What splits a block's inputs over several devices stays outside, so that forecasters see split tokens too.
        outside = {name: each for name, each in registry.hooks.items() if isinstance(each, ContextParallelSplitHook)}
        for name in outside:
            registry.remove_hook(name, recurse=False)
        registry.register_hook(hook, HOOK)
        for name, each in outside.items():
            registry.register_hook(each, name)
        self._undo.append(lambda: self._unhook(block, registry))

    def _unhook(self, block: nn.Module, registry: HookRegistry) -> None:
        registry.remove_hook(HOOK, recurse=False)
        if not registry.hooks:
            remove_hook_registry(block)
        if vars(block)["forward"] == type(block).forward.__get__(block):
            del block.forward

    def _begin(self, transformer: nn.Module, inputs: tuple) -> None:
        if self.current_pass is not None:  # a KeyboardInterrupt passes `_end` by
            self._end(transformer, inputs, None)
        mode = self._mode or (self.choose() if self.choose else None)
        if mode is None:
            return
        for embedder in self._embedders:
            embedder.take_place()
        context = self.open.name or mode.context
        if mode.forecaster is None:
            self.remembered.make_room(context)
            memory = ()
        else:
            memory = self.memory(context) if mode.memory is None else mode.memory
            if not memory:
                raise RuntimeError(f'a predicted pass before any full pass in context "{context}"')
        self.current_pass = TrunkPass(mode.forecaster, memory, mode.t, context, mode.final, mode.passes)
        if getattr(transformer, "gradient_checkpointing", False):
            self._bind_checkpoints(self.current_pass)
        if mode.forecaster is not None and any(is_sharded(block) for _, block in blocks_of(transformer, self.family)):
            self._take_out_blocks()

    def _end(self, transformer: nn.Module, inputs: tuple, output: Any) -> None:
        """`output` is None if the pass raised."""
        current_pass, self.current_pass = self.current_pass, None
        while self._at_end:
            self._at_end.pop()()
        if output is None:
            self.reset()
        elif current_pass is not None:
            self._keep(current_pass)

    def _keep(self, current_pass: TrunkPass) -> None:
        """Count a pass that went well, and remember what it left."""
        if current_pass.forecaster is None:
            self.full_passes += current_pass.passes
        else:
            self.predicted_passes += current_pass.passes
        if current_pass.final:
            self.remembered.forget(current_pass.context)
        elif current_pass.left:
            left = Cached(current_pass.left, current_pass.t, current_pass.held)
            self.remembered.advance(current_pass.context, left)

    def _bind_checkpoints(self, current_pass: TrunkPass) -> None:
        """Let blocks that are checkpointed in this pass be recomputed as they ran in it, whatever is then in force."""
        checkpoint = checkpointing(self.transformer)

        def bound(block: nn.Module, *arguments):
            def run(*arguments):
                before, self.current_pass = self.current_pass, current_pass
                try:
                    return block(*arguments)
                finally:
                    self.current_pass = before

            return checkpoint(run, *arguments)

        set_checkpointing(self.transformer, bound)
        self._at_end.append(lambda: set_checkpointing(self.transformer, checkpoint))

    def _take_out_blocks(self) -> None:
        """Until the pass ends: their hooks answer for them, and FSDP2 gathers no weights that nobody uses."""
        for name, absent in self._absent.items():
            blocks = getattr(self.transformer, name)
            setattr(self.transformer, name, absent)
            self._at_end.append(partial(setattr, self.transformer, name, blocks))


def _refuse_late_sides(transformer: Any, family: DiTFamily, last: int) -> None:
    """`UserError` where what is remembered of the last block, at that position, is not what reaches the head."""
    for kind in family.side_lists:
        if kind.added_after and last in transformer.config[kind.added_after]:
            raise UserError(
                f"this {type(transformer).__name__} adds tokens of its {kind.name} after its last block, {last}",
                f"predicted steps are for models whose {kind.added_after} end before it",
            )


def _time(t: float | Tensor | None) -> Tensor | None:
    return None if t is None else torch.as_tensor(t, dtype=torch.float32)
