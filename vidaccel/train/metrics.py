"""What a training measures: metrics.jsonl always, and the trackers that were asked for."""

import json
import logging
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from vidaccel.artefacts import atomic_path, explained
from vidaccel.errors import FailedAlone, ProcessLost, UserError, nearest

FILE = "metrics.jsonl"
PROJECT = "vidaccel"
"""What trackers file runs under."""
log = logging.getLogger(__name__)


class ByProducts:
    """What a training makes besides its result: a failure of one is a warning, numbered, and training goes on. What all
    processes make, all have to fail in (`by_all`)."""

    def __init__(self) -> None:
        self.failed = 0

    def make(self, make: Callable[[], None], title: str, then: str = "training goes on") -> None:
        try:
            make()
        except (ProcessLost, FailedAlone):
            raise
        except Exception as error:
            self.failed += 1
            reason = " ".join(str(error).split()) or type(error).__name__
            log.warning("%s failed (failure %d); %s: %s", title, self.failed, then, reason)


class Metrics:
    """One line a step in `folder`, and the same to each tracker; process 0 alone starts and writes it."""

    def __init__(self, folder: Path):
        self._path = folder / FILE
        self._trackers = []
        self._by_products = ByProducts()

    def __enter__(self) -> "Metrics":
        return self

    def __exit__(self, *exc) -> None:
        for tracker in self._trackers:
            self._by_products.make(tracker.finish, f"finishing the tracker {tracker.name}")

    def start(self, step: int, trackers: Sequence[str], settings: Mapping[str, Any]) -> None:
        """Goes on after `step`: drops the lines of later ones, which are about to be run again."""
        if self._path.exists():
            lines = self._path.read_text(errors="replace").splitlines()
            kept = [line for line in lines if _step(line) <= step]
            with atomic_path(self._path) as temporary:
                temporary.write_text("".join(line + "\n" for line in kept))
        plain = {key: value if isinstance(value, int | float) else str(value) for key, value in settings.items()}
        for name in trackers:
            self._trackers.append(_started(name, self._path.parent))
            self._trackers[-1].store_init_configuration(plain)

    def write(self, line: Mapping[str, float]) -> None:
        """Says it where no terminal shows a bar. Raises `UserError` if the file cannot be written."""
        append(self._path, line)
        if not sys.stderr.isatty():
            numbers = " ".join(f"{key} {line[key]:.4g}" for key in ("loss", "lr", "seconds") if key in line)
            log.info("step %d: %s", line["step"], numbers)
        values = {key: value for key, value in line.items() if key != "step"}
        for tracker in self._trackers:
            told = partial(tracker.log, values, step=line["step"])
            self._by_products.make(told, f"telling the tracker {tracker.name} of step {line['step']}")


def _step(line: str) -> float:
    """Of a line of the file; infinite for what is none."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError, RecursionError):  # the process was killed, or the disk full, within it
        return math.inf


def append(path: Path, line: Mapping[str, float]) -> None:
    """Adds `line` to a file of JSON lines."""
    finite = {key: value if math.isfinite(value) else None for key, value in line.items()}  # JSON knows no NaN
    with explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a") as file:
            file.write(json.dumps(finite) + "\n")


def check_trackers(names: Sequence[str]) -> None:
    """Raises `UserError` for a tracker that accelerate does not know, or whose package is missing."""
    if not names:
        return
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
    from accelerate.utils import LoggerType

    installed = {str(name) for name in get_available_trackers()}
    for name in names:
        if name not in LOGGER_TYPE_TO_CLASS:
            raise UserError(f'there is no tracker "{name}"', nearest(name, LOGGER_TYPE_TO_CLASS))
        if name in LoggerType.list() and name not in installed:
            raise UserError(f"trackers: {name} is not installed", f"pip install {name}, or leave it out")


def _started(name: str, folder: Path):
    """A tracker of accelerate's. Its classes want accelerate's state to exist, though no Accelerator."""
    from accelerate import PartialState
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    PartialState()
    kind = LOGGER_TYPE_TO_CLASS[name]
    tracker = kind(PROJECT, logging_dir=folder / name) if kind.requires_logging_directory else kind(PROJECT)
    tracker.start()
    return tracker
