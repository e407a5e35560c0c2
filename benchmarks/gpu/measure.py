"""Timing and bookkeeping of the GPU benchmark: one row of JSON for each thing measured, errors included.

A row has `item`, `name`, `variant`, `size` (words and numbers that say what ran) and either `error` or the figures:

    seconds, spread      median over repetitions and (largest - smallest) / median
    peak_bytes           device memory at its highest during the call, inputs and weights included
    bytes, flops         the least that the work must move and compute, counted by hand
    of_copy, of_matmul   bytes and flops a second, as a share of this machine's own ceilings
    relative_error       against a float32 reference, where one is named
"""

import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")


BACKEND = "inductor" if CUDA else "aot_eager"


def compiled(function: Callable) -> Callable:
    """torch.compile as a user would have it; on a CPU, where only tracing is of interest, without code generation."""
    return torch.compile(function, dynamic=False, backend=BACKEND)


def timed(call: Callable[[], object], budget: float, most: int, warmup: int) -> list[float]:
    """Seconds of each of up to `most` calls within `budget` seconds, after `warmup` calls that compile and tune.

    Memory twice the size of an H200's L2 is overwritten before each, so that inputs come from device memory.
    """
    for _ in range(warmup):
        call()
    cold = torch.empty(128 << 20 if CUDA else 1, dtype=torch.uint8, device=DEVICE)
    samples: list[float] = []
    while len(samples) < min(3, most) or (len(samples) < most and sum(samples) < budget):
        cold.zero_()
        samples.append(_once(call))
    return samples


def _once(call: Callable[[], object]) -> float:
    if not CUDA:
        start = time.perf_counter()
        call()
        return time.perf_counter() - start
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1000


class Rows:
    """Appends rows to a file of JSON lines as they are measured, so that a crash loses none of those before it."""

    def __init__(self, path: Path, item: str):
        self.path = path
        self.item = item

    def add(self, name: str, variant: str, size: dict, **figures) -> dict:
        row = {"item": self.item, "name": name, "variant": variant, "size": size} | figures
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        return row

    def measure(
        self,
        name: str,
        variant: str,
        size: dict,
        call: Callable[[], object],
        *,
        bytes: int = 0,
        flops: int = 0,
        exact: Tensor | None = None,
        budget: float = 1.0,
        most: int = 20,
        warmup: int = 2,
    ) -> float | None:
        """Times `call` and adds its row; returns its median in seconds, or None if it failed.

        Anything that goes wrong becomes the row's error: the next measurement is worth its machine time all the same.
        """
        try:
            if CUDA:
                torch.cuda.reset_peak_memory_stats()
            figures = {}
            if exact is not None:
                figures["relative_error"] = relative_error(_first(call()), exact)
            samples = timed(call, budget, most, warmup)
        except Exception as error:  # noqa: BLE001
            self.add(name, variant, size, error=f"{type(error).__name__}: {error}"[:500])
            return None
        median = statistics.median(samples)
        figures |= {"seconds": median, "spread": (max(samples) - min(samples)) / median}
        if CUDA:
            figures["peak_bytes"] = torch.cuda.max_memory_allocated()
        figures |= {key: value for key, value in (("bytes", bytes), ("flops", flops)) if value}
        self.add(name, variant, size, **figures)
        return median


def relative_error(got: Tensor, exact: Tensor) -> float:
    return ((got.float() - exact.float()).norm() / exact.float().norm()).item()


def _first(result) -> Tensor:
    return result[0] if isinstance(result, tuple) else result


def read_rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
