"""How many samples a second each stage of the chain trains on here: `python -m studies.throughput -o FILE.json`.

Each stage runs a few steps twice, eagerly and, where that can be, as one CUDA graph a step, by the product's own loop.
The rate is that of the second half of the steps: the first has preparations in it. A forecaster's sample is a whole
served run. MFU is the model's own arithmetic a second, over the card's bf16 peak without sparsity: of a sample forward
passes, and a backward pass of twice a forward; of a served run what a counter finds in one, backward pass and all.
"""

import json
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch.utils.flop_counter import FlopCounterMode

from vidaccel.artefacts import CHECKPOINTS, write_json
from vidaccel.bench.environment import environment
from vidaccel.cli.common import Debug, Device, quiet_libraries, reported
from vidaccel.collect.bank import Bank, world_bank
from vidaccel.collect.encode import LATENT
from vidaccel.config import loader as configuration
from vidaccel.config.distill import DistillConfig
from vidaccel.config.plan import GPUS
from vidaccel.config.predictor import PredictorConfig
from vidaccel.config.training import TrainConfig
from vidaccel.errors import UserError
from vidaccel.models.loading import LoadedPipeline, load_pipeline, resolve_device
from vidaccel.models.velocity import velocity_of
from vidaccel.train.clips import Clips
from vidaccel.train.distill import distill
from vidaccel.train.metrics import FILE as METRICS
from vidaccel.train.objective import drawing_device, generator_for
from vidaccel.train.predictor.served import Starts, objective_of, start_predictor
from vidaccel.train.predictor.task import task_of
from vidaccel.train.predictor.training import train_served
from vidaccel.worlds.sprites.make import train_teacher
from vidaccel.worlds.sprites.settings import CONF as SPRITES
from vidaccel.worlds.sprites.settings import SpritesConfig
from vidaccel.worlds.sprites.source import RenderedScenes
from vidaccel.worlds.sprites.teacher import from_scenes

PEAKS = {word: GPUS[word.lower()].bfloat16 for word in ("H100", "H200", "A100", "L40S")}
PEAKS |= {word: GPUS[f"rtx{word}"].bfloat16 for word in ("3090", "4090", "5090")}
"""Dense bf16 operations a second by a word of the card's name."""
DISTILLED = {
    "CFG distillation": ("sprites/cfg", "sprites/teacher", 5),
    "mean velocity": ("sprites/restricted_meanflow", "sprites/student", 7),
}
"""Settings, the frozen model, and passes a sample: two of the teacher, or four of a rollout of K = 2, and three for the
student forward and back."""
LISTS = ((0, 1, 3), (0, 2), (0, 1, 3, 5))
"""Full steps of the runs that a forecaster is trained through, in turn."""
NEVER = 10**9
app = typer.Typer()


@dataclass(frozen=True)
class Row:
    """One stage, one way."""

    stage: str
    way: str
    samples_per_second: float
    mfu: float | None


@dataclass(frozen=True)
class Stage:
    """What is measured: a training of so many steps into a folder, which returns where its metrics are."""

    name: str
    train: Callable[[TrainConfig, Path], Path]
    flops: float
    """Of a sample, forward and back."""


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
    """Measure the stages of training the shipped sprites models."""
    quiet_libraries()
    if resolve_device(device).type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    loaded = load_pipeline("sprites/teacher", device=device, dtype="float32")
    bank = world_bank(loaded, scenes, 1, seed=0)
    if bank is None:
        raise UserError("the shipped teacher knows no world", "install the package again")
    rows = []
    for row in measured(stages(loaded, bank, scenes, device), batch, steps, device):
        rows.append(row)
        typer.echo(line(row))
    if output is not None:
        where = environment(resolve_device(device))
        write_json(output, {"batch": batch, "steps": steps, "rows": [vars(row) for row in rows], "environment": where})


def measured(every: Iterable[Stage], batch: int, steps: int, device: str) -> Iterator[Row]:
    """A row for each stage and way."""
    target = resolve_device(device)
    ways = ("off", "on") if target.type == "cuda" else ("off",)
    name = torch.cuda.get_device_name() if target.type == "cuda" else "cpu"
    peak = next((rate for word, rate in PEAKS.items() if word in name), None)
    for stage in every:
        for graph in ways:
            train = TrainConfig(steps=steps, batch_size=batch, graph=graph, optimizer="muon", precision="bfloat16")
            train = replace(train, log_every=1, save_every=NEVER, evaluate_every=NEVER, sample_every=0)
            with tempfile.TemporaryDirectory() as folder:
                rate = batch * rate_of(stage.train(train, Path(folder) / "made"))
            mfu = None if peak is None else rate * stage.flops / peak
            yield Row(stage.name, "one CUDA graph a step" if graph == "on" else "eager", rate, mfu)


def stages(teacher: LoadedPipeline, bank: Bank, scenes: int, device: str) -> Iterator[Stage]:
    """All of them; students are loaded when theirs comes."""
    one = flops_of_a_pass(teacher, bank)
    yield Stage("teacher", partial(_teacher, teacher, scenes), 3 * one)
    for name, (conf, frozen, passes) in DISTILLED.items():
        yield Stage(name, partial(_distilled, bank, conf, frozen, device), passes * one)
    student = load_pipeline("sprites/student", device=device, dtype="float32")
    yield Stage("forecaster, served", partial(_served, student, bank), flops_of_a_run(student, bank))


def _teacher(loaded: LoadedPipeline, scenes: int, train: TrainConfig, folder: Path) -> Path:
    config = configuration.load(SPRITES, SpritesConfig, "gpu", [])
    config = replace(config, teacher=replace(config.teacher, train=train))
    data = from_scenes(config, loaded, RenderedScenes(scenes, 0, config.pair_share, config.odds), "shipped")
    train_teacher(config, folder, torch.device(loaded.pipe.device), data, "shipped", loaded)
    return folder / "deep" / METRICS


def _distilled(bank: Bank, conf: str, frozen: str, device: str, train: TrainConfig, folder: Path) -> Path:
    words = [f"teacher={frozen}", "embedding_rate=3"]
    config = replace(configuration.load("distill", DistillConfig, conf, words), train=train)
    distill(config, folder, device, Clips(bank, {"scenes": len(bank)}))
    return folder / METRICS


def _served(student: LoadedPipeline, bank: Bank, train: TrainConfig, folder: Path) -> Path:
    train_served(student, bank, replace(served_settings(), mse=train), folder)
    return folder / CHECKPOINTS / "mse" / METRICS


def served_settings() -> PredictorConfig:
    """Of a network that nothing is fitted on top of: only its training is timed."""
    words = [f"lists={[list(each) for each in LISTS]}", "scalars=false", "scalars_every=0", "search_prompts=1"]
    return configuration.load("train-predictor", PredictorConfig, "sprites", words)


def flops_of_a_run(student: LoadedPipeline, bank: Bank) -> float:
    """Of one served run and its backward pass, the mean over the lists."""
    config = served_settings()
    task = task_of(student, replace(config, mse=replace(config.mse, batch_size=1)), None, (bank, {}))
    starts, total = Starts.of(task, 1), 0.0
    with task.trunks:
        predictor, objective = start_predictor(task, starts), objective_of(task, starts)
        for index in range(len(LISTS)):
            drawn = objective.draw(index, generator_for(0, index, drawing_device(objective, predictor)))
            with FlopCounterMode(display=False) as counter:
                objective.loss(predictor, drawn)[0].backward()
            total += counter.get_total_flops()
    return total / len(LISTS)


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
