"""The training loop: AdamW or Muon, averaged weights, checkpoints that resume bit for bit, and a stop at ten bad steps.

Everything random in forward pass i is drawn from generators seeded by (seed, i). So there is no random state to save: a
run that is killed and started again draws the same batches, the same noise and the same dropout as one that was not.
And pass i is the same whether one process makes it or another: a step of W processes with k passes each is a step of
one process with W k passes.

    folder/checkpoints/step-00000200/   see checkpoints.py
    folder/metrics.jsonl                one line every `log_every` steps, see metrics.py
"""

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
from vidaccel.progress import Progress
from vidaccel.train.average import Average
from vidaccel.train.checkpoints import Checkpoints, Tensors, flat, unflat
from vidaccel.train.metrics import ByProducts, Metrics, check_trackers
from vidaccel.train.parallel import mean, on_first, rank, world

log = logging.getLogger(__name__)

MOST_BAD_STEPS = 10
MUON_RATE = 5.0
"""Muon's rate over AdamW's, both in AdamW's measure of an update's size (arXiv 2502.16982); sprites was trained so."""
WITHOUT_EFFECT = ("trackers", "sample_every")
"""Settings that may change between a run and its continuation."""

Loss = Callable[[nn.Module, int, torch.Generator], tuple[torch.Tensor, dict[str, float]]]
"""(model, index of this forward pass since the start, its generator) -> scalar loss, metrics to log: the same names in
every pass. The index counts the passes of all processes."""


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
    rates: Mapping[str, float] = MappingProxyType({}),
) -> nn.Module:
    """Trains the parameters of `model` that require gradients, from the newest checkpoint in `folder` if there is one.

    Returns `model` in evaluation mode, the averaged weights in it. Nothing else is averaged or saved: frozen parameters
    and buffers are the caller's to restore. Seeds torch's global generator at each forward pass.

    In many processes (parallel.py) `model` is sharded before, and each of them calls this with the same arguments.

    Args:
        settings: what else shapes the run, as JSON can hold it; a checkpoint of other settings is not continued.
        recorded: of the settings in a checkpoint: what they are called now, where an earlier version wrote it.
        evaluate: of the model with averaged weights, without gradients; lower is better. Called every `evaluate_every`
            steps, in every process, and averaged over them. The best checkpoint is kept.
        sample: called with the step every `sample_every` steps, in every process, while averaged weights are in place,
            after the checkpoint of that step. If it fails a warning says so, and training goes on.
        rates: learning rate over that of `config`, by the name of a submodule of `model`, whose gradients are then
            scaled down by their own norm: two parts that work against each other are trained as if apart.

    Raises:
        UserError: the checkpoints belong to other settings or another model, one of their files is damaged, a new one
            cannot be written, or the model has not what `config` asks for.
        TrainingFailed: `MOST_BAD_STEPS` steps in a row were not finite.
    """
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    _check(model, trained, config)
    optimizers = _optimizers(trained, config, rates)
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

    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    last_good, bad_in_a_row, by_products = state.step, 0, ByProducts()
    started = time.monotonic() - state.seconds
    with metrics, Progress(title, total=config.steps, done=state.step, shown=rank() == 0) as progress:
        for step in range(state.step, config.steps):
            for group in groups:
                group["lr"] = group["rate"] * learning_rate(config, step)
            value, measured = _accumulate(model, loss, config, step, seed)
            norm = math.hypot(*(_clip(group["params"], config.clip_norm) for group in groups))
            good = math.isfinite(value) and math.isfinite(norm)
            if good:
                for optimizer in optimizers:
                    optimizer.step()
                average.update(step - state.skipped)
                bad_in_a_row = 0
            else:
                state.skipped, bad_in_a_row = state.skipped + 1, bad_in_a_row + 1
                _skip(title, step, value, norm, bad_in_a_row, folder)
            model.zero_grad()

            state.step, state.seconds = step + 1, time.monotonic() - started
            due = partial(_due, since=last_good, done=state.step, end=config.steps)
            line = {"step": state.step, "loss": value, "grad_norm": norm, "lr": learning_rate(config, step), **measured}
            if good and evaluate and due(config.evaluate_every):
                with average.in_place():
                    line["evaluation"] = mean([evaluate(model)])[0]
                if line["evaluation"] < state.best:
                    state.best, state.best_step = line["evaluation"], state.step
            line |= {"skipped": state.skipped, "seconds": round(state.seconds, 1)}
            with checkpoints.last_good_named():
                if "evaluation" in line or state.step % config.log_every == 0 or state.step == config.steps:
                    on_first(partial(metrics.write, line))
                if good and (due(config.save_every) or state.best_step == state.step):
                    checkpoints.save(state)
            if good and sample and config.sample_every and due(config.sample_every):
                with average.in_place():
                    by_products.make(lambda: sample(state.step), f"the samples of step {state.step}")
            if good:
                last_good = state.step
            progress.advance(loss=value)
    average.exchange()
    return model.eval()


