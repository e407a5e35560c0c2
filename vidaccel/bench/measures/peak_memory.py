"""The most memory that was in use at once while something ran: weights, activations and what caches keep.

On CUDA what torch's allocator gave out. Its free memory is left to it, or what is timed next would have to ask for that
again. A CPU's allocator keeps no such account, and the resident memory of the process tells more of the libraries
and of other rows' models; there it is the weights, and every storage that operations make followed to its end.
What a kernel needs within one operation is then not seen.
"""

import gc
from collections.abc import Iterable

import torch
from torch import nn

from vidaccel.models.live_bytes import LiveBytes, weight_bytes


class PeakMemory:
    """`with PeakMemory(device, modules) as peak: ...`, then `peak.bytes`."""

    bytes: int = 0

    def __init__(self, device: torch.device, modules: Iterable[nn.Module]):
        """`modules` are those whose weights are on the device."""
        self._device, self._weighed, self._live = device, modules, LiveBytes()

    def __enter__(self) -> "PeakMemory":
        if self._device.type == "cuda":
            gc.collect()
            torch.cuda.reset_peak_memory_stats(self._device)
        else:
            self._live.__enter__()
        return self

    def __exit__(self, *error) -> None:
        if self._device.type == "cuda":
            self.bytes = torch.cuda.max_memory_allocated(self._device)
        else:
            self._live.__exit__(*error)
            self.bytes = weight_bytes(self._weighed) + self._live.peak
