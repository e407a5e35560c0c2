"""The model cards that stand beside the shipped weights: how they were made and how they scored, as measured."""

import json
import os
import platform
from pathlib import Path
from typing import Any

import torch

from vidaccel.config.loader import to_yaml
from vidaccel.worlds.sprites.settings import SpritesConfig

TITLES = {
    "text": "text encoders",
    "autoencoder/images": "autoencoder on images",
    "autoencoder/clips": "autoencoder on clips",
    "autoencoder/decoder": "decoder",
    "teacher/shallow": "transformer, shallow",
    "teacher/deep": "transformer, full depth",
}
STAGES_FILE = "stages.json"


def trained_stages(runs: Path, start: Path | None) -> list[dict]:
    """Every stage behind the model in `runs`, in order: those of the model it started from, then its own.

    A shallow transformer is always a new one, which owes nothing to the one before.
    """
    before = start / STAGES_FILE if start else None
    stages = json.loads(before.read_text()) if before and before.exists() else []
    if (runs / "teacher/shallow/metrics.jsonl").exists():
        stages = [stage for stage in stages if not stage["stage"].startswith("transformer")]
    for stage, title in TITLES.items():
        if (metrics := runs / stage / "metrics.jsonl").exists():
            stages.append(trained_stage(title, metrics))
    return stages


def trained_stage(title: str, metrics: Path) -> dict[str, Any]:
    """How long a training took and where it ended, by its metrics.jsonl."""
    last = json.loads(metrics.read_text().splitlines()[-1])
    return {"stage": title} | {key: last[key] for key in ("step", "seconds", "loss", "skipped")}


def model_card(config: SpritesConfig, stages: list[dict], score: dict[str, dict[str, float]]) -> str:
    """Markdown for the model that went through `stages`."""
    lines = [
        f"| {n.replace('_', ' ')} | {m['mean']:.1f} | {m['low']:.1f} to {m['high']:.1f} |" for n, m in score.items()
    ]
    return "\n".join(
        [
            "# sprites/teacher",
            "",
            "A HunyuanVideo pipeline in small: coloured shapes that move, 64 x 64 pixels, 17 frames at 8 frames/s,",
            'from captions such as "a red circle moving right and a blue square growing on black". Made to try',
            "vidaccel on; it knows no other world. Licence: Apache-2.0.",
            "",
            "## How it was made",
            "",
            "    python -m vidaccel.sprites make",
            "",
            *made_here(stages, config.seed),
            "## How it scores",
            "",
            f"`python -m vidaccel.sprites score --prompts {config.score_prompts}`: captions, half with two sprites, of",
            f"combinations held out of training; {config.steps} steps, two passes each, guidance {config.guidance:g}.",
            "Percent, with 95 % bootstrap intervals over the meanings of prompts.",
            "",
            "| | mean | interval |",
            "|---|---|---|",
            *lines,
            "",
            "## Settings",
            "",
            "```yaml",
            to_yaml(config).rstrip(),
            "```",
            "",
        ]
    )


def made_here(stages: list[dict], seed: int, machine: str | None = None) -> list[str]:
    """Lines of Markdown: the machine, which is this one unless it is named, and a table of the stages trained on it."""
    lines = [f"On {machine or _this_machine()}, seed {seed}.", ""]
    if not stages:
        return lines
    rows = [
        f"| {s['stage']} | {s['step']} | {s['seconds'] / 60:.0f} | {s['loss']:.4f} | {s['skipped']} |" for s in stages
    ]
    table = ["| stage | steps | minutes | last loss | skipped steps |", "|---|---|---|---|---|", *rows, ""]
    return lines + table


def _this_machine() -> str:
    device = (
        torch.cuda.get_device_name()
        if torch.cuda.is_available()
        else f"{os.cpu_count()} CPU cores, {platform.machine()}"
    )
    return f"{device}, torch {torch.__version__}"
