"""The training loop: AdamW, averaged weights, checkpoints that resume bit for bit, and a stop at ten bad steps.

Everything random in step n is drawn from generators seeded by (seed, n). So there is no random state to save: a run
that is killed and started again draws the same batches, the same noise and the same dropout as one that was not.

    folder/checkpoints/step-00000200/   model.safetensors, ema.safetensors, optimizer.safetensors, state.json
    folder/metrics.jsonl                one line every `log_every` steps

A checkpoint is written under another name and renamed, so that a folder called step-* is whole.
"""

import contextlib
import json
import logging
import math
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, load_model, save_file, save_model
from torch import nn
from torch.optim.swa_utils import AveragedModel

from vidaccel.artefacts import CHECKPOINTS, atomic_folder, atomic_path, explained
from vidaccel.config import TrainConfig
from vidaccel.errors import TrainingFailed, UserError
from vidaccel.progress import Progress

log = logging.getLogger(__name__)

METRICS = "metrics.jsonl"
MOST_BAD_STEPS = 10
KEPT_CHECKPOINTS = 2

Loss = Callable[[nn.Module, int, torch.Generator], tuple[torch.Tensor, dict[str, float]]]
"""(model, index of this forward pass since the start, its generator) -> scalar loss, metrics to log."""


def train(
    model: nn.Module,
    loss: Loss,
    config: TrainConfig,
    folder: Path,
    *,
    seed: int,
    title: str,
    settings: Mapping[str, Any],
    evaluate: Callable[[nn.Module], float] | None = None,
    sample: Callable[[int], None] | None = None,
) -> nn.Module:
    """Trains `model` in place, from the newest checkpoint in `folder` if there is one.

    Returns the averaged copy of the model, in evaluation mode. Seeds torch's global generator at each forward pass.

    Args:
        settings: what else shapes the run, as JSON can hold it; a checkpoint of other settings is not continued.

    Raises:
        UserError: the checkpoints belong to other settings or another model, one of their files is damaged, or a new
            one cannot be written.
        TrainingFailed: `MOST_BAD_STEPS` steps in a row were not finite.
    """
    if evaluate or sample:
        raise NotImplementedError("evaluate and sample come with the next change")
    device = next(model.parameters()).device
    average = AveragedModel(model, multi_avg_fn=_ema(config.ema_decay))
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=config.learning_rate, weight_decay=config.weight_decay, betas=(0.9, 0.99))
    identity = {"seed": seed, "config": asdict(config), "settings": json.loads(json.dumps(settings))}
    state = _resume(folder, identity, model, average, optimizer)
    model.train()
    saved, skipped, bad_in_a_row, seconds = state["step"], state["skipped"], 0, state["seconds"]
    started = time.monotonic()
    with Progress(title, total=config.steps, done=state["step"]) as progress:
        for step in range(state["step"], config.steps):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(config, step)
            value, metrics = _accumulate(model, loss, config, step, seed, device)
            norm = nn.utils.clip_grad_norm_(trained, config.clip_norm)
            if math.isfinite(value) and bool(torch.isfinite(norm)):
                optimizer.step()
                average.update_parameters(model)
                bad_in_a_row = 0
            else:
                skipped, bad_in_a_row = skipped + 1, bad_in_a_row + 1
                log.warning("step %d skipped: loss %s, gradient norm %s", step, value, float(norm))
                if bad_in_a_row == MOST_BAD_STEPS:
                    raise TrainingFailed(
                        f"{title}: {MOST_BAD_STEPS} steps in a row without a finite loss or gradient, at step {step}; "
                        f"the last good checkpoint is kept in {folder / CHECKPOINTS}"
                    )
            optimizer.zero_grad(set_to_none=True)
            done = step + 1
            elapsed = seconds + time.monotonic() - started
            with _last_good_named(saved):
                if done % config.log_every == 0 or done == config.steps:
                    line = {"step": done, "loss": value, "grad_norm": float(norm), "lr": learning_rate(config, step)}
                    line |= metrics | {"skipped": skipped, "seconds": round(elapsed, 1)}
                    _append(folder / METRICS, line)
                due = done == config.steps or done // config.save_every > saved // config.save_every
                if due and bad_in_a_row == 0:
                    state = {"step": done, "skipped": skipped, "seconds": elapsed, **identity}
                    _save(folder, state, model, average, optimizer)
                    saved = done
            progress.advance(loss=value)
    return average.module.eval()


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


def _accumulate(model, loss: Loss, config: TrainConfig, step: int, seed: int, device) -> tuple[float, dict[str, float]]:
    """Gradients of `accumulate` forward passes, averaged; the mean loss and the last pass's metrics."""
    total = 0.0
    for part in range(config.accumulate):
        index = step * config.accumulate + part
        torch.manual_seed(generator_for(~seed, index).initial_seed())  # dropout layers know the global generator only
        with torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bfloat16"):
            value, metrics = loss(model, index, generator_for(seed, index))
        (value / config.accumulate).backward()
        total += float(value.detach()) / config.accumulate
    return total, metrics


