"""One optimiser step, in one of two ways.

eager   pass after pass, the optimisers after them; every step's loss is known at once
graph   forward, backward, clipping and optimisers as one CUDA graph, replayed on what is drawn into its own memory; its
        loss is known when it is asked for. A small model is bound by launches: such a step is four times as fast

Steps that are not finite change nothing, either way.
"""

import contextlib
import logging
import math
from collections.abc import Hashable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from vidaccel.compat.torch import compiled_call, recompile_limit, set_compiled_call, set_recompile_limit
from vidaccel.config.training import TrainConfig
from vidaccel.families.walk import blocks_of
from vidaccel.models.velocity import Velocity
from vidaccel.processes import rank, world
from vidaccel.runtime.compiled import RECOMPILE_LIMIT
from vidaccel.train.objective import Batch, Loss, Objective, drawing_device, generator_for
from vidaccel.train.parallel import mean

log = logging.getLogger(__name__)
WARM_UP = 3
"""Runs before a graph is captured: libraries set themselves up, and compiled blocks compile."""


def autocast(config: TrainConfig, device: torch.device) -> torch.autocast:
    """What a training's passes run under. Where activations are computed again, weights are cast again too: autocast
    would keep a copy of all that are trained, whole ones of sharded ones, until the pass ends."""
    return torch.autocast(
        device.type, torch.bfloat16, enabled=config.precision == "bfloat16", cache_enabled=not config.checkpointing
    )


class Outcome(NamedTuple):
    """Of a step, and how many were not finite since the outcome before."""

    loss: float
    norm: float
    measured: dict[str, float]
    skipped: int
    bad_in_a_row: int
    """Not finite in a row, at most."""

    @property
    def good(self) -> bool:
        return math.isfinite(self.loss) and math.isfinite(self.norm)


class EagerStep:
    """Of `accumulate` passes, in one process of many or in the only one."""

    def __init__(
        self,
        model: nn.Module,
        loss: Loss,
        config: TrainConfig,
        optimizers: Sequence[torch.optim.Optimizer],
        seed: int,
    ):
        self.model, self.loss, self.config, self.optimizers, self.seed = model, loss, config, optimizers, seed
        self._device = next(model.parameters()).device
        self._bad_in_a_row = 0
        self._outcome: Outcome | None = None

    def __call__(self, step: int, rate: float) -> Outcome | None:
        set_rate(self.optimizers, rate)
        value, measured = self._accumulate(step)
        norm = math.hypot(*(float(clip(group["params"], self.config.clip_norm)) for group in groups(self.optimizers)))
        good = math.isfinite(value) and math.isfinite(norm)
        if good:
            for optimizer in self.optimizers:
                optimizer.step()
        self._bad_in_a_row = 0 if good else self._bad_in_a_row + 1
        self.model.zero_grad()
        self._outcome = Outcome(value, norm, measured, int(not good), self._bad_in_a_row)
        return self._outcome

    def outcome(self) -> Outcome:
        """Of the newest step."""
        assert self._outcome is not None
        return self._outcome

    def _accumulate(self, step: int) -> tuple[float, dict[str, float]]:
        """Gradients of `accumulate` forward passes, averaged; their loss and metrics, averaged over all processes."""
        config, passes = self.config, []
        measured: dict[str, Any] = {}
        for part in range(config.accumulate):
            index = (step * config.accumulate + part) * world() + rank()
            seed_dropout(self.seed, index)
            with autocast(config, self._device):
                generator = generator_for(self.seed, index, drawing_device(self.loss, self.model))
                value, measured = self.loss(self.model, index, generator)
            (value / config.accumulate).backward()
            passes.append([float(m.detach() if isinstance(m, Tensor) else m) for m in (value, *measured.values())])
        value, *values = mean([sum(column) / config.accumulate for column in zip(*passes, strict=True)])
        return value, dict(zip(measured, values, strict=True))


class CaptureFailed(Exception):
    """A step does not run as a graph; nothing has changed."""


