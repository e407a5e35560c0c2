"""A predictor on disk, and whether it is the right one.

    folder/config.json          what it is for: `NetworkConfig`
    folder/model.safetensors    its weights

A finished folder also has schedule.json and run.json, whose hashes are then compared.
"""

import json
from collections.abc import Set
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from safetensors import SafetensorError
from safetensors.torch import load_model, save_file
from torch import nn

from vidaccel.artefacts import (
    RUN_FILE,
    atomic_path,
    read_json,
    read_run,
    refuse_unfinished,
    sha256_file,
    verify_files,
    write_json,
)
from vidaccel.errors import UserError
from vidaccel.families.base import DiTFamily
from vidaccel.families.registry import FAMILIES
from vidaccel.families.walk import width
from vidaccel.forecasters.registry import FORECASTERS, attachable
from vidaccel.models.files import local_path
from vidaccel.models.grid import Grid

FORMAT = "predictor/1"
SCHEDULES = "schedules/1"
"""Format of a folder of a forecaster's schedules alone."""
CORRECTION, PUBLISHED = ARCHITECTURES = ("correction", "published")
"""What a network may be: learned.py says how they differ."""
CONFIG_FILE, WEIGHTS_FILE, SCHEDULE_FILE = "config.json", "model.safetensors", "schedule.json"
SCALARS_FILE = "scalars.json"
"""Of a predictor's folder: what config.json is of a folder of scalars alone (multistep.py)."""


