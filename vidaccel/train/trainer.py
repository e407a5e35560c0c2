"""The training loop: AdamW or Muon, averaged weights, checkpoints that resume bit for bit, and a stop at ten bad steps.

Everything random in forward pass i is drawn from generators seeded by (seed, i). So there is no random state to save: a
run that is killed and started again draws the same batches, the same noise and the same dropout as one that was not.
And pass i is the same whether one process makes it or another: a step of W processes with k passes each is a step of
one process with W k passes.

    folder/checkpoints/step-00000200/   see checkpoints.py
    folder/metrics.jsonl                one line every `log_every` steps, see metrics.py
"""

import contextlib
import logging
import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from functools import partial
from itertools import chain
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from torch.distributed.tensor import DTensor

from vidaccel.artefacts import CHECKPOINTS
from vidaccel.compat.diffusers import can_checkpoint
from vidaccel.config.training import TrainConfig
from vidaccel.errors import TrainingFailed, UserError
from vidaccel.processes import by_all, on_first, rank, world
from vidaccel.progress import Progress
from vidaccel.train.average import Average
from vidaccel.train.checkpoints import Checkpoints, State, Tensors, flat, unflat
from vidaccel.train.curves import FILE as CURVES
from vidaccel.train.curves import draw_curves
from vidaccel.train.metrics import FILE as METRICS
from vidaccel.train.metrics import ByProducts, Metrics, check_trackers
from vidaccel.train.muon import StackedMuon
from vidaccel.train.objective import Loss, Objective
from vidaccel.train.parallel import mean
from vidaccel.train.step import CaptureFailed, EagerStep, GraphStep, Outcome, autocast, eagerly, prepared, why_eager
from vidaccel.train.stopping import stoppable

log = logging.getLogger(__name__)

MOST_BAD_STEPS = 10
MUON_RATE = 5.0
"""Muon's rate over AdamW's, both in AdamW's measure of an update's size (arXiv 2502.16982); sprites was trained so."""
WITHOUT_EFFECT = ("trackers", "sample_every", "gates_every", "graph", "minutes")
"""Settings that may change between a run and its continuation; one of minutes is repeated by its steps."""


