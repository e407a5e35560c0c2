"""What a user did wrong, as one line and one hint, and a training that cannot go on.

Core modules raise `UserError`; the command line prints it without a traceback and exits with status 2, or 1 for
`TrainingFailed`. Anything else that escapes is a bug of ours: one line as well, and its traceback with --debug.
"""

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """A mistake the user can mend: `message` says what was wrong, `hint` what to do about it."""

    def __init__(self, message: str, hint: str):
        super().__init__(message, hint)  # as pickling needs them
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}\nhint: {self.hint}"


class ProcessLost(RuntimeError):
    """Another of the processes that torchrun started ended before its work was done, which ends this one too."""


class FailedAlone(RuntimeError):
    """This of the processes that torchrun started failed where the others wait for it, which ends the run."""


class TrainingFailed(RuntimeError):
    """Too many steps in a row had no finite loss or gradient. The last good checkpoint is kept."""


def nearest(word: str, known: Iterable[str]) -> str:
    """The part of a hint that names what was probably meant: `did you mean "steps"? ` or the whole list."""
    known = sorted(known)
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    if close:
        return f'did you mean "{close[0]}"?'
    return f"choose from: {', '.join(known)}" if known else "leave it out: there are none to choose from"
