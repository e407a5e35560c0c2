"""The JSON of a study and its table: rows are added as they finish, and none is measured twice.

    {"format": "distill/1", "commands": [...], "made_of": {...}, "cfg_model": sha256, "cost": {...}, "rows": [...]}

`made_of` is what all rows share: hashes of teacher and features, minutes, prompts, the settings of both distillations.
`cost` is null, or what cost.py measures. A row has

    id, model         model: teacher, cfg, derivative or rollout
    restrict, seed    of its training
    steps, passes     of its sampler
    trained           steps and seconds it took, expected seconds a step, skipped steps, last loss, evaluation
    scores            of the sprites world in percent, each with a mean and a 95 % interval over prompts
    latent_error      |x - x_ref| / |x_ref| of final latents, mean and interval; x_ref is the teacher's after 50 steps
                      of two passes from the same noise
    settings          of its training, but for `trained`'s steps
    environment       what it was measured on
    error             why its training failed, or null

No place on a machine is in it.
"""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from studies.distill.table import markdown
from vidaccel.artefacts import atomic_path, check_writable, write_json
from vidaccel.bench.environment import environment
from vidaccel.errors import UserError
from vidaccel.models.folder import read_json
from vidaccel.train.checkpoints import flat

FORMAT = "distill/1"


class Results:
    """The results file at `path`; its table stands beside it, as .md."""

    def __init__(self, path: Path, made_of: dict[str, Any], command: str):
        """Raises `UserError` if the file holds rows that were made of something else, or cannot be written."""
        check_writable(path)
        self.path = path
        # Before anything is written: the file itself may be tracked, and would make its own commit a dirty one.
        self.environment = environment("cpu")
        if path.exists():
            self.document = read_json(path)
            _refuse_others(path, self.document, made_of)
        else:
            self.document = {"format": FORMAT, "commands": [], "made_of": made_of, "cfg_model": None, "cost": None}
            self.document["rows"] = []
        self.made_of = made_of
        self._ids = {row["id"] for row in self.document["rows"]}
        if command not in self.document["commands"]:
            self.document["commands"].append(command)

    def missing(self, ids: Iterable[str]) -> list[str]:
        """Those of the ids that have no row."""
        return [id for id in ids if id not in self._ids]

    def add(self, id: str, **fields: Any) -> None:
        """A finished row, written at once."""
        self.document["rows"].append({"id": id} | fields | {"environment": self.environment})
        self._ids.add(id)
        self.write()

    def set_cost(self, cost: dict[str, Any]) -> None:
        """What a training step costs, written at once."""
        self.document["cost"] = cost | {"environment": self.environment}
        self.write()

    def bind(self, cfg_model: str) -> None:
        """Refuse students of another CFG-distilled model than the one that the rows so far belong to.

        A working folder that was lost is trained again, for the same time, and so to another model.
        """
        known = self.document["cfg_model"]
        if known not in (None, cfg_model):
            raise UserError(
                f"{self.path} has rows of another CFG-distilled model ({known[:12]}) than --work ({cfg_model[:12]})",
                "bring its working folder back, or give another -o",
            )
        self.document["cfg_model"] = cfg_model

    def write(self) -> None:
        write_json(self.path, self.document)
        with atomic_path(self.path.with_suffix(".md")) as temporary:
            temporary.write_text(markdown(self.document), encoding="utf-8")


def digest(data: Any) -> str:
    """SHA-256 of what JSON can hold."""
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()


def _refuse_others(path: Path, document: dict[str, Any], made_of: dict[str, Any]) -> None:
    if document.get("format") != FORMAT:
        raise UserError(f"{path} is of format {document.get('format')}, where {FORMAT} is needed", "give another -o")
    old, new = flat(document["made_of"]), flat(made_of)
    others = [name for name in sorted(old.keys() | new.keys()) if old.get(name) != new.get(name)]
    if others:
        differences = ", ".join(f"{name} was {_short(old.get(name))}, now {_short(new.get(name))}" for name in others)
        raise UserError(f"{path} holds rows of another study: {differences}", "give another -o, or the old settings")


def _short(value: Any) -> str:
    """Enough of a hash to tell it from another."""
    return value[:12] if isinstance(value, str) else str(value)
