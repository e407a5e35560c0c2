"""Students of tiny pipelines, made of random weights by the function that saves real ones."""

import json
from datetime import UTC, datetime
from pathlib import Path

import pytest
import torch

from tests.tiny import CALLS, SIZE, tiny_pipeline
from vidaccel.artefacts import RUN_FILE, sha256_file, write_run
from vidaccel.errors import UserError
from vidaccel.families.registry import FAMILIES
from vidaccel.models.conditioning import Conditioning, new_conditioning
from vidaccel.models.loading import LoadedPipeline, load_pipeline
from vidaccel.models.saving import save_student

STARTED = datetime(2000, 1, 1, tzinfo=UTC)


def save_teacher(folder: Path, family: str, **options: bool) -> Path:
    """A tiny pipeline folder that says how it is called: 32 x 32 pixels, 5 frames, 6 steps, guidance 3; 3 steps
    and no guidance of one that is a student."""
    tiny_pipeline(family, **options).save_pretrained(folder)
    steps = {"steps": 3, "guidance": 1.0} if FAMILIES[family].embeds_r else {"steps": 6, "guidance": 3.0}
    call = SIZE | CALLS.get(family, {}) | {"fps": 8} | steps
    write_run(folder, format="model/1", command="test", config={}, seed=0, started=STARTED, call=call)
    return folder


def trained(loaded: LoadedPipeline, embeds: tuple[str, ...] = ("r", "g"), **config: object) -> Conditioning:
    """Embeddings that matter, the same each time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        conditioning = new_conditioning(loaded.pipe.transformer, loaded.family, embeds, **config)
        for embedder in conditioning.embedders.values():
            torch.nn.init.normal_(embedder.linear_2.weight, std=0.1)
    return conditioning


def save(folder: Path, loaded: LoadedPipeline, conditioning: Conditioning | None, **changes: object) -> Path:
    """A student with its teacher's transformer, for 4 steps of shift 2 with guidance 4."""
    settings = {"transformer": loaded.pipe.transformer, "steps": 4, "guidance": 4.0, "shift": 2.0, "command": "test"}
    settings |= {"config": {}, "seed": 0, "started": STARTED} | changes
    save_student(folder, loaded, conditioning=conditioning, **settings)
    return folder


def student(folder: Path, family: str, embeds: tuple[str, ...] = ("r", "g"), **options: bool) -> Path:
    """A whole student in `folder`/student, its teacher in `folder`/teacher."""
    loaded = load_pipeline(save_teacher(folder / "teacher", family, **options))
    return save(folder / "student", loaded, trained(loaded, embeds) if embeds else None)


def for_diffusers(folder: Path) -> Path:
    """A student's folder as vidaccel wrote them once, which diffusers loads without its conditioning."""
    index = json.loads((folder / "model_index.json").read_text())
    index["transformer"][0] = "diffusers"
    (folder / "model_index.json").write_text(json.dumps(index))
    vouch(folder)
    return folder


def contents(folder: Path) -> dict[str, str]:
    """SHA-256 of every file, by its name relative to the folder."""
    return {str(path.relative_to(folder)): sha256_file(path) for path in folder.rglob("*") if path.is_file()}


def vouch(folder: Path) -> None:
    """run.json made to describe the files as they are."""
    run = json.loads((folder / RUN_FILE).read_text())
    run["files"] = {name: digest for name, digest in contents(folder).items() if name != RUN_FILE}
    (folder / RUN_FILE).write_text(json.dumps(run))


def refused(folder: Path) -> UserError:
    """The error that loading ends in, after checking that it is one line with a hint."""
    with pytest.raises(UserError) as caught:
        load_pipeline(folder)
    assert "\n" not in caught.value.message and caught.value.hint
    return caught.value
