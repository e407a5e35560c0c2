"""The model card that stands beside the shipped weights: how they were made and how they scored, as measured."""

import json
import os
import platform
from pathlib import Path

import torch

from vidaccel.config import SpritesConfig, to_yaml

TITLES = {
    "text": "text encoders",
    "autoencoder/images": "autoencoder on images",
    "autoencoder/clips": "autoencoder on clips",
    "teacher": "transformer",
}


def model_card(config: SpritesConfig, runs: Path, score: dict[str, dict[str, float]]) -> str:
    """Markdown for the model trained in `runs`, whose stages' metrics.jsonl say how long they took."""
    stages = []
    for stage, title in TITLES.items():
        last = json.loads((runs / stage / "metrics.jsonl").read_text().splitlines()[-1])
        stages.append(
            f"| {title} | {last['step']} | {last['seconds'] / 60:.0f} | {last['loss']:.4f} | {last['skipped']} |"
        )
    marks = [
        f"| {n.replace('_', ' ')} | {m['mean']:.1f} | {m['low']:.1f} to {m['high']:.1f} |" for n, m in score.items()
    ]
    device = (
        torch.cuda.get_device_name()
        if torch.cuda.is_available()
        else f"{os.cpu_count()} CPU cores, {platform.machine()}"
    )
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
            f"On {device}, torch {torch.__version__}, seed {config.seed}.",
            "",
            "| stage | steps | minutes | last loss | skipped steps |",
            "|---|---|---|---|---|",
            *stages,
            "",
            "## How it scores",
            "",
            f"`python -m vidaccel.sprites score --prompts {config.score_prompts}`: captions, half with two sprites, of",
            f"combinations held out of training; {config.steps} steps, two passes each, guidance {config.guidance:g}.",
            "Percent, with 95 % bootstrap intervals over prompts.",
            "",
            "| | mean | interval |",
            "|---|---|---|",
            *marks,
            "",
            "## Settings",
            "",
            "```yaml",
            to_yaml(config).rstrip(),
            "```",
            "",
        ]
    )
