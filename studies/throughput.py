"""How many samples a second each stage of distillation trains on here: `python -m studies.throughput -o FILE.json`.

Each stage runs a few steps twice, eagerly and, where that can be, as one CUDA graph a step, by the product's own loop.
The rate is that of the second half of the steps: the first has preparations in it. MFU is the model's own arithmetic a
second, forward passes and a backward pass of twice a forward, over the card's bf16 peak without sparsity.
"""

import json
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch.utils.flop_counter import FlopCounterMode

from vidaccel.artefacts import write_json
from vidaccel.bench.environment import environment
from vidaccel.cli.common import Debug, Device, quiet_libraries, reported
from vidaccel.collect.bank import Bank, world_bank
from vidaccel.collect.encode import LATENT
from vidaccel.config import loader as configuration
from vidaccel.config.distill import DistillConfig
from vidaccel.errors import UserError
from vidaccel.models.loading import LoadedPipeline, load_pipeline, resolve_device
from vidaccel.train.distill import Clips, distill, velocity_of
from vidaccel.train.metrics import FILE as METRICS

PEAKS = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "L40S": 362e12, "4090": 165e12}
"""Dense bf16 operations a second by a word of the card's name, from its maker's data sheet."""
STAGES = {
    "CFG distillation": ("sprites/cfg", "sprites/teacher", 5),
    "mean velocity": ("sprites/restricted_meanflow", "sprites/student", 7),
}
"""Settings, the frozen model, and passes a sample: two of the teacher, or four of a rollout of K = 2, and three for the
student forward and back."""
COMMON = ("embedding_rate=3", "train.optimizer=muon", "train.precision=bfloat16", "train.steps=null")
app = typer.Typer()


@dataclass(frozen=True)
class Row:
    """One stage, one way."""

    stage: str
    way: str
    samples_per_second: float
    mfu: float | None


@app.command()
@reported
def main(
    batch: Annotated[int, typer.Option(min=1, help="Samples a step.")] = 512,
    steps: Annotated[int, typer.Option(min=4, help="Steps of each run.")] = 80,
    scenes: Annotated[int, typer.Option(min=1, help="Clips to train on.")] = 2048,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="A .json for the numbers.")] = None,
    device: Device = "auto",
    debug: Debug = False,
) -> None:
    """Measure the stages of distilling the shipped sprites models."""
    quiet_libraries()
    if resolve_device(device).type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    loaded = load_pipeline("sprites/teacher", device=device, dtype="float32")
    bank = world_bank(loaded, scenes, 1, seed=0)
    if bank is None:
        raise UserError("the shipped teacher knows no world", "install the package again")
    rows = list(measured(bank, flops_of_a_pass(loaded, bank), batch, steps, device))
    for row in rows:
        typer.echo(line(row))
    if output is not None:
        where = environment(resolve_device(device))
        write_json(output, {"batch": batch, "steps": steps, "rows": [vars(row) for row in rows], "environment": where})


def measured(bank: Bank, flops: float, batch: int, steps: int, device: str) -> Iterator[Row]:
    """A row for each stage and way."""
    target = resolve_device(device)
    ways = ("off", "on") if target.type == "cuda" else ("off",)
    name = torch.cuda.get_device_name() if target.type == "cuda" else "cpu"
    peak = next((rate for word, rate in PEAKS.items() if word in name), None)
    for stage, (conf, teacher, passes) in STAGES.items():
        for graph in ways:
            words = [*COMMON, f"teacher={teacher}", f"train.batch_size={batch}", f"train.graph={graph}"]
            config = configuration.load("distill", DistillConfig, conf, words)
            every = 10**9
            train = replace(config.train, steps=steps, log_every=1, save_every=every, evaluate_every=every)
            with tempfile.TemporaryDirectory() as folder:
                settings = replace(config, train=replace(train, sample_every=0))
                distill(settings, Path(folder) / "student", device, Clips(bank, {"scenes": len(bank)}))
                rate = batch * rate_of(Path(folder) / "student" / METRICS)
            mfu = None if peak is None else rate * passes * flops / peak
            yield Row(stage, "one CUDA graph a step" if graph == "on" else "eager", rate, mfu)


def rate_of(metrics: Path) -> float:
    """Steps a second in the second half of a run."""
    lines: list[dict[str, Any]] = [json.loads(text) for text in metrics.read_text().splitlines()]
    last, middle = lines[-1], lines[len(lines) // 2 - 1]
    return (last["step"] - middle["step"]) / max(last["seconds"] - middle["seconds"], 1e-9)


def flops_of_a_pass(loaded: LoadedPipeline, bank: Bank) -> float:
    """Of one sample, forward."""
    velocity = velocity_of(loaded)
    text = bank.batch([0], torch.float32)
    x = text.pop(LATENT)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        velocity(x, torch.full((1,), 0.5, device=x.device), text)
    return float(counter.get_total_flops())


def line(row: Row) -> str:
    mfu = "" if row.mfu is None else f", {row.mfu:.1%} of the card's bf16 peak"
    return f"{row.stage:18} {row.way:22} {row.samples_per_second:10,.0f} samples/s{mfu}"


if __name__ == "__main__":
    app(prog_name="python -m studies.throughput")
