"""The models of a study: each distilled for a set time in a working folder, then sampled and scored.

    work/step_seconds.json    what a step of each kind of training takes, measured once: all R get equally many steps
    work/<model>/             the model folder, with its metrics; checkpoints only while it is trained
    work/samples/<id>/        scores and final latents of one row

P prompts, C channels, T frames, H and W latent pixels
"""

import json
import logging
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from studies.distill.cost import median_step_seconds
from vidaccel.artefacts import CHECKPOINTS, RUN_FILE, atomic_path, write_json
from vidaccel.config.distill import DistillConfig
from vidaccel.config.generate import GenerateConfig
from vidaccel.models.loading import LoadedPipeline
from vidaccel.train.distill import distill
from vidaccel.train.metrics import FILE as METRICS
from vidaccel.worlds.sprites.score_model import score_model

log = logging.getLogger("vidaccel.studies")
STEP_SECONDS = "step_seconds.json"
RECORDED = {"steps": "step", "seconds": "seconds", "skipped": "skipped", "loss": "loss", "evaluation": "evaluation"}
"""Of a training: name in a row -> name in metrics.jsonl."""


def train_for(minutes: float, config: DistillConfig, folder: Path, kind: str) -> None:
    """Distil into `folder` for about as long, unless that is done; a run that was killed goes on.

    All of it goes into steps: the loss is evaluated and videos are sampled at the end, when the clock has stopped.
    """
    if (folder / RUN_FILE).exists():
        return
    seconds = step_seconds(folder.parent / STEP_SECONDS, kind, config)
    steps = steps_in(minutes, seconds)
    log.info("%s: %d steps of %.3g s", folder.name, steps, seconds)
    train = replace(config.train, steps=steps, evaluate_every=steps, sample_every=steps)
    distill(replace(config, train=train), folder, device="cpu")
    shutil.rmtree(folder / CHECKPOINTS)


def step_seconds(file: Path, kind: str, config: DistillConfig) -> float:
    """What a step of this kind of training took when it was first asked for."""
    known = json.loads(file.read_text()) if file.exists() else {}
    if kind not in known:
        known[kind] = median_step_seconds(config)
        write_json(file, known)
    return known[kind]


def steps_in(minutes: float, seconds: float) -> int:
    """Steps of so many seconds that take `minutes`, at least one."""
    return max(1, round(60 * minutes / seconds))


def training(folder: Path, kind: str) -> dict[str, Any] | None:
    """What the training in `folder` took and ended in; None if it failed before its first line of metrics."""
    file = folder / METRICS
    if not file.exists():
        return None
    last = json.loads(file.read_text().splitlines()[-1])
    expected = json.loads((folder.parent / STEP_SECONDS).read_text())[kind]
    return {name: last.get(key) for name, key in RECORDED.items()} | {"expected_step_seconds": expected}


def sampled(loaded: LoadedPipeline, steps: int, prompts: int, folder: Path) -> tuple[dict[str, Any], Tensor]:
    """Scores of held-out prompts, as `score_model` sums them up, and final latents [P, C, T, H, W]; made only once."""
    file, kept = folder / "latents.safetensors", []
    if not file.exists():
        shutil.rmtree(folder, ignore_errors=True)  # scores that a killed run left, whose latents are lost

    def keep(pipe: object, index: int, timestep: Tensor, tensors: dict[str, Tensor]) -> dict:
        if index == steps - 1:
            kept.append(tensors["latents"].float().cpu())
        return {}

    watched = replace(loaded, call=loaded.call | {"callback_on_step_end": keep})
    scores = score_model(watched, GenerateConfig(model=loaded.source, steps=steps), prompts, folder)
    if kept:
        with atomic_path(file) as temporary:
            save_file({"latents": torch.cat(kept)}, temporary)
    return scores, load_file(file)["latents"]


def relative_errors(latents: Tensor, reference: Tensor) -> list[float]:
    """|x - x_ref| / |x_ref| of each of P latents."""
    return ((latents - reference).flatten(1).norm(dim=1) / reference.flatten(1).norm(dim=1)).tolist()