def _ema(decay: float):
    """Averaging with the decay ramped up over the first steps, so that the initial weights are soon forgotten."""

    @torch.no_grad()
    def update(averaged, current, num_averaged):
        n = float(num_averaged)
        torch._foreach_lerp_(list(averaged), list(current), 1 - min(decay, (1 + n) / (10 + n)))

    return update


def _append(path: Path, line: dict[str, float]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    finite = {key: value if math.isfinite(value) else None for key, value in line.items()}  # JSON knows no NaN
    with explained(path), path.open("a") as file:
        file.write(json.dumps(finite) + "\n")


def _save(folder: Path, state: dict, model, average, optimizer) -> None:
    checkpoints = folder / CHECKPOINTS
    with atomic_folder(checkpoints / f"step-{state['step']:08d}") as target:
        save_model(model, target / "model.safetensors")
        save_model(average, target / "ema.safetensors")
        moments, groups = _flatten(optimizer.state_dict())
        save_file(moments, target / "optimizer.safetensors")
        (target / "state.json").write_text(json.dumps(state | {"groups": groups}))
    for old in sorted(checkpoints.glob("step-*"))[:-KEPT_CHECKPOINTS]:
        shutil.rmtree(old)


@contextlib.contextmanager
def _last_good_named(saved: int) -> Iterator[None]:
    """Adds to a failure to write that everything up to step `saved` is still there."""
    try:
        yield
    except UserError as error:
        kept = f"the checkpoint of step {saved} is kept" if saved else "there is no checkpoint yet"
        hint = f"{error.hint}; the same command then goes on from there"
        raise UserError(f"{error.message}; {kept}", hint) from error


def _resume(folder: Path, identity: dict, model, average, optimizer) -> dict:
    """Loads the newest checkpoint and drops what a killed run left beyond it; the state to go on from."""
    checkpoints = sorted((folder / CHECKPOINTS).glob("step-*"))
    state = {"step": 0, "skipped": 0, "seconds": 0.0}
    if checkpoints:
        state = _load(checkpoints[-1], identity, model, average, optimizer)
    for unfinished in (folder / CHECKPOINTS).glob(".step-*"):
        shutil.rmtree(unfinished)
    _cut_metrics(folder / METRICS, state["step"])
    return state


def _load(checkpoint: Path, identity: dict, model, average, optimizer) -> dict:
    with _readable(checkpoint / "state.json") as path:
        state = json.loads(path.read_text())
        old, new = ({"seed": which["seed"], **which["config"], **which["settings"]} for which in (state, identity))
    if differing := _differences(old, new):
        raise UserError(
            f"{checkpoint} is of a run with other settings ({'; '.join(differing)})",
            "give the same settings to continue it, or another folder to start afresh",
        )
    with _readable(checkpoint / "model.safetensors") as path:
        load_model(model, path)
    with _readable(checkpoint / "ema.safetensors") as path:
        load_model(average, path)
    with _readable(checkpoint / "optimizer.safetensors") as path:
        optimizer.load_state_dict(_unflatten(load_file(path), state["groups"]))
    return state


@contextlib.contextmanager
def _readable(path: Path) -> Iterator[Path]:
    """Yields `path` to be loaded. One that is missing, damaged or does not fit stops the run: going back to an older
    checkpoint, or on with half of this one, is for the user to decide."""
    try:
        yield path
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise UserError(
            f"cannot continue from {path}: {' '.join(str(error).split())}",
            f"if the model is still the same, remove {path.parent} to go on from the checkpoint before it; "
            "give another folder to start afresh",
        ) from error


def _differences(old: dict, new: dict) -> list[str]:
    changed = [key for key in sorted(old | new) if old.get(key) != new.get(key)]
    return [f"{key} was {old.get(key)!r}, now {new.get(key)!r}" for key in changed]


def _cut_metrics(path: Path, step: int) -> None:
    """Drops the lines of steps that the checkpoint does not hold, which are about to be run again."""
    if path.exists():
        lines = path.read_text().splitlines()
        kept = [line for line in lines if line.endswith("}") and json.loads(line)["step"] <= step]
        with atomic_path(path) as temporary:
            temporary.write_text("".join(line + "\n" for line in kept))


def _flatten(state: dict) -> tuple[dict[str, torch.Tensor], list[dict]]:
    """An optimiser's state as named tensors ("3.exp_avg") and its parameter groups, which hold no tensor."""
    moments = {f"{i}.{name}": t.contiguous() for i, s in state["state"].items() for name, t in s.items()}
    return moments, state["param_groups"]


def _unflatten(moments: dict[str, torch.Tensor], groups: list[dict]) -> dict:
    state: dict[int, dict[str, torch.Tensor]] = {}
    for key, tensor in moments.items():
        index, name = key.split(".")
        state.setdefault(int(index), {})[name] = tensor.clone()  # lets go of the file, which safetensors maps
    return {"state": state, "param_groups": groups}
