"""A model scored on held-out prompts of the sprites world, resumable: marks.jsonl, a line a prompt, and score.json."""

import json
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vidaccel.artefacts import differences, read_json, write_json
from vidaccel.config import loader as configuration
from vidaccel.config.generate import GenerateConfig
from vidaccel.errors import UserError
from vidaccel.forecasters.checkpoint import predictor_hashes
from vidaccel.models.loading import LoadedPipeline
from vidaccel.progress import Progress
from vidaccel.sampling import generate, predicted_steps
from vidaccel.train.checkpoints import flat
from vidaccel.worlds.sprites.captions import caption
from vidaccel.worlds.sprites.parse import parse
from vidaccel.worlds.sprites.score import score_clip, summarise
from vidaccel.worlds.sprites.world import random_scene

SCORE_BATCH = 8


def score_model(
    loaded: LoadedPipeline, config: GenerateConfig, prompts: int, folder: Path
) -> dict[str, dict[str, float]]:
    """Score the model on held-out prompts, half of one sprite, half of two, with the predictor that `config` names.

    A killed run goes on where it was. `folder` gets marks.jsonl, a line a prompt, and score.json, the averages with
    their intervals.

    Raises:
        UserError: it holds scores of other settings, which stay as they are, or the settings cannot be followed.
    """
    settings = {
        "prompts": prompts,
        "config": configuration.to_dict(config),
        "hashes": {**loaded.hashes, **predictor_hashes(config.predictor)},
    }
    rng = random.Random("held out")
    texts = [caption(random_scene(rng, "held_out", pair_share=i % 2), rng) for i in range(prompts)]
    with predicted_steps(loaded, config) as attachment:
        lines_file = _begin(folder, settings)
        lines = [json.loads(line) for line in lines_file.read_text().splitlines()]
        with Progress("scoring", total=prompts, done=len(lines)) as bar, lines_file.open("a") as file:
            for first in range(len(lines), prompts, SCORE_BATCH):
                batch = range(first, min(first + SCORE_BATCH, prompts))
                seeds = [config.seed + i for i in batch]
                made = generate(loaded, [texts[i] for i in batch], config, seeds, attachment)
                for i, frames in zip(batch, made.frames, strict=True):
                    lines.append(
                        {"prompt": texts[i], "seed": config.seed + i, "marks": score_clip(frames, parse(texts[i]))}
                    )
                    file.write(json.dumps(lines[-1]) + "\n")
                    bar.advance()
                file.flush()
    summary = summarise([line["marks"] for line in lines])
    write_json(folder / "score.json", summary)
    return summary


def _begin(folder: Path, settings: dict) -> Path:
    """The file of scores so far, cut after its last whole batch; `UserError` if they are of other settings."""
    record, scores = folder / "settings.json", folder / "marks.jsonl"
    if scores.exists() and scores.stat().st_size:
        begun = read_json(record, f"remove {scores} to score anew") if record.exists() else {}
        if not any(name.startswith("predictor/") for name in begun.get("hashes", {})):  # of an earlier version
            settings = settings | {"hashes": {k: v for k, v in settings["hashes"].items() if "predictor/" not in k}}
        if changed := differences(_compared(begun), _compared(settings)):
            raise UserError(
                f"{folder} holds scores of other settings ({'; '.join(changed)})",
                f"give another folder with -o, or remove {scores} to score anew",
            )
    else:
        folder.mkdir(parents=True, exist_ok=True)
        scores.write_text("")
        write_json(record, settings)
    whole = scores.read_text().split("\n")[:-1]
    kept = whole[: len(whole) // SCORE_BATCH * SCORE_BATCH]
    scores.write_text("".join(line + "\n" for line in kept))
    return scores


def _compared(settings: Mapping[str, Any]) -> dict[str, Any]:
    """What tells scores from those of other settings: any that an earlier version did not know are at their defaults.

    Where there are hashes, they say which model it is, wherever it lies.
    """
    config = configuration.with_current_names(settings.get("config", {}), GenerateConfig)
    config = configuration.to_dict(GenerateConfig()) | config
    if settings.get("hashes"):
        config.pop("model")
    return flat({**settings, "config": config})
