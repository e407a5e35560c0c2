"""Timing and bookkeeping of the GPU benchmark: one row of JSON for each thing measured, errors included.

A kernel that faults leaves its process without a device, and a compiler may take it down altogether. So a row is
written as failed before it is measured and again after; a process that can go no further ends, and the next one, given
the same file, measures what has no row yet.

A row has `item`, `name`, `variant`, `size` (words and numbers that say what ran) and either `error` or the figures:

    seconds, spread      median over repetitions and (largest - smallest) / median
    peak_bytes           device memory at its highest during the timed calls, inputs and weights included
    bytes, flops         the least that the work must move and compute, counted by hand
    of_copy, of_matmul   bytes and flops a second, as a share of this machine's own ceilings
    relative_error       against a float32 reference, where one is named
"""

import contextlib
import json
import math
import os
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")


BACKEND = "inductor" if CUDA else "eager"
COLD = (2 << 30) if CUDA else 1
"""Bytes overwritten before a timed call: many times the L2, and half a millisecond in which the host gets ahead."""
DEVICE_LOST = 70
"""Exit status of a process whose device answers no more."""
UNFINISHED = "the process died in it, or was stopped"


def compiled(function: Callable) -> Callable:
    """torch.compile as a user would have it; on a CPU, where only tracing is of interest, without code generation."""
    return torch.compile(function, dynamic=False, backend=BACKEND)


def timed(call: Callable[[], object], budget: float, most: int) -> list[float]:
    """Seconds of each of up to `most` calls within `budget` seconds.

    Memory is overwritten before each, so that inputs come from device memory, and so that what is timed is the device's
    work and not the time in which a host launches it: that runs ahead in a model.
    """
    cold = torch.empty(COLD, dtype=torch.uint8, device=DEVICE)
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
    """Appends rows to a file of JSON lines as they are measured; of two for the same thing the later counts."""

    def __init__(self, path: Path, item: str):
        self.path, self.item = path, item
        self.known = {key(row): row for row in read_rows(path)}
        """What has been measured, also by a process or a run before this one, or what a process died in: not measured
        again."""

    def known_row(self, name: str, variant: str, size: dict) -> dict | None:
        """What is known of this measurement."""
        return self.known.get(key({"item": self.item, "name": name, "variant": variant, "size": size}))

    def add(self, name: str, variant: str, size: dict, **figures) -> dict:
        row = {"item": self.item, "name": name, "variant": variant, "size": size} | figures
        append_row(self.path, row)
        self.known[key(row)] = row
        return row

    @contextlib.contextmanager
    def attempt(self, name: str, variant: str, size: dict) -> Iterator[None]:
        """Whatever goes wrong inside becomes a row's error: what follows is worth its machine time all the same."""
        try:
            yield
        except Exception as error:  # noqa: BLE001
            self.add(name, variant, size, error=f"{type(error).__name__}: {error}"[:500])
            if CUDA and _device_is_lost():
                os._exit(DEVICE_LOST)

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
        """Times `call` after `warmup` calls that compile and tune, and adds its row. A CPU, whose times tell nothing,
        makes one call of each kind.

        Returns:
            Its median in seconds, or None if it failed.
        """
        before = self.known_row(name, variant, size)
        if before is not None:
            return before.get("seconds")
        if not CUDA:
            warmup, most = min(warmup, 1), 1
        self.add(name, variant, size, error=UNFINISHED)
        with self.attempt(name, variant, size):
            figures = {}
            if exact is not None:
                figures["relative_error"] = relative_error(_first(call()), exact)
            for _ in range(warmup):
                call()
            if CUDA:
                torch.cuda.reset_peak_memory_stats()
            samples = timed(call, budget, most)
            median = statistics.median(samples)
            figures |= {"seconds": median, "spread": (max(samples) - min(samples)) / median}
            if CUDA:
                figures["peak_bytes"] = torch.cuda.max_memory_allocated() - COLD
            figures |= {least: value for least, value in (("bytes", bytes), ("flops", flops)) if value}
            self.add(name, variant, size, **figures)
            return median
        return None


def _device_is_lost() -> bool:
    """Whether an error is one of those after which every call to the device fails."""
    try:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()  # of what an error for want of memory left behind
    except Exception:  # noqa: BLE001 - whatever it raises, the device does not answer
        return True
    return False


def relative_error(got: Tensor, exact: Tensor) -> float:
    return ((got.float() - exact.float()).norm() / exact.float().norm()).item()


def _first(result) -> Tensor:
    return result[0] if isinstance(result, tuple) else result


def key(row: dict) -> str:
    """What a row is about."""
    return json.dumps([row["item"], row["name"], row["variant"], row["size"]])


def append_row(path: Path, row: dict) -> None:
    with path.open("a") as file:
        file.write(json.dumps(_finite(row)) + "\n")


def _finite(value):
    """JSON has no infinity and no NaN: null stands for both."""
    if isinstance(value, dict):
        return {name: _finite(item) for name, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_rows(path: Path) -> list[dict]:
    """The rows of a file, each thing's last, in the order in which they were begun."""
    lines = path.read_text().splitlines() if path.exists() else []
    return list({key(row): row for row in map(json.loads, lines)}.values())
