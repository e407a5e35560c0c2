"""Functions and programs in two processes over gloo, or one, as torchrun starts them: by its environment.

They are forked from a server that has the packages loaded already, which takes seconds in each process otherwise.
"""

import contextlib
import multiprocessing
import os
import runpy
import socket
import sys
import tempfile
import time
from multiprocessing import forkserver
from pathlib import Path

import pytest
import torch
from torch.multiprocessing import ProcessExitedException, ProcessRaisedException, start_processes

from vidaccel.compat.torch import LOADED_BY_FSDP
from vidaccel.processes import processes, rank, world

ROOT = Path(__file__).parents[2]
LOADED = (
    LOADED_BY_FSDP,
    "tests.tiny",
    "tests.train.test_parallel",
    "vidaccel.cli.main",
    "vidaccel.train.distill",
    "vidaccel.train.predictor.training",
)
"""By the server."""


def start(function, *arguments):
    """The world of two processes that runs `function`, on its way."""
    return spawn(2, _entered, function, arguments)


def in_two(function, *arguments) -> None:
    """Fails if they wait for each other: gloo itself gives up after half an hour."""
    _wait(start(function, *arguments), function.__name__)


def in_four(function, *arguments) -> None:
    """As `in_two`."""
    _wait(spawn(4, _entered, function, arguments), function.__name__)


def program(*words: str, module: str = "vidaccel", count: int = 1) -> str:
    """What `python -m MODULE WORDS` prints in `count` processes; fails as one of them does.

    Each looks at its end whether the group's threads ended with the group: one that is left may want the interpreter
    while that ends, which aborts a training that is done; once in many runs, and so in none that a test could wait for.
    """
    with tempfile.NamedTemporaryFile() as file:
        printed = Path(file.name)
        try:
            _wait(spawn(count, _main, module, words, Path.cwd(), printed), module)
        except (ProcessExitedException, ProcessRaisedException) as error:
            pytest.fail(f"{error}\n{printed.read_text()}")
        return printed.read_text()


def gloo_threads() -> list[str]:
    """Names of the threads of this process that are gloo's, where the system tells."""
    names = [path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")]
    return [name for name in names if "gloo" in name]


def spawn(count: int, function, *arguments):
    """So many processes that run `function`, which is to enter their group itself, on their way."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    multiprocessing.set_forkserver_preload(list(LOADED))
    with contextlib.chdir(ROOT):  # from where the server, if this starts it, finds what it loads
        forkserver.ensure_running()
    return start_processes(
        _enter, (count, port, function, arguments), nprocs=count, join=False, start_method="forkserver"
    )


def _enter(number: int, count: int, port: int, function, arguments) -> None:
    if count > 1:
        os.environ |= {"RANK": str(number), "LOCAL_RANK": str(number), "WORLD_SIZE": str(count)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    function(*arguments)
    assert not gloo_threads()


def _entered(function, arguments) -> None:
    with processes():
        assert (str(rank()), str(world())) == (os.environ["RANK"], os.environ["WORLD_SIZE"])
        function(*arguments)


def _main(module: str, words: tuple[str, ...], folder: Path, printed: Path) -> None:
    os.chdir(folder)
    with printed.open("a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.argv[:] = [module, *words]
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as ended:
        if ended.code:
            raise


def _wait(context, name: str) -> None:
    began = time.monotonic()
    while not context.join(timeout=10):
        if time.monotonic() - began > 300:
            for process in context.processes:
                process.kill()
            pytest.fail(f"the processes of {name} wait for each other")
