"""One item of the GPU benchmark in a process of its own: `python -m studies.gpu.items ops rows.jsonl [--dry-run]`.

A kernel that faults takes its process with it; here that costs the rest of one item and no other.
"""

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from studies.gpu import costs, decoding, fp8, offload, ops, passes, training
from studies.gpu.measure import Rows
from studies.gpu.model import Shape

FULL = Shape(latent=(33, 88, 88))
TENTH = Shape()
TOY = Shape(
    heads=2,
    head_dim=16,
    double_blocks=1,
    single_blocks=2,
    text_dim=12,
    pooled_dim=8,
    text_tokens=6,
    text_used=4,
    rope=(4, 6, 6),
    latent=(2, 4, 6),
)


def measure_fp8(rows: Rows, dry: bool) -> None:
    fp8.run_fp8(rows, [TOY] if dry else [TENTH, FULL])


def measure_decode(rows: Rows, dry: bool) -> None:
    decoding.run_decoding(rows, [TOY] if dry else [TENTH, FULL])


def measure_attention(rows: Rows, dry: bool) -> None:
    decoding.run_attention(rows, [TOY] if dry else [TENTH, FULL])


def measure_predictor(rows: Rows, dry: bool) -> None:
    costs.run_predictor(rows, [TOY] if dry else [TENTH, FULL])


def measure_distillation(rows: Rows, dry: bool) -> None:
    costs.run_distillation(rows, [TOY] if dry else [TENTH])


def measure_ops(rows: Rows, dry: bool) -> None:
    sizes = [ops.Size(TENTH.tokens), ops.Size(FULL.tokens)]
    ops.run(rows, [ops.Size(12, 2, 16, torch.float32)] if dry else sizes)


def measure_blocks(rows: Rows, dry: bool) -> None:
    passes.run_blocks(rows, TOY if dry else TENTH, quick=False)
    if not dry:
        passes.run_blocks(rows, FULL, quick=True)


def measure_model(rows: Rows, dry: bool) -> None:
    passes.run_model(rows, [TOY] if dry else [TENTH, FULL])


def measure_offload(rows: Rows, dry: bool) -> None:
    offload.run_offload(rows, [TOY] if dry else [TENTH, FULL])


def measure_training(rows: Rows, dry: bool) -> None:
    training.run_training(rows, TOY if dry else replace(TENTH, double_blocks=5, single_blocks=10))


ITEMS: dict[str, Callable[[Rows, bool], None]] = {
    "fp8": measure_fp8,
    "decode": measure_decode,
    "predictor": measure_predictor,
    "attention": measure_attention,
    "distillation": measure_distillation,
    "ops": measure_ops,
    "blocks": measure_blocks,
    "model": measure_model,
    "training": measure_training,
    "offload": measure_offload,
}

if __name__ == "__main__":
    item, path = sys.argv[1:3]
    torch.manual_seed(0)
    ITEMS[item](Rows(Path(path), item), "--dry-run" in sys.argv)
