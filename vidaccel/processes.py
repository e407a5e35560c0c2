"""Many processes at one job: torchrun's process group, what they agree on, and work that each does a share of.

What a share makes is a file, or what `on_all` and `gathered` pass on. Nobody waits for a process that has gone: each
gives a sign of life through the group's store every few seconds, which the others watch for while they work and while
they wait. With one process everything here does nothing, or plainly.
"""

import contextlib
import gc
import itertools
import math
import os
import pickle
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from torch import distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from vidaccel.compat.torch import forget_groups
from vidaccel.errors import FailedAlone, ProcessLost
from vidaccel.locks import locked
from vidaccel.progress import Progress
from vidaccel.ranks import launched

BEAT = 5.0
"""Seconds between signs of life."""
SILENT = 35.0
"""Seconds without one after which a process is taken for lost: the others are to have ended within a minute."""
Item = TypeVar("Item")
Result = TypeVar("Result")
_meshes: list[DeviceMesh] = []  # that sharded models lie on
_jobs = itertools.count()
_lives: list["_Life"] = []  # one at most


@contextlib.contextmanager
def processes() -> Iterator[None]:
    """The process group that torchrun's environment describes, for the time of the block; nothing without torchrun, or
    within such a block.

    Tensors on the CPU go through gloo, those on a GPU through NCCL; process i of a machine uses its GPU i. What was
    sharded in the block is to be left in it: the group ends with the last that holds it.

    Raises:
        ProcessLost: another of them has gone.
    """
    if launched() == 1 or dist.is_initialized():
        yield
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    try:
        with _told_of_losses(), _signs_of_life():
            yield
    finally:
        dist.destroy_process_group()
        # Destroyed, it still has its threads until nothing refers to it, and DTensor's caches keep every mesh, with its
        # groups. A thread of gloo's that lets go of a finished tensor while the interpreter ends aborts the process.
        for mesh in _meshes:
            forget_groups(mesh)
        _meshes.clear()
        gc.collect()


@contextlib.contextmanager
def _told_of_losses() -> Iterator[None]:
    """What the network raises where another process has gone, as `ProcessLost`."""
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and "gloo/transport" not in str(error):
            raise
        raise ProcessLost(str(error)) from error


def group_ends_with(mesh: DeviceMesh) -> None:
    """Lets the process group's end take the mesh's groups with it."""
    _meshes.append(mesh)


def world() -> int:
    """Number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """Number of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def on_first(function: Callable[[], Result]) -> Result:
    """Calls `function` in process 0 alone; every process returns what it returned, or raises what it raised."""
    if world() == 1:
        return function()
    outcome: list = [None, None]
    if rank() == 0:
        try:
            outcome[0] = function()
        except Exception as error:
            outcome[1] = _portable(error)
    dist.broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


def on_all(function: Callable[[], Result], group: dist.ProcessGroup | None = None) -> Result:
    """Calls `function` in every process, or in each of a group, and returns what it returned here, unless it failed in
    one of them: then every process raises what the first of those raised. One that fails alone would leave the others
    waiting for it."""
    if world() == 1:
        return function()
    result = failure = None
    try:
        result = function()
    except Exception as error:
        failure = _portable(error)
    for error in exchanged(failure, group):
        if error is not None:
            raise error
    return cast(Result, result)


def exchanged(own: Item, group: dist.ProcessGroup | None = None) -> list[Item]:
    """What each process, or each of a group, gives, in their order.

    Raises:
        ProcessLost: one of them has gone; now, and not at the end of `processes`, since who takes other errors for
            those of its own work is not to take this one.
    """
    every: list[Any] = [None] * dist.get_world_size(group)
    with _told_of_losses():
        dist.all_gather_object(every, own, group)
    return every


