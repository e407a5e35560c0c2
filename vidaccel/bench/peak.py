"""The most memory that was in use at once, while something ran.

On CUDA what torch's allocator gave out. On a CPU the resident memory of the whole process, all models of the run and
the libraries included, looked at every few milliseconds; what earlier rows left with the C library is handed back
before.
"""

import ctypes
import gc
import resource
import threading
from pathlib import Path

import torch

INTERVAL = 0.005
"""Seconds between two looks."""
STATM = Path("/proc/self/statm")


class PeakMemory:
    """`with PeakMemory(device) as peak: ...`, then `peak.bytes`."""

    bytes: int = 0

    def __init__(self, device: torch.device):
        self._device, self._done = device, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "PeakMemory":
        gc.collect()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self._device)
        else:
            _hand_back()
            self._thread.start()
        return self

    def __exit__(self, *error) -> None:
        if self._device.type == "cuda":
            self.bytes = torch.cuda.max_memory_allocated(self._device)
        else:
            self._done.set()
            self._thread.join()
            self.bytes = max(self.bytes, resident_bytes())

    def _watch(self) -> None:
        while not self._done.wait(INTERVAL):
            self.bytes = max(self.bytes, resident_bytes())


def resident_bytes() -> int:
    """Of this process now; where Linux does not tell, the most there ever was."""
    if STATM.exists():
        return int(STATM.read_text().split()[1]) * resource.getpagesize()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _hand_back() -> None:
    """Ask glibc to return freed memory to the system; another C library keeps it."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
