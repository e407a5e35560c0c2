"""A model scored on held-out prompts of the sprites world: marks.jsonl, a line a prompt, and score.json.

Prompts are scored in batches, of which each process does a share into files of their own, marks/00000008.jsonl, that
become marks.jsonl when all are there: a run that was stopped is gone on with by any number of processes.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from shutil import rmtree
from typing import Any

from vidaccel.artefacts import atomic_path, differences, read_json, write_json
from vidaccel.config import loader as configuration
from vidaccel.config.generate import GenerateConfig
from vidaccel.errors import UserError
from vidaccel.forecasters.checkpoint import predictor_hashes
from vidaccel.models.loading import LoadedPipeline
from vidaccel.processes import on_first, sharing
from vidaccel.ranks import share
from vidaccel.sampling import generate, predicted_steps, warn_of_unknown_words
from vidaccel.train.checkpoints import flat
from vidaccel.worlds.sprites.parse import parse
from vidaccel.worlds.sprites.score import score_clip, summarise
from vidaccel.worlds.sprites.scoring import SpritesScorer

SCORE_BATCH = 8


def score_model(
    loaded: LoadedPipeline, config: GenerateConfig, prompts: int, folder: Path, lamps: bool = False
) -> dict[str, dict[str, float]]:
    """Score the model on held-out prompts, half of one sprite, half of two, with the predictor that `config` names; on
    those with lamps if asked for.

    A killed run goes on where it was. Every process returns the averages. `folder` gets marks.jsonl, a line a prompt,
    and score.json, the averages with their intervals.

    Raises:
        UserError: it holds scores of other settings, which stay as they are, or the settings cannot be followed.
    """
    settings = {
        "prompts": prompts,
        "config": configuration.to_dict(config),
        "hashes": {
            **loaded.hashes,
            **predictor_hashes(config.predictor),
            **(loaded.decoder.hashes if loaded.decoder else {}),
        },
    } | ({"lamps": True} if lamps else {})
    texts = SpritesScorer(lamps).held_out_prompts(prompts)
    warn_of_unknown_words(loaded, " ".join(texts))
    with predicted_steps(loaded, config) as attachment:
        todo = on_first(lambda: _begin(folder, settings))
        with sharing("scoring", total=prompts, done=prompts - sum(map(len, todo))) as advance:
            for batch in share().of(todo):
                seeds = [config.seed + i for i in batch]
                made = generate(loaded, [texts[i] for i in batch], config, seeds, attachment)
                lines = []
                for i, frames in zip(batch, made.frames, strict=True):
                    marks = score_clip(frames, parse(texts[i]))
                    lines.append(json.dumps({"prompt": texts[i], "seed": config.seed + i, "marks": marks}) + "\n")
                    advance()
                with atomic_path(_part(folder, batch)) as file:
                    file.write_text("".join(lines))
    return on_first(lambda: _finish(folder, prompts))


def _batches(prompts: int) -> list[range]:
    return [range(first, min(first + SCORE_BATCH, prompts)) for first in range(0, prompts, SCORE_BATCH)]


def _part(folder: Path, batch: range) -> Path:
    return folder / "marks" / f"{batch.start:08d}.jsonl"


def _begin(folder: Path, settings: dict) -> list[range]:
    """The batches that have no scores yet; `UserError` if those that are there are of other settings."""
    record, scores = folder / "settings.json", folder / "marks.jsonl"
    batches = _batches(settings["prompts"])
    begun = scores.exists() and scores.stat().st_size or any((folder / "marks").glob("*.jsonl"))
    if begun:
        known = read_json(record, f"remove {scores} to score anew") if record.exists() else {}
        if not any(name.startswith("predictor/") for name in known.get("hashes", {})):  # of an earlier version
            settings = settings | {"hashes": {k: v for k, v in settings["hashes"].items() if "predictor/" not in k}}
        if changed := differences(_compared(known), _compared(settings)):
            raise UserError(
                f"{folder} holds scores of other settings ({'; '.join(changed)})",
                f"give another folder with -o, or remove {scores} to score anew",
            )
    else:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(record, settings)
    lines = scores.read_text().splitlines(keepends=True) if scores.exists() else []
    for batch in batches:
        own = lines[batch.start : batch.stop]
        if len(own) == len(batch) and own[-1].endswith("\n") and not _part(folder, batch).exists():
            with atomic_path(_part(folder, batch)) as file:
                file.write_text("".join(own))
    scores.unlink(missing_ok=True)
    return [batch for batch in batches if not _part(folder, batch).exists()]


def _finish(folder: Path, prompts: int) -> dict[str, dict[str, float]]:
    """All batches in marks.jsonl, and their averages, with intervals over meanings."""
    lines = "".join(_part(folder, batch).read_text() for batch in _batches(prompts))
    with atomic_path(folder / "marks.jsonl") as file:
        file.write_text(lines)
    rmtree(folder / "marks")
    scored, meaning = [json.loads(line) for line in lines.splitlines()], SpritesScorer().meaning
    summary = summarise([each["marks"] for each in scored], [meaning(each["prompt"]) for each in scored])
    write_json(folder / "score.json", summary)
    return summary


def _compared(settings: Mapping[str, Any]) -> dict[str, Any]:
    """What tells scores from those of other settings: any that an earlier version did not know are at their defaults.

    Where there are hashes, they say which model it is, wherever it lies.
    """
    config = configuration.with_current_names(settings.get("config", {}), GenerateConfig)
    config = configuration.to_dict(GenerateConfig()) | config
    if settings.get("hashes"):
        config.pop("model")
    return flat({**settings, "config": config})