class Captured(NamedTuple):
    """A graph, the memory that it reads and that it writes to."""

    run: Any
    tensors: dict[str, Tensor]
    results: Tensor
    """Loss, gradient norm, then the metrics."""
    names: tuple[str, ...]


class GraphStep:
    """One pass a step, in one process.

    With `capture` false the same runs eagerly, in the same memory.
    """

    def __init__(
        self,
        model: nn.Module,
        objective: Objective,
        config: TrainConfig,
        optimizers: Sequence[torch.optim.Optimizer],
        seed: int,
        capture: bool = True,
    ):
        self.model, self.objective, self.config, self.seed = model, objective, config, seed
        self.optimizers, self.capture = optimizers, capture
        self._device = next(model.parameters()).device
        self._captured: dict[Hashable, Captured] = {}
        self._pool: Any = None
        self._newest: Captured | None = None
        self._rehearsing = torch.zeros((), device=self._device)
        self._bad = torch.zeros((), device=self._device)
        self._counts = torch.zeros(3, device=self._device)  # not finite: in all, in a row now, in a row at most
        for optimizer in optimizers:
            vars(optimizer)["found_inf"] = self._bad

    def __call__(self, step: int, rate: float) -> Outcome | None:
        set_rate(self.optimizers, rate)
        generator = generator_for(self.seed, step, drawing_device(self.objective, self.model))
        batch = self.objective.draw(step, generator)
        key = batch.variant, *(tensor.shape for tensor in batch.tensors.values())  # clips may have several sizes
        captured = self._captured.get(key)
        if captured is None:
            captured = self._captured[key] = self._prepared(batch)
        for name, tensor in batch.tensors.items():
            captured.tensors[name].copy_(tensor)
        seed_dropout(self.seed, step)
        captured.run()
        self._newest = captured
        return None

    def outcome(self) -> Outcome:
        """Of the newest step; waits for the device."""
        assert self._newest is not None
        loss, norm, *values = self._newest.results.tolist()
        skipped, now, most = (int(count) for count in self._counts.tolist())
        self._counts.copy_(self._counts.new_tensor([0.0, now, now]))
        return Outcome(loss, norm, dict(zip(self._newest.names, values, strict=True)), skipped, most)

    def give_up(self) -> None:
        """Leaves the optimisers as other steps want them."""
        for optimizer in self.optimizers:
            del vars(optimizer)["found_inf"]

    def _prepared(self, batch: Batch) -> Captured:
        try:
            return self._prepare(batch)
        except Exception as error:  # whatever a compiler, a library or the device has to say
            self._rehearsing.zero_()
            raise CaptureFailed(" ".join(str(error).split())[:200] or type(error).__name__) from error

    def _prepare(self, batch: Batch) -> Captured:
        tensors = {name: tensor.clone() for name, tensor in batch.tensors.items()}
        own = Batch(tensors, batch.variant)
        names: list[str] = []
        results: list[Tensor] = []

        def work() -> None:
            self.model.zero_grad(set_to_none=True)
            with torch.autocast(
                self._device.type,
                torch.bfloat16,
                enabled=self.config.precision == "bfloat16",
                cache_enabled=False,  # cast weights would be those of the capture for ever
            ):
                value, measured = self.objective.loss(self.model, own)
            value.backward()
            norms = [clip(group["params"], self.config.clip_norm) for group in groups(self.optimizers)]
            norm = torch.stack(norms).square().sum().sqrt()
            not_finite = 1 - (value.detach().isfinite() & norm.isfinite()).float()
            self._bad.copy_(torch.maximum(not_finite, self._rehearsing))
            for optimizer in self.optimizers:
                optimizer.step()
            self._count(not_finite * (1 - self._rehearsing))
            names[:] = measured
            now = torch.stack([value.detach().float(), norm.float(), *(m.detach().float() for m in measured.values())])
            if results:
                results[0].copy_(now)
            else:
                results.append(now)

        if not self.capture:
            self._rehearse(work, 1)
            return Captured(work, tensors, results[0], tuple(names))
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self._rehearse(work, WARM_UP)
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        self.model.zero_grad(set_to_none=True)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            work()
        # Graphs of all variants work in the same memory: what one of them leaves to be read lies outside.
        self._pool = graph.pool()
        return Captured(graph.replay, tensors, results[0], tuple(names))

    def _rehearse(self, work: Any, times: int) -> None:
        """Runs that change neither weights nor moments."""
        self._rehearsing.fill_(1.0)
        for _ in range(times):
            work()
        self._rehearsing.zero_()

    def _count(self, not_finite: Tensor) -> None:
        total, now, most = self._counts.unbind()
        now = (now + 1) * not_finite
        self._counts.copy_(torch.stack([total + not_finite, now, torch.maximum(most, now)]))