def train(
    model: nn.Module,
    loss: Loss,
    config: TrainConfig,
    folder: Path,
    *,
    seed: int,
    title: str,
    settings: Mapping[str, Any],
    recorded: Callable[[Mapping[str, Any]], Mapping[str, Any]] = dict,
    evaluate: Callable[[nn.Module], float] | None = None,
    sample: Callable[[int], None] | None = None,
    measure: Callable[[], Mapping[str, float]] | None = None,
    rates: Mapping[str, float] = MappingProxyType({}),
) -> nn.Module:
    """Trains the parameters of `model` that require gradients, from the newest checkpoint in `folder` if there is one.

    Returns `model` in evaluation mode, the averaged weights in it. Nothing else is averaged or saved: frozen parameters
    and buffers are the caller's to restore. Seeds torch's global generator at each forward pass.

    In many processes (parallel.py) `model` is sharded before, and each of them calls this with the same arguments.

    Args:
        settings: what else shapes the run, as JSON can hold it; a checkpoint of other settings is not continued.
        recorded: of the settings in a checkpoint: what they are called now, where an earlier version wrote it.
        evaluate: of the model with averaged weights, without gradients, in the training's precision; lower is better.
            Called every `evaluate_every` steps, in every process, and averaged over them. The best checkpoint is kept.
        sample: called with the step every `sample_every` steps, in every process, while averaged weights are in place,
            after the checkpoint of that step. If it fails a warning says so, and training goes on, unless it failed in
            one process where the others wait for that one.
        measure: called every `gates_every` steps, in every process, while averaged weights are in place; what it gives
            stands in the line of that step, and as curves in `gates.png`. If it fails, as `sample`.
        rates: learning rate over that of `config`, by the name of a submodule of `model`, whose gradients are then
            scaled down by their own norm: two parts that work against each other are trained as if apart.

    Raises:
        KeyboardInterrupt: it was asked to stop (stopping.py), and every step that was made is saved.
        UserError: the checkpoints belong to other settings or another model, one of their files is damaged, a new one
            cannot be written, or the model or the caller has not what `config` asks for.
        TrainingFailed: `MOST_BAD_STEPS` steps in a row were not finite.
        FailedAlone: `sample` or `measure` failed here, where another process waits for this one.
    """
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    device = next(model.parameters()).device
    _check(model, trained, config)
    if config.gates_every and measure is None:
        raise UserError(
            f"gates_every={config.gates_every}, and nothing is measured on the way of this training",
            "leave it out; a student's gates are taken on clips that are kept out of it: gate_samples=64",
        )
    graph = _is_graph(model, loss, config, title)
    optimizers = _optimizers(trained, config, rates, graph)
    average = Average(model, trained.values(), config.ema_decay)
    identity = _identity(seed, config, settings)
    tensors = _tensors(model, average, optimizers)
    checkpoints = Checkpoints(folder, identity, tensors, partial(_current, recorded))
    state = checkpoints.resume()
    metrics = Metrics(folder)
    on_first(lambda: metrics.start(state.step, config.trackers, identity))
    for module in _recomputing(model) if config.checkpointing else ():
        module.enable_gradient_checkpointing()
    model.train()

    make_step: EagerStep | GraphStep = EagerStep(model, loss, config, optimizers, seed)
    course, last_good, by_products, outcome = Course(config, state), state.step, ByProducts(), None
    progress = Progress(title, total=config.steps, done=state.step)
    with stoppable() as stop, metrics, progress, contextlib.ExitStack() as preparations:
        if graph and isinstance(loss, Objective):
            preparations.enter_context(prepared(loss.velocities))
            make_step = GraphStep(model, loss, config, optimizers, seed)
        while not course.over(state.step):
            if stop.asked and state.step != checkpoints.saved:
                state.skipped += make_step.outcome().skipped if outcome is None else 0
                with checkpoints.last_good_named():
                    checkpoints.save(state)
            if stop.asked:
                break
            step, rate = state.step, learning_rate(config, state.step, course.share(state.step))
            try:
                outcome = make_step(step, rate)
            except CaptureFailed as failure:
                if config.graph == "on":
                    raise UserError(f"graph=on, and a step is no CUDA graph: {failure}", "set graph=auto") from failure
                log.warning("%s: steps run eagerly, because capturing one failed: %s", title, failure)
                preparations.close()
                make_step.give_up()
                make_step = EagerStep(model, loss, config, optimizers, seed)
                outcome = make_step(step, rate)
            if step == course.first:
                course.begin()
            if outcome is None or outcome.good:
                average.update(step - state.skipped)
            state.step, state.seconds, state.share = step + 1, course.seconds(), course.share(step + 1)
            last = course.over(state.step)
            due = partial(_due, since=last_good, done=state.step, last=last)
            logged = state.step % config.log_every == 0 or last
            if outcome is None:
                others = config.evaluate_every, config.save_every, config.sample_every, config.gates_every
                if not logged and not any(map(due, others)):
                    progress.advance()
                    continue
                outcome = make_step.outcome()
            state.skipped += outcome.skipped
            if outcome.skipped:
                _skip(title, step, outcome, folder)
            value, norm, good = outcome.loss, outcome.norm, outcome.good
            line = {"step": state.step, "loss": value, "grad_norm": norm, "lr": rate, **outcome.measured}
            if good and evaluate and due(config.evaluate_every):
                with average.in_place(), eagerly(), autocast(config, device):
                    line["evaluation"] = mean([evaluate(model)])[0]
                if line["evaluation"] < state.best:
                    state.best, state.best_step = line["evaluation"], state.step
            found: dict[str, float] = {}
            if good and measure and due(config.gates_every):
                looked = partial(_into, found, partial(by_all, measure))
                with average.in_place(), eagerly(), autocast(config, device):
                    by_products.make(looked, f"the look at step {state.step}")
                line |= found
            line |= {"skipped": state.skipped, "seconds": round(state.seconds, 1)}
            with checkpoints.last_good_named():
                if "evaluation" in line or logged or found:
                    on_first(partial(metrics.write, line))
                if good and (due(config.save_every) or state.best_step == state.step):
                    checkpoints.save(state)
            if found:
                drawn = partial(draw_curves, folder / METRICS, list(found), folder / CURVES)
                by_products.make(partial(on_first, drawn), f"the curves of step {state.step}")
            if good and sample and due(config.sample_every):
                with average.in_place(), eagerly(), autocast(config, device):
                    sheet = partial(by_all, partial(sample, state.step))
                    by_products.make(sheet, f"the samples of step {state.step}")
            if good:
                last_good = state.step
            progress.advance(loss=value)
    average.exchange()
    return model.eval()


