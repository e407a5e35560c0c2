"""Torchrun's processes of one command speak as one: results are printed by the first of them, what several have to say
is said once, and a process that is ended because another one was says so, if nobody has.

The first to say something is told by a counter in the store through which the processes found each other. It belongs to
torchrun itself, so that it outlives each of them.
"""

import contextlib
import functools
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from vidaccel import ranks

if TYPE_CHECKING:
    from torch.distributed import TCPStore

LOST = (
    "error: the run ends: another of its processes did before its work was done, or it was told to\n"
    "hint: what that one said, if anything, is above; the same command goes on from what is written"
)
CONNECTING = 5.0
"""Seconds in which the store has to answer. One that has gone with its launcher is tried twice, with as long a pause at
most between, and torchrun leaves a process 30 s to end in."""
ROOT_CAUSE = 1.0
"""Seconds in which the process that failed can say why, before others say that one did."""
_said: set[str] = set()  # by this one
_own = threading.Lock()


@contextlib.contextmanager
def one_of_many() -> Iterator[Callable[[str, bool], bool]]:
    """For the time of a command. Yields what tells whether this process is to say its last words, and whether those are
    that another process is lost."""
    if ranks.launched() == 1:
        yield lambda said, lost: True
        return

    def heard(said: str, lost: bool) -> bool:
        if lost:
            time.sleep(ROOT_CAUSE)
            return _first("ended")
        first = _first(said)
        _first("ended")
        return first

    for handler in logging.getLogger("vidaccel").handlers:
        handler.addFilter(_worth_saying)
    with contextlib.ExitStack() as stack:
        stack.enter_context(_terminated(lambda: heard(LOST, True)))
        if ranks.number():
            silence = stack.enter_context(open(os.devnull, "w"))
            stack.enter_context(contextlib.redirect_stdout(silence))
        yield heard


def _worth_saying(record: logging.LogRecord) -> bool:
    return ranks.number() == 0 if record.levelno < logging.WARNING else _first(record.getMessage())


def _first(said: str) -> bool:
    """Whether no process has said so yet. Where none can tell, each says it once."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":  # the store is one of the processes' own
        return True
    from vidaccel.processes import key

    try:
        return _connection().add(key(f"said/{said}"), 1) == 1
    except RuntimeError:  # the store has gone with its launcher
        with _own:
            first = said not in _said
            _said.add(said)
            return first


@functools.cache
def _connection() -> "TCPStore":
    from vidaccel.processes import store

    return store(CONNECTING)


@contextlib.contextmanager
def _terminated(say: Callable[[], bool]) -> Iterator[None]:
    """Ends this process at once on SIGTERM, which torchrun sends when another process has ended: a thread hears of it
    even while the main one waits within a library."""
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:
        yield
        return
    reading, writing = os.pipe()
    os.set_blocking(writing, False)

    def listen() -> None:
        while number := os.read(reading, 1):
            if number[0] == signal.SIGTERM:
                if say():
                    sys.stderr.write(f"{LOST}\n")
                    sys.stderr.flush()
                os._exit(128 + signal.SIGTERM)

    signal.signal(signal.SIGTERM, lambda number, frame: None)
    before = signal.set_wakeup_fd(writing)
    listener = threading.Thread(target=listen, daemon=True)
    listener.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.close(writing)
        listener.join()
        os.close(reading)