def why_eager(model: nn.Module, loss: Loss, config: TrainConfig) -> str | None:
    """Why a step cannot be one CUDA graph; None if it can."""
    if next(model.parameters()).device.type != "cuda":
        return "there is no CUDA device"
    if world() > 1:
        return "there are several processes"
    if config.checkpointing:
        return "activations are checkpointed"
    if config.accumulate > 1:
        return "gradients are accumulated"
    if not isinstance(loss, Objective):
        return "this loss waits for the device"
    return None


@contextlib.contextmanager
def prepared(velocities: Iterable[Velocity]) -> Iterator[None]:
    """Their blocks compiled and rotary embeddings computed once a size, for the time of the block."""
    undo = []
    limit = recompile_limit()
    set_recompile_limit(max(limit, RECOMPILE_LIMIT))
    try:
        for velocity in velocities:
            transformer, family = velocity.transformer, velocity.family
            for _, block in blocks_of(transformer, family):
                if "forward" in vars(block):  # hooked: those of a trunk are no one graph
                    continue
                before = compiled_call(block)
                block.compile(fullgraph=True, dynamic=False)
                undo.append(lambda block=block, before=before: set_compiled_call(block, before))
            if family.rotary:
                undo.append(_computed_once(transformer.get_submodule(family.rotary)))
        yield
    finally:
        for each in undo:
            each()
        set_recompile_limit(limit)


@contextlib.contextmanager
def eagerly() -> Iterator[None]:
    """Compiled blocks run as they are written, for the time of the block: other modes and sizes would compile anew."""
    with torch.compiler.set_stance("force_eager"):
        yield


def _computed_once(module: nn.Module):
    """Let a module whose output depends on the size of its input alone compute it once a size; returns what undoes."""
    stock, known = module.forward, {}

    def forward(hidden_states: Tensor) -> Any:
        key = (hidden_states.shape[1:], hidden_states.dtype, hidden_states.device)
        if key not in known:
            known[key] = stock(hidden_states)
        return known[key]

    module.forward = forward

    def undo() -> None:
        del module.forward

    return undo


def groups(optimizers: Iterable[torch.optim.Optimizer]) -> list[dict[str, Any]]:
    """All parameter groups."""
    return [group for optimizer in optimizers for group in optimizer.param_groups]


def set_rate(optimizers: Iterable[torch.optim.Optimizer], rate: float) -> None:
    """`rate` times each group's own, into its memory where a graph reads it there."""
    for group in groups(optimizers):
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(group["rate"] * rate)
        else:
            group["lr"] = group["rate"] * rate


def clip(parameters: Iterable[nn.Parameter], largest: float) -> Tensor:
    """Scales gradients down to the global norm `largest`; the norm they had, over all processes."""
    parameters = [p for p in parameters if p.grad is not None]
    norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    if isinstance(norm, DTensor):
        norm = norm.full_tensor()
    nn.utils.clip_grads_with_norm_(parameters, largest, norm)
    return norm


def seed_dropout(seed: int, index: int) -> None:
    """Dropout layers know the global generator only."""
    torch.manual_seed(generator_for(~seed, index).initial_seed())