def learning_rate(config: TrainConfig, step: int) -> float:
    """Rate of optimiser step `step` (from 0): linear warm-up, then constant or half a cosine down to zero."""
    if step < config.warmup:
        return config.learning_rate * (step + 1) / config.warmup
    if config.schedule == "constant":
        return config.learning_rate
    progress = (step - config.warmup) / max(1, config.steps - config.warmup)
    return config.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))


def generator_for(seed: int, index: int) -> torch.Generator:
    """The CPU generator of forward pass `index`: a function of (seed, index) and nothing else."""
    return torch.Generator().manual_seed((seed * 0x9E3779B97F4A7C15 + index * 0xD1B54A32D192ED03) % 2**63)


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
    trained: dict[str, nn.Parameter], config: TrainConfig, rates: Mapping[str, float]
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

    common = {"lr": config.learning_rate, "weight_decay": config.weight_decay}
    optimizers: list[torch.optim.Optimizer] = []
    if adamw:
        optimizers.append(torch.optim.AdamW(groups(adamw, 1.0), betas=(0.9, 0.99), **common))
        for p in chain(*adamw.values()):
            moments = {name: torch.zeros_like(p) for name in ("exp_avg", "exp_avg_sq")}
            optimizers[-1].state[p] = {"step": torch.zeros(()), **moments}
    if muon:
        optimizers.append(torch.optim.Muon(groups(muon, MUON_RATE), adjust_lr_fn="match_rms_adamw", **common))
        for p in chain(*muon.values()):
            optimizers[-1].state[p] = {"momentum_buffer": torch.zeros_like(p)}
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
    """The identity in a checkpoint, with its settings by the names that they have now."""
    nested = unflat(identity)
    return flat(nested | {"settings": recorded(nested.get("settings", {}))})


def _accumulate(
    model: nn.Module, loss: Loss, config: TrainConfig, step: int, seed: int
) -> tuple[float, dict[str, float]]:
    """Gradients of `accumulate` forward passes, averaged; their loss and metrics, averaged over all processes."""
    device = next(model.parameters()).device.type
    passes = []
    for part in range(config.accumulate):
        index = (step * config.accumulate + part) * world() + rank()
        torch.manual_seed(generator_for(~seed, index).initial_seed())  # dropout layers know the global generator only
        with torch.autocast(device, torch.bfloat16, enabled=config.precision == "bfloat16"):
            value, measured = loss(model, index, generator_for(seed, index))
        (value / config.accumulate).backward()
        passes.append([float(value.detach()), *measured.values()])
    value, *values = mean([sum(column) / config.accumulate for column in zip(*passes, strict=True)])
    return value, dict(zip(measured, values, strict=True))


def _clip(parameters: Iterable[nn.Parameter], largest: float) -> float:
    """Scales gradients down to the global norm `largest`; the norm they had, over all processes."""
    parameters = [p for p in parameters if p.grad is not None]
    norm = nn.utils.get_total_norm([p.grad for p in parameters])
    if isinstance(norm, DTensor):
        norm = norm.full_tensor()
    nn.utils.clip_grads_with_norm_(parameters, largest, norm)
    return float(norm)


def _skip(title: str, step: int, value: float, norm: float, bad_in_a_row: int, folder: Path) -> None:
    if rank() == 0:
        log.warning("step %d skipped: loss %s, gradient norm %s", step, value, norm)
    if bad_in_a_row == MOST_BAD_STEPS:
        raise TrainingFailed(
            f"{title}: {MOST_BAD_STEPS} steps in a row without a finite loss or gradient, at step {step}; "
            f"the last good checkpoint is kept in {folder / CHECKPOINTS}"
        )


def _due(every: int, since: int, done: int, end: int) -> bool:
    """Whether something that happens every so many steps is to happen now, it having been possible at `since` last."""
    return done // every > since // every or done == end
