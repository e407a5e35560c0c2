"""Exponential moving averages of the tensors that are trained."""

import contextlib
from collections.abc import Iterable, Iterator

import torch
from torch import nn

from vidaccel.compat.torch import lerp_all
from vidaccel.train.parallel import reshard


class Average:
    """Averages of the parameters `trained` of `model`, which may be sharded: then so are they."""

    def __init__(self, model: nn.Module, trained: Iterable[nn.Parameter], decay: float):
        self._model = model
        self._trained = [p.detach() for p in trained]
        self._decay = decay
        self.tensors = [t.clone() for t in self._trained]

    def update(self, count: int) -> None:
        """Takes the weights in after optimiser step `count` (from 0, skipped ones not counted).

        The decay is ramped up over the first steps, so that the initial weights are soon forgotten; the first step's
        weights replace them.
        """
        decay = min(self._decay, (1 + count) / (10 + count)) if count else 0.0
        lerp_all(self.tensors, self._trained, 1 - decay)

    def exchange(self) -> None:
        """Puts the averages into the model and its weights here; a second time, each is back bit for bit."""
        reshard(self._model)
        for average, weight in zip(self.tensors, self._trained, strict=True):
            kept = weight.clone()
            weight.copy_(average)
            average.copy_(kept)

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """The model with averaged weights, in evaluation mode and without gradients, for the time of the block."""
        self.exchange()
        self._model.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            self.exchange()
            self._model.train()
