"""A distilled student on disk: a model folder that `load_pipeline` and `vidaccel generate` take as any other.

    model_index.json, vae/, ...   the teacher's, byte for byte; the index has a transformer that diffusers alone refuses
    transformer/                  the student's weights
    conditioning/                 embeddings of r and g
    scheduler/                    flow-match Euler with the student's shift
    README.md                     its card: what it is, how to call it
    run.json                      how to call it ("call"), and from whom it comes ("parents")

An adapter is saved in lora/ in place of the first two lines, and run.json names the "pipeline" it belongs to. A student
is built beside its place and put there whole; what else lies there, such as checkpoints, stays.
"""

import shutil
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor, nn

from vidaccel import students
from vidaccel.artefacts import (
    RUN_FILE,
    atomic_folder,
    explained,
    is_finished,
    read_run,
    say_finished,
    sha256_file,
    write_json,
    write_run,
)
from vidaccel.compat.diffusers import built_with, float32_modules
from vidaccel.errors import UserError
from vidaccel.families.walk import denoisers_of
from vidaccel.models.cards import README, student_card
from vidaccel.models.conditioning import Conditioning
from vidaccel.models.files import read_model
from vidaccel.models.folder import FORMAT, STUDENT_PARTS, conditioning_name, read_json
from vidaccel.models.grid import fixed_shift
from vidaccel.models.lineage import root_of
from vidaccel.models.loading import LoadedPipeline
from vidaccel.worlds import shipped_models

INDEX_FILE = "model_index.json"
SCHEDULER = FlowMatchEulerDiscreteScheduler


def save_student(
    folder: str | Path,
    teacher: LoadedPipeline,
    transformer: nn.Module,
    conditioning: Conditioning | None,
    *,
    steps: int,
    guidance: float,
    shift: float,
    command: str,
    config: Mapping[str, Any],
    seed: int,
    started: datetime,
    parents: Mapping[str, str] | None = None,
    documents: Mapping[str, str] | None = None,
    measured: str | None = None,
    dtype: torch.dtype = torch.float16,
) -> None:
    """Write the student, in place of any model that `folder` holds.

    Args:
        folder: the model folder; other files in it are let be.
        teacher: what it was distilled from, which gives every other component as it lies on disk.
        transformer: its weights; one that carries a peft adapter is saved as the adapter alone.
        conditioning: its embeddings of r and g, None where the transformer has its own; stored as they are.
        steps: denoising steps it is made for.
        guidance: CFG scale it is sampled with unless told.
        shift: of its step grid.
        command: with `config`, `seed`, `started` and `parents` (the teacher is added) for run.json, see `write_run`.
        documents: further text files, name -> text; README.md takes the place of the card.
        measured: rows of numbers for the card, how far it has learnt what it was taught.
        dtype: of the stored weights, save those that the class keeps in float32.

    Raises:
        UserError: the place holds something else or cannot be written, or a weight is not finite in `dtype`.
    """
    folder = Path(folder)
    old = _old_parts(folder)
    for left in folder.glob(".draft.*"):  # by a killed run
        shutil.rmtree(left)
    adapter = bool(getattr(transformer, "peft_config", None))
    with atomic_folder(folder / "draft") as draft:
        extra = _write_adapter(draft, teacher, transformer) if adapter else {}
        if not adapter:
            _write_pipeline(draft, teacher, transformer, dtype)
        if conditioning is not None:
            conditioning.save_pretrained(draft / conditioning_name(teacher.family.denoisers[0].attribute))
        scheduler = SCHEDULER(shift=shift, invert_sigmas=teacher.family.rises)
        scheduler.save_pretrained(draft / "scheduler")
        kept = {name: value for name, value in teacher.call.items() if name not in ("timesteps", "sigmas")}
        call = kept | {"steps": steps, "shift": shift, "two_pass": False} | _scales(teacher, guidance)
        source = str(config.get("teacher", teacher.source))
        card = student_card(
            teacher.family,
            source,
            root_of(source),
            conditioning,
            command=command,
            config=config,
            call=call,
            adapter=adapter,
            measured=measured,
            undistilled=_undistilled(draft, teacher),
        )
        for name, text in ({README: card} | dict(documents or {})).items():
            (draft / name).write_text(text, encoding="utf-8")
        write_run(
            draft,
            format=FORMAT,
            command=command,
            config=config,
            seed=seed,
            started=started,
            parents=_parents(teacher, adapter) | dict(parents or {}),
            call=call,
            **extra,
        )
    if _same(folder, folder / "draft"):
        say_finished(folder)
        shutil.rmtree(folder / "draft")  # an adapter knows its pipeline by its run.json, whose times would be others
    else:
        _put_in_place(folder / "draft", folder, old)


def save_model(folder: str | Path, loaded: LoadedPipeline) -> None:
    """Write a student that was loaded from a released file as a model folder, in place of any model that is there.

    Raises:
        UserError: the pipeline holds none, or nobody knows the model that the file was given with.
    """
    transformer: Any = denoisers_of(loaded.pipe, loaded.family)[0]
    if loaded.hook is None or loaded.released is None:
        raise UserError(
            f"this {type(loaded.pipe).__name__} holds no student of a released file",
            "give what vidaccel.load_student gave, or load_pipeline(model, student=FILE)",
        )
    save_student(
        folder,
        loaded,
        transformer,
        loaded.conditioning,
        steps=loaded.default("steps"),
        guidance=loaded.default("guidance"),
        shift=fixed_shift(loaded.pipe.scheduler, loaded.family),
        command="vidaccel.load_student",
        config={"teacher": loaded.source, "student": str(loaded.released)},
        seed=0,
        started=datetime.now(UTC),
        parents={"student": sha256_file(loaded.released)},
        dtype=transformer.dtype,
    )


