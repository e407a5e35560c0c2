"""Held-out prompts scored, in worker processes beside the device that makes the videos.

folder/<row>.jsonl      a line a prompt: seed and scores
folder/scores.json      means with intervals, and paired differences to the first row
"""

import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vidaccel.artefacts import atomic_path, write_json
from vidaccel.bench.measures.pairs import averages, differences, draws, interval
from vidaccel.config.generate import GenerateConfig
from vidaccel.models.loading import LoadedPipeline
from vidaccel.sampling import generate
from vidaccel.worlds import Scores, scorer_named

SHOWN = ("total", "semantic", "quality")


def workers(count: int) -> ProcessPoolExecutor:
    """Processes that score."""
    return ProcessPoolExecutor(count, mp_context=get_context("spawn"), initializer=torch.set_num_threads, initargs=(1,))


def score_row(
    loaded: LoadedPipeline, config: GenerateConfig, scorer: str, prompts: int, batch: int, file: Path, pool
) -> list[Scores]:
    """Scores of the model's videos of the first held-out prompts, prompt i from seed i; from `file` if it has those of
    as many."""
    known = [json.loads(line)["scores"] for line in file.read_text().splitlines()] if file.exists() else []
    if len(known) == prompts:
        return known
    texts = scorer_named(scorer).held_out_prompts(prompts)
    pending = []
    for first in range(0, prompts, batch):
        some = texts[first : first + batch]
        made = generate(loaded, some, config, list(range(first, first + len(some))))
        pending += [pool.submit(score, scorer, *pair) for pair in zip(made.frames, some, strict=True)]
    scores = [future.result() for future in pending]
    with atomic_path(file) as temporary:
        lines = (
            {"prompt": text, "seed": i, "scores": own} for i, (text, own) in enumerate(zip(texts, scores, strict=True))
        )
        temporary.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return scores


def score(scorer: str, frames: np.ndarray, prompt: str) -> Scores:
    """In a worker."""
    return scorer_named(scorer).score(frames, prompt)


def summary(scorer: str, prompts: Sequence[str], rows: Mapping[str, list[Scores]]) -> dict[str, Any]:
    """By row, in points of a hundred: means with intervals, and the paired differences to the first row.

    Prompts that mean the same are drawn together.
    """
    judge = scorer_named(scorer)
    meanings = [judge.meaning(prompt) for prompt in prompts]
    columns = {row: _columns(scores) for row, scores in rows.items()}
    first, report = next(iter(columns)), {}
    ones, drawn = np.ones((1, len(meanings))), draws(tuple(meanings))
    for row, own in columns.items():
        means, resampled = (averages(own, each, judge.totals) for each in (ones, drawn))
        report[row] = {
            name: dict(zip(("mean", "low", "high"), _percent(means[name][0], *interval(resampled[name])), strict=True))
            for name in means
        }
        if row != first:
            found = differences(own, columns[first], meanings, judge.totals)
            report[row]["paired"] = {
                name: dict(zip(("mean", "low", "high"), _percent(*found[name][:3]), strict=True)) for name in found
            }
    return report


def _columns(scores: Sequence[Scores]) -> dict[str, np.ndarray]:
    """Values [P] by dimension, NaN where a video has it not."""
    names = dict.fromkeys(name for own in scores for name in own)
    return {name: np.array([own.get(name, np.nan) for own in scores]) for name in names}


def _percent(*shares: float) -> list[float]:
    return [100 * float(share) for share in shares]


def write_summary(folder: Path, report: Mapping[str, Any], prompts: int) -> None:
    write_json(folder / "scores.json", {"prompts": prompts, "rows": dict(report)})


def table(report: Mapping[str, Any]) -> str:
    """A line a row."""
    lines = []
    for name, row in report.items():
        means = "  ".join(f"{key} {row[key]['mean']:6.2f}" for key in (*SHOWN, *({"lamps"} & row.keys())))
        paired = row.get("paired", {}).get("total")
        delta = "" if paired is None else f"  {paired['mean']:+.2f} ({paired['low']:+.2f} to {paired['high']:+.2f})"
        lines.append(f"{name:20} {means}{delta}")
    return "\n".join(lines)
