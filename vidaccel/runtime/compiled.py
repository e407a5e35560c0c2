"""Transformer blocks behind torch.compile, each one's `forward` by itself.

All blocks of one kind share one graph: nothing but their weights differs. What hooks a block afterwards, as the trunk
boundary does, stays outside the graph, so full and predicted steps go from graph to graph and never retrace one. With
CUDA graphs a block's output is overwritten by the next replay; the last block of a trunk therefore hands out a copy,
which a cache may keep.

A pass of dual numbers is not compiled, because torch.compile drops their tangents. A pass that records gradients is
compiled without CUDA graphs.
"""

import copy
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from vidaccel.compat.torch import has_cpp_compiler, recompile_limit, set_recompile_limit
from vidaccel.errors import UserError
from vidaccel.families.base import DiTFamily
from vidaccel.families.walk import blocks_of, side_blocks_of
from vidaccel.kernels import select, tangents

BACKEND = "inductor"
RECOMPILE_LIMIT = 64
"""Graphs of all blocks, of every size of video and of the predictor's blocks count towards one limit."""
HAS_OWN_LIMIT = "recompile_limit" in inspect.signature(torch.compile).parameters
"""Whether this torch takes the limit of one compiled function; older ones have only that of the whole process."""


class CompiledForward:
    """Takes the place of one block's `forward`."""

    def __init__(self, block: nn.Module, *, dynamic: bool | None, graphs: bool, kept: bool = False):
        """
        Args:
            block: its class's `forward` is what runs.
            dynamic: False compiles each shape anew; None lets a size that is seen to change become a variable.
            graphs: record CUDA graphs.
            kept: whether outputs outlive the pass.
        """
        self.block, self.dynamic, self.graphs, self.kept = block, dynamic, graphs, kept
        self._plain = self._compiled()
        self._graphed = self._compiled(mode="reduce-overhead") if graphs else self._plain

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        if tangents.any_tangent(*tensors):
            return self._stock()(*args, **kwargs)
        run = self._plain if torch.is_grad_enabled() else self._graphed
        output = run(*args, **kwargs)
        if not (self.kept and self.graphs):
            return output
        return tuple(tensor.clone() for tensor in output) if isinstance(output, tuple) else output.clone()

    def like(self, block: nn.Module) -> "CompiledForward":
        """The same for another block, whose outputs are not kept."""
        return CompiledForward(block, dynamic=self.dynamic, graphs=self.graphs)

    def _stock(self) -> Callable:
        return type(self.block).forward.__get__(self.block)

    def _compiled(self, **options: Any) -> Callable:
        if HAS_OWN_LIMIT:
            options["recompile_limit"] = max(recompile_limit(), RECOMPILE_LIMIT)
        return torch.compile(self._stock(), backend=BACKEND, fullgraph=True, dynamic=self.dynamic, **options)

    def __deepcopy__(self, memo: dict) -> "CompiledForward":
        block = copy.deepcopy(self.block, memo)
        return CompiledForward(block, dynamic=self.dynamic, graphs=self.graphs, kept=self.kept)


def check_compiler(device: torch.device) -> None:
    """Raises `UserError` if what torch.compile hands its code to is missing: Triton on CUDA, else a C++ compiler."""
    if device.type == "cuda" and not select.HAVE_TRITON:
        raise UserError("compile=true, and Triton is not installed", "pip install vidaccel[gpu]")
    if device.type != "cuda" and BACKEND == "inductor" and not has_cpp_compiler():
        raise UserError("compile=true on a CPU needs a C++ compiler", "install g++, or set compile=false")


def compile_blocks(transformer: nn.Module, family: DiTFamily, *, dynamic: bool | None = False) -> Callable[[], None]:
    """Compile every block of the trunk and beside it; with CUDA graphs on a CUDA device.

    Returns:
        What undoes it.

    Raises:
        UserError: a block carries hooks or is compiled already.
    """
    blocks = [block for _, block in (*side_blocks_of(transformer, family), *blocks_of(transformer, family))]
    if any("forward" in vars(block) for block in blocks):
        raise UserError(
            f"the blocks of this {type(transformer).__name__} are hooked or compiled already",
            "compile a model once, before anything is attached to it",
        )
    users_limit = recompile_limit()
    if not HAS_OWN_LIMIT:
        set_recompile_limit(max(users_limit, RECOMPILE_LIMIT))
    graphs = next(transformer.parameters()).is_cuda
    for block in blocks:
        _install(block, CompiledForward(block, dynamic=dynamic, graphs=graphs, kept=block is blocks[-1]))
    marks = [transformer.register_forward_pre_hook(_new_step)] if graphs else []

    def undo() -> None:
        for block in blocks:
            del block.forward, block.compiled
        for mark in marks:
            mark.remove()
        if not HAS_OWN_LIMIT:
            set_recompile_limit(users_limit)

    return undo


def compile_like(block: nn.Module, original: nn.Module) -> None:
    """Compile `block` if `original` is compiled, in the same way."""
    forward = vars(original).get("compiled")
    if forward is not None:
        _install(block, forward.like(block))


def _install(block: nn.Module, forward: CompiledForward) -> None:
    # Hooks put themselves in the place of `forward`, so it is kept under a name of its own as well.
    block.forward = block.compiled = forward


def _new_step(transformer: nn.Module, inputs: tuple) -> None:
    """CUDA graphs of a pass are recorded and replayed as one chain, which begins here."""
    torch.compiler.cudagraph_mark_step_begin()
