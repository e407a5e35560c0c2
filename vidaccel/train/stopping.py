"""A training that is asked to stop makes the step that is under way and is saved, so that no step is lost.

Asked by Ctrl-C, or by SIGTERM, as of a scheduler that wants the machine back; asked twice, it ends at once. Only where
one process trains, in the main thread, and nobody else handles those signals: many processes would have to agree on a
step.
"""

import logging
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from vidaccel.processes import world

log = logging.getLogger(__name__)

UNHANDLED = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}
"""Who handles a signal that nobody has taken."""


class Stop:
    """Whether the training was asked to stop."""

    asked = False

    def ask(self, number: int, frame: FrameType | None) -> None:
        """What the signals call."""
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        log.info("stopping after this step, which is then saved; once more stops at once")


@contextmanager
def stoppable() -> Iterator[Stop]:
    """For the time of a training's loop, which has to look at `asked` between steps, save and leave the block; that
    then raises the KeyboardInterrupt that was put off."""
    stop = Stop()
    free = world() == 1 and threading.current_thread() is threading.main_thread()
    taken = {number: own for number, own in UNHANDLED.items() if free and signal.getsignal(number) is own}
    for number in taken:
        signal.signal(number, stop.ask)
    try:
        yield stop
    finally:
        for number, own in taken.items():
            signal.signal(number, own)
    if stop.asked:
        raise KeyboardInterrupt
