"""What a training minimises: a loss that draws for itself, or one in two halves, whose second can be one CUDA graph."""

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from vidaccel.models.velocity import Text, Velocity

Measured = dict[str, float] | dict[str, Tensor]
"""Metrics to log, the same names in every pass."""
Loss = Callable[[nn.Module, int, torch.Generator], tuple[Tensor, Measured]]
"""(model, index of this forward pass since the start, its generator) -> scalar loss, metrics. The index counts the
passes of all processes."""


class Batch(NamedTuple):
    """What one forward pass learns from."""

    tensors: dict[str, Tensor]
    """All that the loss reads and that is not the same in every pass, on the model's device."""
    variant: Hashable = None
    """Of a loss that runs in several ways: which one."""


TEXT = "text."
"""What the names of text tensors begin with in a `Batch`."""


def in_batch(text: Text) -> dict[str, Tensor]:
    """Text tensors by the names that they have in a `Batch`."""
    return {TEXT + name: tensor for name, tensor in text.items()}


def text_of(tensors: Mapping[str, Tensor]) -> Text:
    """The text tensors of a `Batch`."""
    return {name.removeprefix(TEXT): tensor for name, tensor in tensors.items() if name.startswith(TEXT)}


@dataclass(frozen=True)
class Objective:
    """A `Loss` in two halves: what is drawn, and what is computed from it without waiting for the device."""

    draw: Callable[[int, torch.Generator], Batch]
    """(index, generator) -> batch. The generator is on the model's device where that is CUDA."""
    loss: Callable[[nn.Module, Batch], tuple[Tensor, dict[str, Tensor]]]
    """Scalar loss and metrics [], of tensors alone: nothing in it may depend on the index or ask for a value."""
    velocities: tuple[Velocity, ...] = ()
    """Models that it calls, whose blocks may be compiled for the time of the training."""

    def __call__(self, model: nn.Module, index: int, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        return self.loss(model, self.draw(index, generator))


def generator_for(seed: int, index: int, device: torch.device | str = "cpu") -> torch.Generator:
    """The generator of forward pass `index`: a function of (seed, index) and nothing else."""
    return torch.Generator(device).manual_seed((seed * 0x9E3779B97F4A7C15 + index * 0xD1B54A32D192ED03) % 2**63)


def drawing_device(loss: Loss, model: nn.Module) -> torch.device:
    """Where the generators of a training's passes are: on the model's device for an `Objective` on CUDA, else on the
    CPU."""
    device = next(model.parameters()).device
    return device if device.type == "cuda" and isinstance(loss, Objective) else torch.device("cpu")
