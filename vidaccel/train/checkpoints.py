"""Where a training stands on disk: whole checkpoints only, of one run's settings only, read back bit for bit.

    folder/checkpoints/step-00000200/   model.safetensors, ema.safetensors, optimizer.safetensors, state.json

Of many processes each writes its shards of all three into one file, shard-*.safetensors. Any number of processes reads
either, if they make as many forward passes a step. A checkpoint is written under another name and renamed, so that a
folder called step-* is whole. The last two and the best are kept.
"""

import contextlib
import json
import logging
import math
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from vidaccel.artefacts import CHECKPOINTS, differences, explained
from vidaccel.errors import UserError
from vidaccel.processes import on_all, on_first, world
from vidaccel.train.parallel import check_fit, copy_own, load_sharded, save_sharded, shared_folder

log = logging.getLogger(__name__)
KEPT = 2
STATE = "state.json"

Tensors = Mapping[str, Mapping[str, torch.Tensor]]
"""File name -> tensor name -> tensor. Saved from, and loaded into, in place."""


@dataclass
class State:
    """What a checkpoint knows besides tensors."""

    step: int = 0
    """Steps made."""
    skipped: int = 0
    """Those of them that were not finite."""
    seconds: float = 0.0
    share: float = 0.0
    """Of the training, that has passed."""
    best: float = math.inf
    """Lowest evaluation so far."""
    best_step: int | None = None


class Checkpoints:
    """Those of the run in `folder` that `identity` (JSON values under flat names) tells from runs of other settings."""

    def __init__(
        self,
        folder: Path,
        identity: Mapping[str, Any],
        tensors: Tensors,
        current: Callable[[Mapping[str, Any]], Mapping[str, Any]] = dict,
    ):
        """`current` gives an identity that is on disk the names that an identity has now."""
        self.folder = folder / CHECKPOINTS
        self._identity, self._current = dict(identity), current
        self._tensors = tensors
        self.saved = 0
        """The step of the newest."""

    def resume(self) -> State:
        """Loads the newest checkpoint, if there is one, and clears away what a killed run left unfinished.

        Raises:
            UserError: it belongs to other settings or another model, or one of its files is damaged.
        """
        state = State()
        if newest := on_first(lambda: max(self.folder.glob("step-*"), default=None)):
            state = on_first(lambda: self._read_state(newest / STATE))
            self._load(newest)
        on_first(self._clear)
        self.saved = state.step
        return state

    def save(self, state: State) -> None:
        """Raises `UserError` if the checkpoint cannot be written; those before it are then still there."""
        target = self.folder / _name(state.step)
        best = state.best if math.isfinite(state.best) else None  # JSON knows no infinity
        record = {**asdict(state), "best": best, "identity": self._identity}
        with explained(target), shared_folder(target) as folder:
            if world() > 1:
                save_sharded(self._flat(), folder)
            else:
                for name, tensors in self._tensors.items():
                    save_file({key: t.contiguous() for key, t in tensors.items()}, folder / f"{name}.safetensors")
            on_first(lambda: (folder / STATE).write_text(json.dumps(record)))
        self.saved = state.step
        on_first(lambda: self._prune(state.best_step))

    @contextlib.contextmanager
    def last_good_named(self) -> Iterator[None]:
        """Adds to a failure to write that everything up to the last checkpoint is still there."""
        try:
            yield
        except UserError as error:
            kept = f"the checkpoint of step {self.saved} is kept" if self.saved else "there is no checkpoint yet"
            hint = f"{error.hint}; the same command then goes on from there"
            raise UserError(f"{error.message}; {kept}", hint) from error

    def _clear(self) -> None:
        for unfinished in self.folder.glob(".step-*"):
            shutil.rmtree(unfinished)

    def _prune(self, best: int | None) -> None:
        every = sorted(self.folder.glob("step-*"))
        for old in every[:-KEPT]:
            if best is None or old.name != _name(best):
                shutil.rmtree(old)

    def _read_state(self, path: Path) -> State:
        with _readable(path):
            record = json.loads(path.read_text())
            identity, best = self._current(record.pop("identity")), record.pop("best")
            state = State(**record, best=math.inf if best is None else best)
        if differing := differences(_by_passes(identity), _by_passes(self._identity)):
            raise UserError(
                f"{path.parent} is of a run with other settings ({'; '.join(differing)})",
                "give the same settings to continue it, or another folder to start afresh",
            )
        wrote, here = (of.get("processes", 1) for of in (identity, self._identity))
        if wrote != here:
            log.info("%d processes go on where %d were: with the same samples, not to the last bit", here, wrote)
        return state

    def _load(self, checkpoint: Path) -> None:
        if any(checkpoint.glob("shard-*.safetensors")):
            on_all(lambda: _open_each(sorted(checkpoint.glob("*.safetensors"))))
            with _readable(checkpoint / "*.safetensors"):
                load_sharded(self._flat(), checkpoint)
            return
        on_all(lambda: self._load_whole(checkpoint))

    def _load_whole(self, checkpoint: Path) -> None:
        """What one process wrote, or of sharded tensors this process's parts of it."""
        for name, tensors in self._tensors.items():
            with _readable(checkpoint / f"{name}.safetensors") as path:
                found = load_file(path)
                check_fit({key: (t.shape, t.dtype) for key, t in found.items()}, tensors)
                for key, tensor in tensors.items():
                    copy_own(found[key], tensor)

    def _flat(self) -> dict[str, torch.Tensor]:
        return {f"{name}.{key}": t for name, tensors in self._tensors.items() for key, t in tensors.items()}


def _by_passes(identity: Mapping[str, Any]) -> dict[str, Any]:
    """What has to stay: processes may be more or fewer, if the passes of a step are as many."""
    found = dict(identity)
    found["accumulate x processes"] = found.pop("accumulate", 1) * found.pop("processes", 1)
    return found


def flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings under dotted names, as JSON would give them back."""
    result = {}
    for key, value in settings.items():
        if isinstance(value, Mapping):
            result |= flat(value, f"{prefix}{key}.")
        else:
            result[f"{prefix}{key}"] = json.loads(json.dumps(value))
    return result


def unflat(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings under dotted names as nested ones, which `flat` gives the same names again."""
    nested: dict[str, Any] = {}
    for key, value in settings.items():
        *groups, name = key.split(".")
        inner = nested
        for group in groups:
            inner = inner.setdefault(group, {})
        inner[name] = value
    return nested


def _name(step: int) -> str:
    return f"step-{step:08d}"


def _open_each(paths: list[Path]) -> None:
    """Finds the damaged file among them: torch.distributed.checkpoint does not name it."""
    for path in paths:
        with _readable(path), safe_open(path, "pt"):
            pass


@contextlib.contextmanager
def _readable(path: Path) -> Iterator[Path]:
    """Yields `path` to be loaded. One that is missing, damaged or does not fit stops the run: going back to an older
    checkpoint, or on with half of this one, is for the user to decide."""
    try:
        yield path
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        raise UserError(
            f"cannot continue from {path}: {' '.join(str(error).split())}",
            f"if the model is still the same, remove {path.parent} to go on from the checkpoint before it; "
            "give another folder to start afresh",
        ) from error
