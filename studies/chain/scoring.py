"""Held-out prompts scored, in worker processes beside the device that makes the videos.

folder/<row>.jsonl      a line a prompt: seed and scores
folder/scores.json      means with intervals, and paired differences to the first row
"""

import json
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vidaccel.artefacts import atomic_path, write_json
from vidaccel.config.generate import GenerateConfig
from vidaccel.models.loading import LoadedPipeline
from vidaccel.numbers import bootstrap
from vidaccel.sampling import generate
from vidaccel.worlds import Scores, world

SHOWN = ("total", "semantic", "quality")


def workers(count: int) -> ProcessPoolExecutor:
    """Processes that score."""
    return ProcessPoolExecutor(count, mp_context=get_context("spawn"), initializer=torch.set_num_threads, initargs=(1,))


def score_row(
    loaded: LoadedPipeline, config: GenerateConfig, of_world: str, prompts: int, batch: int, file: Path, pool
) -> list[Scores]:
    """Scores of the model's videos of the first held-out prompts, prompt i from seed i; from `file` if it has them."""
    if file.exists():
        return [json.loads(line)["scores"] for line in file.read_text().splitlines()]
    texts = world(of_world).scorer().held_out_prompts(prompts)
    pending = []
    for first in range(0, prompts, batch):
        some = texts[first : first + batch]
        made = generate(loaded, some, config, list(range(first, first + len(some))))
        pending += [pool.submit(score, of_world, *pair) for pair in zip(made.frames, some, strict=True)]
    scores = [future.result() for future in pending]
    with atomic_path(file) as temporary:
        lines = (
            {"prompt": text, "seed": i, "scores": own} for i, (text, own) in enumerate(zip(texts, scores, strict=True))
        )
        temporary.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return scores


def score(of_world: str, frames: np.ndarray, prompt: str) -> Scores:
    """In a worker."""
    return world(of_world).scorer().score(frames, prompt)


def summary(of_world: str, rows: Mapping[str, list[Scores]]) -> dict[str, Any]:
    """By row: means with intervals, and the paired difference of the total to the first row, in points.

    Resampling the prompts, pairs stay together: what is hard for one row is hard for the other.
    """
    summarise = world(of_world).scorer().summarise
    report: dict[str, Any] = {}
    first = next(iter(rows.values()))
    for name, scores in rows.items():
        means = summarise(scores)
        report[name] = {key: means[key] for key in means}
        if scores is not first:
            both = np.array([[_total(summarise, a), _total(summarise, b)] for a, b in zip(scores, first, strict=True)])
            difference = both[:, 0] - both[:, 1]
            low, high = bootstrap(difference).tolist()
            report[name]["paired"] = {"mean": float(difference.mean()), "low": low, "high": high}
    return report


def _total(summarise, scores: Scores) -> float:
    return summarise([scores], resamples=1)["total"]["mean"]


def write_summary(folder: Path, report: Mapping[str, Any], prompts: int) -> None:
    write_json(folder / "scores.json", {"prompts": prompts, "rows": dict(report)})


def table(report: Mapping[str, Any]) -> str:
    """A line a row."""
    lines = []
    for name, row in report.items():
        means = "  ".join(f"{key} {row[key]['mean']:6.2f}" for key in SHOWN)
        paired = row.get("paired")
        delta = "" if paired is None else f"  {paired['mean']:+.2f} ({paired['low']:+.2f} to {paired['high']:+.2f})"
        lines.append(f"{name:20} {means}{delta}")
    return "\n".join(lines)