class Course:
    """How far a training is, by its steps or by its minutes; the same in all processes."""

    def __init__(self, config: TrainConfig, state: State):
        self.first = state.step
        """The first step of this process."""
        self._steps, self._limit, self._share = config.steps, 60 * (config.minutes or math.inf), state.share
        self._started = time.monotonic() - state.seconds
        self._begun = state.seconds

    def seconds(self) -> float:
        """Those of the whole training, in all processes that made it one after the other."""
        return time.monotonic() - self._started

    def begin(self) -> None:
        """The first step is made: what came before was preparation."""
        self._begun = self._now()

    def share(self, step: int) -> float:
        """Of the training, in [0, 1], that has passed before `step` (from 0). Of minutes: what this process has left is
        shared by its steps, whatever preparing them took."""
        if self._steps is not None:
            return step / max(1, self._steps)
        passed = (self._now() - self._begun) / max(1e-9, self._limit - self._begun) if step > self.first else 0.0
        return min(1.0, self._share + (1 - self._share) * passed)

    def over(self, step: int) -> bool:
        """Whether `step` (from 0) is not made any more. One is made in any case."""
        if self._steps is not None:
            return step >= self._steps
        return (step > self.first or self.first > 0) and self._now() >= self._limit

    def _now(self) -> float:
        return mean([self.seconds()])[0]


def learning_rate(config: TrainConfig, step: int, share: float = 0.0) -> float:
    """Rate of optimiser step `step` (from 0): linear warm-up, then constant or half a cosine down to zero, over the
    steps or, in a training of minutes, over the `share` of the time that has passed."""
    if step < config.warmup:
        return config.learning_rate * (step + 1) / config.warmup
    if config.schedule == "constant":
        return config.learning_rate
    if config.steps is None:
        return config.learning_rate * 0.5 * (1 + math.cos(math.pi * share))
    progress = (step - config.warmup) / max(1, config.steps - config.warmup)
    return config.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))


def _is_graph(model: nn.Module, loss: Loss, config: TrainConfig, title: str) -> bool:
    """Whether a step is to be one CUDA graph; says so where there is a CUDA device."""
    reason = "graph=off" if config.graph == "off" else why_eager(model, loss, config)
    if reason and config.graph == "on":
        raise UserError(f"graph=on, and {reason}", "set graph=auto, which takes what there is")
    if next(model.parameters()).device.type == "cuda":
        log.info("%s: %s", title, f"steps run eagerly: {reason}" if reason else "each step is one CUDA graph")
    return reason is None


def _check(model: nn.Module, trained: dict[str, nn.Parameter], config: TrainConfig) -> None:
    if not trained:
        raise ValueError("no parameter of the model requires a gradient")
    if low := [name for name, p in trained.items() if p.dtype.itemsize < 4]:
        raise ValueError(
            f"{low[0]} is {trained[low[0]].dtype}: what is trained has to be float32, or steps vanish in it"
        )
    if config.optimizer == "muon" and not hasattr(torch.optim, "Muon"):
        raise UserError(
            f"the optimizer muon needs PyTorch 2.9, this is {torch.__version__}",
            "take adamw as the training's optimizer",
        )
    if world() > 1 and not all(isinstance(p, DTensor) for p in trained.values()):
        raise ValueError("there are several processes and whole parameters: shard(model, blocks) comes first")
    if config.lora_rank and not any("lora_" in name for name in trained):
        raise UserError(
            f"a lora_rank of {config.lora_rank}, but this training has no adapters", "set its lora_rank to 0"
        )
    if config.checkpointing and not _recomputing(model):
        raise UserError(f"{type(model).__name__} cannot compute activations again", "set its checkpointing to false")
    check_trackers(config.trackers)


def _recomputing(model: nn.Module) -> list[nn.Module]:
    """The parts of the model whose diffusers class has activation checkpointing."""
    return [module for module in model.modules() if can_checkpoint(module)]