def _undistilled(draft: Path, teacher: LoadedPipeline) -> str | None:
    """The one of two transformers that has no embeddings in `draft`, a student of the other."""
    if teacher.family.defaults.guidance_2 is None:
        return None
    names = [denoiser.attribute for denoiser in read_model(teacher.source).contents.family.denoisers]
    return next((name for name in names if not (draft / conditioning_name(name)).exists()), None)


def _scales(teacher: LoadedPipeline, guidance: float) -> dict[str, float]:
    """How the call says the student's scale of guidance: of a student of one of two denoisers, beside the other's."""
    if teacher.family.defaults.guidance_2 is None:
        return {"guidance": guidance}
    files, own = read_model(teacher.source), teacher.family.denoisers[0].attribute
    first = files.default("guidance")
    second = first if "guidance" in files.call and "guidance_2" not in files.call else files.default("guidance_2")
    if own == files.contents.family.denoisers[0].attribute:
        return {"guidance": guidance, "guidance_2": second}
    return {"guidance": first, "guidance_2": guidance}


def _write_pipeline(draft: Path, teacher: LoadedPipeline, transformer: nn.Module, dtype: torch.dtype) -> None:
    contents = read_model(teacher.source).contents
    own = teacher.family.denoisers[0].attribute
    for name, component in contents.components.items():
        if name not in (own, "scheduler"):
            shutil.copytree(component.folder, draft / name)
    for name, part in contents.conditionings.items():
        if name != own:
            shutil.copytree(part, draft / part.name)
    index = {key: value for key, value in read_json(contents.path / INDEX_FILE).items() if key != "_name_or_path"}
    parts = {"scheduler": ["diffusers", SCHEDULER.__name__], own: [students.MODULE, teacher.family.transformer]}
    write_json(draft / INDEX_FILE, index | parts)
    _save_transformer(transformer, draft / own, dtype)


def _save_transformer(transformer: nn.Module, folder: Path, dtype: torch.dtype) -> None:
    """In diffusers' layout, from an empty double: the trained module may carry hooks, and is needed as it is."""
    with torch.device("meta"):
        double = type(transformer).from_config(built_with(cast(Any, transformer).config))
    double.load_state_dict(_stored(transformer, dtype), assign=True)
    double.save_pretrained(folder)


def _stored(transformer: nn.Module, dtype: torch.dtype) -> dict[str, Tensor]:
    kept = float32_modules(transformer)
    weights = {}
    for name, tensor in transformer.state_dict().items():
        weights[name] = tensor.detach().to("cpu", torch.float32 if kept & set(name.split(".")) else dtype)
        if not weights[name].isfinite().all():
            finite = tensor.isfinite().all()
            hint = "save it in bfloat16 or float32" if finite else "the training diverged: go back to a checkpoint"
            raise UserError(f"the transformer's {name} is not finite in {dtype}", hint)
    return weights


def _write_adapter(draft: Path, teacher: LoadedPipeline, transformer: nn.Module) -> dict[str, str]:
    """The adapter's file; what run.json says about the pipeline it belongs to."""
    source = Path(teacher.source)
    if source.is_dir() and not (source / INDEX_FILE).exists():
        raise UserError(
            f"an adapter belongs to a pipeline folder, and {source} is none", "save the student with its adapter merged"
        )
    (adapter,) = transformer.peft_config
    transformer.save_lora_adapter(draft / "lora", adapter_name=adapter)
    for name, shipped in shipped_models().items():
        if source == shipped:
            return {"pipeline": name}
    return {"pipeline": str(source.resolve()) if source.is_dir() else teacher.source}


def _parents(teacher: LoadedPipeline, adapter: bool) -> dict[str, str]:
    """SHA-256 of the teacher's run.json, which an adapter's pipeline has to go on having."""
    run = Path(teacher.source) / RUN_FILE
    if not run.exists():
        return {}
    return {role: sha256_file(run) for role in ("teacher", *(["pipeline"] if adapter else []))}


def _same(folder: Path, draft: Path) -> bool:
    """Whether `folder` holds that student already, whole."""
    if not is_finished(folder, FORMAT):
        return False
    there, new = (read_run(place, FORMAT) for place in (folder, draft))
    times = {name: new[name] for name in ("started", "finished")}
    return there | times == new


def _old_parts(folder: Path) -> set[str]:
    """What the model in `folder` consists of; `UserError` if what was finished there is no model."""
    files = read_run(folder, FORMAT)["files"] if (folder / RUN_FILE).exists() else ()
    return {Path(name).parts[0] for name in files} | {RUN_FILE, INDEX_FILE, *STUDENT_PARTS}


def _put_in_place(draft: Path, folder: Path, old: set[str]) -> None:
    """Move what `draft` holds up into `folder`.

    run.json and the index leave first and come last, so that a kill in between leaves nothing that loads.
    """
    new = {part.name for part in draft.iterdir()}
    last = [name for name in (INDEX_FILE, RUN_FILE) if name in new]
    with explained(folder):
        for name in (RUN_FILE, INDEX_FILE, *(old | new)):
            _remove(folder / name)
        for name in (*(new - set(last)), *last):
            (draft / name).rename(folder / name)
        draft.rmdir()


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