def _portable(error: Exception) -> Exception:
    """The error, or one that says the same where it cannot be sent to another process."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


def gathered(items: Sequence[Item], of: Callable[[Item], Result]) -> list[Result]:
    """`of` each item, in their order, in every process; each process computes every `world()`-th.

    Where models are sharded, `of` makes the same passes whatever the item: a process without one takes the last again.
    """
    if world() == 1:
        return [of(item) for item in items]
    rounds = -(-len(items) // world())
    own = [of(items[min(i * world() + rank(), len(items) - 1)]) for i in range(rounds)]
    every = exchanged(own)
    return [every[i % world()][i // world()] for i in range(len(items))]


@contextlib.contextmanager
def locked_by_first(folder: Path) -> Iterator[None]:
    """`locked` for a folder that all processes write to: process 0 holds the lock for all."""
    with contextlib.ExitStack() as stack:
        on_first(lambda: stack.enter_context(locked(folder)))
        yield


@contextlib.contextmanager
def sharing(title: str, total: int, done: int = 0) -> Iterator[Callable[[], None]]:
    """A job that every process does a share of, under one bar. Yields what is to be called for each piece that is done;
    leaving the block waits until all have left it.

    Raises:
        ProcessLost: another process failed or has gone; at the end of a piece, or of all.
    """
    with Progress(title, total=total, done=done) as bar:
        if world() == 1:
            yield lambda: bar.advance(1)
            return
        with _signs_of_life() as life:
            job = _Job(bar.advance, life)
            try:
                yield job.advance
                job.wait()
            except BaseException:
                job.fail()
                raise
        on_all(lambda: None)  # the first to go may take the store with it


def by_all(function: Callable[[], Result]) -> Result:
    """As `on_all`, where `function` itself may exchange with the other processes: who fails gives those that wait for
    it, and never come to an end of theirs, `SILENT` s.

    Raises:
        FailedAlone: it failed here, where another waits for this process.
        ProcessLost: another of them has gone.
    """
    if world() == 1:
        return function()
    result = failure = None
    with _signs_of_life() as life:
        job = _Job(lambda more: None, life)
        try:
            try:
                with _told_of_losses():
                    result = function()
            except ProcessLost:
                raise
            except Exception as error:
                failure = error
            if not job.wait(math.inf if failure is None else SILENT):
                said = f"{type(failure).__name__}: {failure}"
                raise FailedAlone(f"process {rank()} failed, and the others wait for it: {said}") from failure
        except BaseException:
            job.fail()
            raise

    def outcome() -> Result:
        if failure is not None:
            raise failure
        return cast(Result, result)

    return on_all(outcome)


def by_first(function: Callable[[], Result]) -> Result:
    """As `on_first`, for what takes long: meanwhile the others watch for a sign of life of process 0, and for none of a
    broadcast, which gives up after half an hour. It has no bar of its own: `function` may have one, or time something.

    Raises:
        ProcessLost: process 0 has gone.
    """
    own = by_all(lambda: function() if rank() == 0 else None)
    return cast(Result, on_first(lambda: own))


def store(patience: float = SILENT) -> dist.TCPStore:
    """A connection to the store through which torchrun's processes found each other, which `patience` s are tried."""
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    return dist.TCPStore(address, port, is_master=False, timeout=timedelta(seconds=patience), wait_for_workers=False)


def key(name: str) -> str:
    """In the store; that of a run which torchrun started again is another."""
    return f"vidaccel/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}/{name}"


@contextlib.contextmanager
def _signs_of_life() -> Iterator["_Life"]:
    """Given and watched for in the time of the block, and of blocks within it."""
    if _lives:
        yield _lives[0]
        return
    life = _Life()
    _lives.append(life)
    try:
        yield life
    finally:
        _lives.clear()
        life.end()


class _Life:
    """Signs of life of this process, and those of the others, in a thread of its own: also while nobody waits, or one
    is late."""

    silent: int | None = None
    """One of the others that has given none for `SILENT` s."""

    def __init__(self) -> None:
        self._own, self._count = rank(), world()
        self._store, self._over = store(), threading.Event()
        self._thread = threading.Thread(target=self._live, daemon=True)
        self._thread.start()

    def end(self) -> None:
        self._over.set()
        self._thread.join()

    def _live(self) -> None:
        seen, since = [0] * self._count, [time.monotonic()] * self._count
        with contextlib.suppress(RuntimeError):  # the store has gone, as who waits finds out
            while True:
                silent = None
                for number in range(self._count):
                    signs = self._store.add(key(f"beat/{number}"), int(number == self._own))
                    if signs != seen[number]:
                        seen[number], since[number] = signs, time.monotonic()
                    elif time.monotonic() - since[number] > SILENT:
                        silent = number
                self.silent = silent
                if self._over.wait(BEAT):
                    return


class _Job:
    """How far the processes are, counted in the store."""

    def __init__(self, show: Callable[[int], None], life: _Life):
        self._told, self._shown, self._life = show, 0, life
        self._name, self._store = next(_jobs), store()

    def advance(self) -> None:
        self._show(self._count("done", 1))
        self._stop_if_lost()

    def wait(self, patience: float = math.inf) -> bool:
        """Until all processes wait, `patience` s at most; whether they do."""
        until = time.monotonic() + patience
        waiting, pause = self._count("waiting", 1), 0.01
        while waiting < world():
            if time.monotonic() > until:
                return False
            time.sleep(pause)
            pause = min(1.0, 1.5 * pause)
            self._stop_if_lost()
            self._show(self._count("done", 0))
            waiting = self._count("waiting", 0)
        self._show(self._count("done", 0))
        return True

    def fail(self) -> None:
        with contextlib.suppress(RuntimeError):
            self._count("failed", 1)

    def _stop_if_lost(self) -> None:
        if self._count("failed", 0):
            raise ProcessLost("another process failed")
        if self._life.silent is not None:
            raise ProcessLost(f"process {self._life.silent} gives no sign of life")

    def _count(self, name: str, by: int) -> int:
        with _told_of_losses():
            return self._store.add(key(f"{self._name}/{name}"), by)

    def _show(self, done: int) -> None:
        self._told(done - self._shown)
        self._shown = done