def _optimizers(
    trained: dict[str, nn.Parameter], config: TrainConfig, rates: Mapping[str, float], graph: bool
) -> list[torch.optim.Optimizer]:
    """AdamW, and Muon for the matrices of the blocks if it is asked for, which gathers each one that is sharded.

    A group for each of `rates` that has parameters, and one for all others. Moments are made at once, not at the first
    step: a checkpoint is loaded into tensors that exist.
    """
    adamw: dict[str, list[nn.Parameter]] = {}
    muon: dict[str, list[nn.Parameter]] = {}
    for name, p in trained.items():
        words = name.split(".")
        part, in_block = words[0], any(map(str.isdigit, words))  # a module list names its members by their numbers
        chosen = muon if config.optimizer == "muon" and p.ndim == 2 and in_block else adamw
        chosen.setdefault(part if part in rates else "", []).append(p)

    def groups(parts: dict[str, list[nn.Parameter]], times: float) -> list[dict[str, Any]]:
        return [{"params": every, "rate": times * rates.get(part, 1.0)} for part, every in parts.items()]

    device = next(iter(trained.values())).device

    def rate() -> float | torch.Tensor:
        """A number; where a graph is to be told another one, in memory."""
        return torch.tensor(config.learning_rate, device=device) if graph else config.learning_rate

    common = {"lr": config.learning_rate, "weight_decay": config.weight_decay}
    optimizers: list[torch.optim.Optimizer] = []
    if adamw:
        fused = {"fused": True, "capturable": device.type == "cuda"} if graph else {}
        optimizers.append(torch.optim.AdamW(groups(adamw, 1.0), betas=(0.9, 0.99), **common, **fused))
        for p in chain(*adamw.values()):
            moments = {name: torch.zeros_like(p) for name in ("exp_avg", "exp_avg_sq")}
            counted = torch.zeros((), device=device) if graph else torch.zeros(())
            optimizers[-1].state[p] = {"step": counted, **moments}
    if muon and graph:
        optimizers.append(StackedMuon(groups(muon, MUON_RATE), **common))
    elif muon:
        optimizers.append(torch.optim.Muon(groups(muon, MUON_RATE), adjust_lr_fn="match_rms_adamw", **common))
        for p in chain(*muon.values()):
            optimizers[-1].state[p] = {"momentum_buffer": torch.zeros_like(p)}
    for group in (group for optimizer in optimizers for group in optimizer.param_groups):
        group["lr"] = rate()
    return optimizers


def _tensors(model: nn.Module, average: Average, optimizers: Iterable[torch.optim.Optimizer]) -> Tensors:
    """All that changes in training, by the names of the files it is kept in.

    Of an optimizer that is its states alone: torch's safetensors writer makes files of groups that cannot be read, and
    the settings in state.json make the same groups again.
    """
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    states = get_optimizer_state_dict(model, optimizers)["state"]
    return {
        "model": {name: p.detach() for name, p in trained.items()},
        "ema": dict(zip(trained, average.tensors, strict=True)),
        "optimizer": {f"{name}.{key}": t for name in trained for key, t in states[name].items()},
    }


def _identity(seed: int, config: TrainConfig, settings: Mapping[str, Any]) -> dict[str, Any]:
    """All settings that shape a run, under flat names."""
    shaping = {key: value for key, value in asdict(config).items() if key not in WITHOUT_EFFECT}
    return flat({"seed": seed, "processes": world(), **shaping, "settings": settings})


def _current(recorded: Callable[[Mapping[str, Any]], Mapping[str, Any]], identity: Mapping[str, Any]) -> dict[str, Any]:
    """The identity in a checkpoint, with its settings by the names that they have now, and without those that have no
    effect, some of which earlier versions recorded."""
    nested = {key: value for key, value in unflat(identity).items() if key not in WITHOUT_EFFECT}
    return flat(nested | {"settings": recorded(nested.get("settings", {}))})


def _skip(title: str, step: int, outcome: Outcome, folder: Path) -> None:
    if rank() == 0:
        which = f"step {step}" if outcome.skipped == 1 and not outcome.good else f"{outcome.skipped} steps to {step}"
        log.warning("%s skipped: loss %s, gradient norm %s", which, outcome.loss, outcome.norm)
    if outcome.bad_in_a_row >= MOST_BAD_STEPS:
        raise TrainingFailed(
            f"{title}: {MOST_BAD_STEPS} steps in a row without a finite loss or gradient, at step {step}; "
            f"the last good checkpoint is kept in {folder / CHECKPOINTS}"
        )


def _into(found: dict[str, float], measure: Callable[[], Mapping[str, float]]) -> None:
    found |= measure()


def _due(every: int, since: int, done: int, last: bool) -> bool:
    """Whether something that happens every so many steps, or never (0), is to happen now, it having been possible at
    `since` last."""
    return bool(every) and (done // every > since // every or last)
