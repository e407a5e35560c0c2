"""What a training step costs, in time and in memory, against a plain forward-backward pass of the same student.

plain               flow matching: one forward and one backward pass
rollout             a student's step towards the measured mean velocity
finite_difference   towards the MeanFlow identity, its derivative by a difference
exact               the same by forward-mode differentiation

Steps are optimiser steps as `vidaccel distill` makes them, without its averages and checkpoints.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn

from vidaccel.bench.measures.peak_memory import PeakMemory
from vidaccel.collect.encode import encode_texts
from vidaccel.config.distill import DistillConfig
from vidaccel.models.grid import fixed_shift
from vidaccel.models.live_bytes import weight_bytes
from vidaccel.models.loading import load_pipeline
from vidaccel.models.velocity import velocity_of
from vidaccel.numbers import quartiles
from vidaccel.train.clips import open_data
from vidaccel.train.distill import student_of
from vidaccel.train.flow_matching import flow_matching_loss
from vidaccel.train.methods import method_of
from vidaccel.train.methods.base import Distillation
from vidaccel.train.objective import Loss, generator_for

PLAIN = "plain"
TARGETS = {
    "rollout": {"target": "rollout"},
    "finite_difference": {"target": "derivative", "derivative": "finite_difference"},
    "exact": {"target": "derivative", "derivative": "exact"},
}
IN_MEMORY = (PLAIN, "exact")
WARM_UP = 2


def cost(config: DistillConfig, repeats: int) -> dict[str, Any]:
    """Seconds and their ratio to a plain pass for each target; peak memory of the exact derivative and of a plain step.

    Targets are timed in turn, so that a machine that slows down does so for all; a ratio is one of neighbours.
    """
    task = task_of(config)
    step = Step(task)
    calls = {PLAIN: partial(step.passes, loss_of(task, PLAIN))}
    calls |= {target: partial(step, loss_of(task, target)) for target in TARGETS}
    rounds = interleaved(calls, repeats)
    ratios = {name: [a / b for a, b in zip(rounds[name], rounds[PLAIN], strict=True)] for name in TARGETS}
    memory = {mode: peak(config, mode) for mode in IN_MEMORY}
    return {
        "batch_size": config.train.batch_size,
        "seconds": {name: quartiles(seconds) for name, seconds in rounds.items()},
        "ratio_to_plain": {name: quartiles(ratio) for name, ratio in ratios.items()},
        "memory_bytes": memory,
    }


def interleaved(calls: dict[str, Callable[[int], None]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each call in each of `repeats` rounds, after rounds that warm up."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for index in range(WARM_UP + repeats):
        for name, call in calls.items():
            started = time.perf_counter()
            call(index)
            seconds[name].append(time.perf_counter() - started)
    return {name: each[WARM_UP:] for name, each in seconds.items()}


def median_step_seconds(config: DistillConfig, repeats: int = 5) -> float:
    """Of a training with these settings."""
    task = task_of(config)
    step = partial(Step(task), method_of(config.method).loss(task))
    return statistics.median(interleaved({"": step}, repeats)[""])


class Step:
    """Optimiser steps of one student."""

    def __init__(self, task: Distillation):
        self.config, self.student = task.config, task.student
        self._optimizer = torch.optim.AdamW(self.student.parameters(), lr=self.config.train.learning_rate)

    def __call__(self, loss: Loss, index: int) -> None:
        """Step `index` from the start."""
        for part in range(self.config.train.accumulate):
            self._backward(loss, index * self.config.train.accumulate + part)
        nn.utils.clip_grad_norm_(self.student.parameters(), self.config.train.clip_norm)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)

    def passes(self, loss: Loss, index: int) -> None:
        """The passes of step `index` alone."""
        for part in range(self.config.train.accumulate):
            self._backward(loss, index * self.config.train.accumulate + part)
        self._optimizer.zero_grad(set_to_none=True)

    def _backward(self, loss: Loss, index: int) -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=self.config.train.precision == "bfloat16"):
            value, _ = loss(self.student, index, generator_for(self.config.seed, index))
        value.backward()


def task_of(config: DistillConfig) -> Distillation:
    """Teacher, student and data as `vidaccel distill` would train with."""
    loaded = load_pipeline(config.teacher, dtype="float32")
    data, _ = open_data(loaded, config)
    torch.manual_seed(config.seed)
    return Distillation(
        config,
        teacher=velocity_of(loaded).requires_grad_(False).eval(),
        student=velocity_of(student_of(loaded, config)).requires_grad_(True),
        data=data,
        empty=encode_texts(loaded, [""]),
        shift=config.shift or fixed_shift(loaded.pipe.scheduler, loaded.family),
    )


def loss_of(task: Distillation, mode: str) -> Loss:
    """The loss of one of TARGETS, or PLAIN."""
    if mode == PLAIN:
        return partial(_flow_matching, task)
    own = replace(task.config.mean_velocity, **TARGETS[mode])
    config = replace(task.config, method="mean_velocity", mean_velocity=own)
    return method_of("mean_velocity").loss(replace(task, config=config))


def _flow_matching(task: Distillation, model: nn.Module, index: int, generator: torch.Generator):
    x_0, _, _, g, text = task.draw(index, generator)
    scale = g if model.embeds("g") else None
    return flow_matching_loss(lambda x, t: model(x, t, text, g=scale), x_0, task.shift, generator), {}


def peak(config: DistillConfig, mode: str) -> dict[str, int]:
    """Bytes of the weights of teacher and student, and of all tensors at most during the first two training steps.

    The second step has AdamW's moments in memory as well.
    """
    task = task_of(config)
    step, loss = Step(task), loss_of(task, mode)
    models = task.teacher, task.student
    with PeakMemory(torch.device("cpu"), models) as memory:
        for index in range(2):
            step(loss, index)
    return {"before": weight_bytes(models), "peak": memory.bytes}
