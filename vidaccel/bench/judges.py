"""Videos judged, in processes of their own while the next ones are made, or in this one.

What a judge needs is small (a clip, its prompt, files to compare with) and what it gives smaller, so that sixteen cores
keep up with a GPU. Each has one thread.
"""

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import Executor, ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from vidaccel.bench.generation import TimedGeneration
from vidaccel.bench.measures.quality import AGREEMENT, likeness
from vidaccel.bench.rows import read_reference
from vidaccel.config.benchmark import BenchmarkConfig
from vidaccel.processes import world as processes_at_work
from vidaccel.worlds import scorer_named

Judged = dict[str, Any]
"""{"marks", "features", "likeness", "own"} of a video, as a row keeps them."""


@contextmanager
def judges(config: BenchmarkConfig, device: torch.device) -> Iterator[Executor | None]:
    """The processes that the configuration asks for; None where this process is to judge."""
    count = config.scoring_processes
    if count is None:
        count = 0 if device.type == "cpu" else len(os.sched_getaffinity(0)) // processes_at_work() - 1
    if count <= 0:
        yield None
        return
    # Forked, as torch's own loaders are: another way of starting would run the caller's script again.
    way = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(count, way, initializer=_begin) as executor:
        executor.submit(os.getpid).result()  # forks all of them, before a bar has a thread
        yield executor


def _begin() -> None:
    """Of a judge: one thread, no part in what its parent does about signals, and an end with it: one that is left holds
    the memory of the device that it was forked with."""
    torch.set_num_threads(1)
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    parent = multiprocessing.parent_process()
    assert parent is not None
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def judged(
    scorer: str | None, prompt: str, made: TimedGeneration, baseline: Path | None, own: Mapping[str, Path]
) -> Judged:
    """The one video in `made`: its scores, its likeness to the baseline's, and that to videos of the same model's own
    full runs by their names. A file that is not there is left out."""
    assert made.frames is not None
    frames, judge = made.frames[0], scorer_named(scorer) if scorer else None
    reference = read_reference(baseline) if baseline else None
    owns = {name: read_reference(file) for name, file in own.items()}

    def alike(other: TimedGeneration) -> dict[str, float | None]:
        assert other.frames is not None
        agreed = judge.agreement(frames, other.frames[0], prompt) if judge else None
        return likeness(made, other, 0) | ({} if agreed is None else {AGREEMENT: agreed})

    return {
        "marks": dict(judge.score(frames, prompt)) if judge else None,
        "features": judge.features(frames, prompt) if judge else [],
        "likeness": alike(reference) if reference else None,
        "own": {name: alike(other) for name, other in owns.items() if other},
    }