def schedules_for(folder: Path) -> tuple[str, str] | None:
    """The forecaster whose schedules a folder holds, and nothing else, and `student_hash` of the model that they were
    searched for; None for another folder."""
    try:
        run = json.loads((folder / RUN_FILE).read_bytes())
        return (run["forecaster"], run["student"]) if run["format"] == SCHEDULES else None
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def kind_of(folder: str | Path) -> str:
    """The name, in the registry, of the forecaster that a folder holds or has schedules for: by the format of its
    config.json, which that of a predictor does not say. What is no such folder is left to whoever reads it."""
    if searched := schedules_for(Path(folder)):
        return searched[0] if searched[0] in FORECASTERS else "predictor"
    try:
        made_as = json.loads((Path(folder) / CONFIG_FILE).read_bytes())["format"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return "predictor"
    kind = str(made_as).partition("/")[0]
    return kind if kind in FORECASTERS else "predictor"


def predictor_hashes(predictor: str | None) -> dict[str, str]:
    """SHA-256 of the files that decide what a predictor's folder, a released file or a shipped one's name answers;
    nothing for one that has no files."""
    if predictor is None or predictor in attachable():
        return {}
    folder = local_path(predictor)
    if folder.is_file():
        return {f"predictor/{folder.name}": sha256_file(folder)}
    names = (CONFIG_FILE,) if kind_of(folder) == "multistep" else (WEIGHTS_FILE, SCALARS_FILE)
    return {f"predictor/{name}": sha256_file(folder / name) for name in names if (folder / name).exists()}


@dataclass(frozen=True)
class NetworkConfig:
    """What config.json holds."""

    family: str
    """Name of the family's record."""
    width: int
    """D of the tokens."""
    blocks: int
    """Transformer blocks."""
    cached: tuple[str, ...]
    """Which tokens it takes from the cache and gives back."""
    transformer: dict[str, Any]
    """Config of the transformer it was made for, from which its blocks are built."""
    history: int = 1
    """Full steps that it looks back on."""
    steps: int | None = None
    """Steps of the grid that it was trained for."""
    shift: float | None = None
    """Shift that makes that grid, if one does."""
    times: tuple[float, ...] | None = None
    """Its times [steps + 1]; where only steps and shift are said, those that follow."""
    student: str | None = None
    """`student_hash` of the model it was trained for."""
    architecture: str = CORRECTION
    """Of ARCHITECTURES; files that do not say it are older than the other one."""
    boundary: float | None = None
    """Time below which the second of the two transformers takes over that it has a network for each of; None: one."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "cached", tuple(self.cached))
        grid = Grid.recorded(self.steps, self.shift, self.times)
        object.__setattr__(self, "times", grid and grid.times)
        object.__setattr__(self, "transformer", json.loads(json.dumps(self.transformer)))  # tuples become lists
        if self.family not in FAMILIES:
            raise UserError(f"the predictor is for the family {self.family!r}", f"known are {', '.join(FAMILIES)}")
        if self.architecture not in ARCHITECTURES:
            raise UserError(
                f"the predictor is a network of the kind {self.architecture!r}",
                f"this vidaccel knows {' and '.join(ARCHITECTURES)}",
            )
        if self.architecture == PUBLISHED and self.history != 1:
            raise UserError(
                f"the published predictor looks back on one full step, not {self.history}", "set history to 1"
            )

    @property
    def grid(self) -> Grid | None:
        """The grid that it was trained for; None if that is not known."""
        return Grid.recorded(self.steps, self.shift, self.times)


def of_another(
    what: str, made_for: str, folder: Path | None, known: Set[str] | None, called: str | None, hint: str
) -> UserError:
    """That something serves one model and is not for this one, by the names of both, as far as they are known.

    Args:
        what: and what was done with it, such as "the predictor was trained for".
        made_for: `student_hash` of the model that it serves.
        folder: that it was read from, whose run.json names that model.
        known: `student_hashes` of the other one; None if its weight files are not known.
        called: the other one's folder or hub id.
        hint: what to do.
    """
    run_file = (folder or Path()) / RUN_FILE
    run = read_json(run_file, "copy the folder again") if folder and run_file.is_file() else {}
    name = run.get("config", {}).get("student")
    its = f"{name} ({made_for[:12]})" if name else made_for[:12]
    if known is None:
        return UserError(f"{what} {its}, and this is {called or 'one'}, whose weight files are not known", hint)
    if name and called and Path(name).absolute() == Path(called).absolute():
        return UserError(f"{what} {its} as it was then: its weights are others now", hint)
    found = f"{what} {its}, and this is {called or 'another'}"
    return UserError(found, f"take model={name}, or {hint}" if name else hint)


class Checkpointed:
    """What a module with a `NetworkConfig` in `config` inherits to be saved and loaded."""

    config: NetworkConfig
    folder: Path | None = None
    """That it was loaded from."""

    def save_pretrained(self, folder: str | Path) -> None:
        """Write config.json and model.safetensors; run.json is for the command that made the folder."""
        folder = Path(folder)
        with atomic_path(folder / WEIGHTS_FILE) as temporary:
            # Not save_model, which refuses weights that are parts of one in a mapped file.
            save_file({name: weight.contiguous() for name, weight in self.state_dict().items()}, str(temporary))
        content = {
            name: value for name, value in asdict(self.config).items() if name != "boundary" or value is not None
        }
        write_json(folder / CONFIG_FILE, content)

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Self:
        """The saved module in eval mode; `UserError`, naming the folder, unless all of it is there and whole."""
        folder = Path(folder)
        if (folder / RUN_FILE).exists():
            verify_files(folder, read_run(folder, FORMAT))
        try:
            module = cls(NetworkConfig(**json.loads((folder / CONFIG_FILE).read_bytes())))
            load_model(module, folder / WEIGHTS_FILE)
        except (OSError, ValueError, TypeError, KeyError, AttributeError, RuntimeError, SafetensorError) as error:
            refuse_unfinished(folder)
            raise UserError(
                f"{folder} is no predictor: {' '.join(str(error).split())}",
                "give the path of a finished `vidaccel train-predictor` folder",
            ) from error
        module.folder = folder
        return module.eval()

    def check_fits(
        self,
        transformer: nn.Module,
        family: DiTFamily,
        student: str | Set[str] | None = None,
        force: bool = False,
        called: str | None = None,
    ) -> None:
        """`UserError` unless it was made for this transformer.

        Args:
            transformer: whose trunk it is to stand in for.
            family: its record.
            student: its `student_hash`, or all of its `student_hashes`; None is one that is not known.
            force: take another student than it was trained for. Another family or width cannot be forced.
            called: folder or hub id of this one, for the message.
        """
        made, own = self.config, width(transformer)
        if (made.family, made.width) != (family.name, own):
            raise UserError(
                f"the predictor is for {made.family} of width {made.width}, and this is {family.name} of width {own}",
                "take the predictor that was trained for this model",
            )
        known = {student} if isinstance(student, str) else student or set()
        if made.student is not None and made.student not in known and not force:
            hint = "train one for this model, or see what it does with force=true"
            trained = "the predictor was trained for the student"
            raise of_another(trained, made.student, self.folder, None if student is None else known, called, hint)
