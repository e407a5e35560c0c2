"""Runs killed at random moments: `python -m studies.kill --kills 20 -o runs/kill`.

Each stage is run once undisturbed by one process and once by two. Then the same command is started, one of its
processes gets SIGKILL at a random moment of the time that the undisturbed run took, and so on until it was killed often
enough; the last start is left to end. A start that ends before its moment counts as no kill: what it made is compared,
and the stage begins anew. What must hold, on a CPU:

    equal    every file is, bit for bit, that of the undisturbed run, but for times of the clock
    waited   the other process ends by itself, or when it is told to, as torchrun would do at once: one that is killed
             before the two have found each other is missed by nobody else

Processes are forked from a server that has torch loaded, and the models are those of the sprites world with two blocks
of 24, so that most moments are within the work and not before it.
"""

import json
import multiprocessing
import os
import random
import shutil
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Annotated, Any

import typer
from diffusers import HunyuanVideoTransformer3DModel
from safetensors.torch import load_file

from vidaccel.artefacts import LOCK_FILE, RUN_FILE, atomic_folder, write_json
from vidaccel.cli.common import Debug, reported
from vidaccel.compat.torch import LOADED_BY_FSDP
from vidaccel.errors import UserError
from vidaccel.models.files import local_path

PATIENCE = 20.0
"""Seconds after which a process that waits for a dead one is told to end, by SIGTERM."""
GRACE = 10.0
"""Seconds after which one that was told to is at fault."""
BEAT, SILENT = 0.5, 5.0
"""Of vidaccel/processes.py, faster than its own, or most of the study would be waiting."""
OF_THE_CLOCK = {"started", "finished", "seconds", "step_seconds", "files", "out_dir"}
"""Keys of JSON that are no part of the comparison; `files` has the hashes of files with such keys."""
LOADED = (
    *(LOADED_BY_FSDP, "vidaccel.collect.kinds", "vidaccel.train.distill", "vidaccel.train.predictor.training"),
    *("vidaccel.session", "vidaccel.worlds.sprites.pipeline", "vidaccel.worlds.sprites.source"),
    *("transformers.models.llama.modeling_llama", "transformers.models.clip.modeling_clip"),
    *("diffusers.models.transformers.transformer_hunyuan_video", "diffusers.pipelines.hunyuan_video"),
)
TINY = (
    *("train.steps=6", "train.batch_size=1", "train.accumulate=2", "train.checkpointing=false", "train.warmup=1"),
    *("train.save_every=2", "train.log_every=1", "train.sample_every=0"),
)


@dataclass(frozen=True)
class Stage:
    """A command, without its -o; {name} at the end of a word is what the stage of that name left, or one of `MADE`."""

    words: tuple[str, ...]


STAGES = {
    "collect": Stage(("collect-features", "model={teacher}", "clips=16", "per_shard=2")),
    "trajectories": Stage(
        ("collect-features", "kind=trajectory", "model={distill}", "steps=4", "clips=8", "per_shard=1")
    ),
    "distill": Stage(("distill", "--conf", "cfg", "teacher={teacher}", "features={collect}", "gate_samples=0", *TINY)),
    "train-predictor": Stage(
        (
            *("train-predictor", "student={distill}", "features={trajectories}", "pairs=trajectory", "steps=4"),
            *(f"mse.{word.removeprefix('train.')}" for word in TINY),
            *("blocks=1", "search_prompts=2", "checked_prompts=2", "adversarial.steps=0", "scalars=false"),
        )
    ),
    "generate": Stage(("generate", "--prompts", "{prompts}", "model={distill}")),
}


@dataclass
class Found:
    """What a stage did under so many processes."""

    stage: str
    processes: int
    seconds: float
    """Of the undisturbed run."""
    kills: int = 0
    ended: int = 0
    """Starts that ended by themselves, and were compared."""
    waited: float = 0.0
    """Longest time, in s, from a kill to the end of the other process."""
    told: int = 0
    """Kills after which it had to be told to end."""
    said: int = 0
    """Kills of which the other process told."""
    differing: list[str] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)


app = typer.Typer()


@app.command()
@reported
def main(
    kills: Annotated[int, typer.Option(min=1, help="Of each stage and number of processes.")] = 20,
    stages: Annotated[list[str] | None, typer.Option("--stage", help="Only this one; may be repeated.")] = None,
    processes: Annotated[list[int] | None, typer.Option(help="1 and 2.")] = None,
    seed: int = 0,
    output: Annotated[Path, typer.Option("-o", "--output", help="A folder for the runs and kill.json.")] = Path(
        "runs/kill"
    ),
    debug: Debug = False,
) -> None:
    """Kill runs, and print a line for each stage and number of processes."""
    wanted = stages or list(STAGES)
    if unknown := [name for name in wanted if name not in STAGES]:
        raise UserError(f"there is no stage {unknown[0]}", f"choose from: {', '.join(STAGES)}")
    multiprocessing.set_forkserver_preload([*LOADED, __name__])
    with started(["--version"], 1, output / "server.log") as first:  # the server starts
        first[0].join()
    rng, found = random.Random(seed), []
    for name in wanted:
        for count in processes or [1, 2]:
            found.append(kill_often(name, count, kills, output, rng))
            typer.echo(said(found[-1]))
            write_json(output / "kill.json", [asdict(each) for each in found])
    if any(each.differing or each.faults for each in found):
        raise typer.Exit(1)


def said(found: Found) -> str:
    fault = "; ".join([*found.faults, *(f"differs: {name}" for name in found.differing)])
    others = f"others ended within {found.waited:.1f} s, {found.told} of them told to, {found.said} said why"
    told = f", {others}" if found.processes > 1 else ""
    return (
        f"{found.stage}, {found.processes} processes: {found.kills} kills in runs of {found.seconds:.1f} s{told}, "
        f"{found.ended} results compared: {fault or 'equal'}"
    )


def kill_often(name: str, count: int, kills: int, output: Path, rng: random.Random) -> Found:
    """Run a stage undisturbed and disturbed."""
    straight = undisturbed(name, count, output)
    found = Found(name, count, json.loads(straight.with_suffix(".json").read_text()))
    folder = output / f"{name}-{count}-killed"
    shutil.rmtree(folder, ignore_errors=True)
    while not found.faults and not found.differing:
        over = found.kills == kills
        moment = None if over else rng.uniform(0, found.seconds)
        if not disturbed(words_of(name, folder, output), count, moment, rng.randrange(count), found, folder):
            continue
        found.ended += 1
        found.differing = differing(straight, folder)
        if over:
            break
        shutil.rmtree(folder)
    return found


def disturbed(words: list[str], count: int, moment: float | None, which: int, found: Found, folder: Path) -> bool:
    """Start, and at that moment kill that process; whether the start ended by itself."""
    log = folder.with_suffix(".log")
    with started(words, count, log) as running:
        if moment is None:
            moment = 3600.0
        deadline = time.monotonic() + moment
        while any(process.is_alive() for process in running) and time.monotonic() < deadline:
            running[0].join(0.005)
            if any(process.exitcode for process in running):
                break
        if not any(process.is_alive() for process in running):
            if codes := [process.exitcode for process in running if process.exitcode]:
                found.faults.append(f"ended with {codes}: {last_words(log)}")
            return not found.faults
        if running[which].is_alive():
            os.kill(running[which].pid or 0, signal.SIGKILL)
        began = time.monotonic()
        found.kills += 1
        for process in running:
            process.join(max(0.0, began + PATIENCE - time.monotonic()))
            if process.is_alive():
                found.told += 1
                process.terminate()
                process.join(GRACE)
            if process.is_alive():
                found.faults.append(f"a process that was told to end did not for {GRACE:g} s")
        found.waited = max(found.waited, time.monotonic() - began)
        found.said += "another of its processes did" in log.read_text()
        return False


def undisturbed(name: str, count: int, output: Path) -> Path:
    """The folder of the stage's undisturbed run by so many processes, made once; beside it its seconds."""
    folder = output / f"{name}-{count}"
    if folder.with_suffix(".json").exists():
        return folder
    words = words_of(name, folder, output)
    shutil.rmtree(folder, ignore_errors=True)
    began = time.monotonic()
    with started(words, count, folder.with_suffix(".log")) as running:
        for process in running:
            process.join()
    if any(process.exitcode for process in running):
        raise UserError(f"{name} fails undisturbed: {last_words(folder.with_suffix('.log'))}", "see its log")
    write_json(folder.with_suffix(".json"), time.monotonic() - began)
    return folder


def words_of(name: str, folder: Path, output: Path) -> list[str]:
    """The stage's command. The stages that it needs are run."""
    words = []
    for word in STAGES[name].words:
        key = word.rpartition("{")[2].rstrip("}") if word.endswith("}") else None
        if key:
            made = MADE[key](output) if key in MADE else undisturbed(key, 1, output)
            word = word.replace(f"{{{key}}}", str(made))
        words.append(word)
    return [*words, "-o", str(folder)]


def prompts(output: Path) -> Path:
    """A file of eight."""
    file = output / "prompts.txt"
    file.write_text("".join(f"a {colour} circle moving right on black\n" for colour in COLOURS))
    return file


def shallow_teacher(output: Path) -> Path:
    """The sprites teacher with the first block of each of its two kinds, made once."""
    folder = output / "teacher"
    if not folder.exists():
        with atomic_folder(folder) as made:
            shutil.copytree(local_path("sprites/teacher"), made, dirs_exist_ok=True)
            transformer = HunyuanVideoTransformer3DModel.from_pretrained(made, subfolder="transformer")
            del transformer.transformer_blocks[1:], transformer.single_transformer_blocks[1:]
            transformer.register_to_config(num_layers=1, num_single_layers=1)
            transformer.save_pretrained(made / "transformer")
            run = json.loads((made / RUN_FILE).read_text())
            write_json(made / RUN_FILE, run | {"files": {}})  # nothing is vouched for that is changed here
    return folder


COLOURS = ("red", "green", "blue", "yellow", "white", "cyan", "magenta", "orange")
MADE = {"prompts": prompts, "teacher": shallow_teacher}
"""What stages need that no stage makes."""


@contextmanager
def started(words: list[str], count: int, log: Path) -> Iterator[list[ForkServerProcess]]:
    """The command in so many processes, as torchrun starts them; none is left behind."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log.parent.mkdir(parents=True, exist_ok=True)
    log.write_text("")
    context = multiprocessing.get_context("forkserver")
    running = [context.Process(target=run, args=(words, number, count, port, str(log))) for number in range(count)]
    try:
        for process in running:
            process.start()
        yield running
    finally:
        for process in running:
            process.kill()
            process.join()


def run(words: Sequence[str], number: int, count: int, port: int, log: str) -> None:
    """In a process of its own, which ends with the study."""
    study = multiprocessing.parent_process()
    assert study is not None
    threading.Thread(target=lambda: (study.join(), os._exit(1)), daemon=True).start()
    handle = os.open(log, os.O_WRONLY | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(handle, stream)
    if count > 1:
        os.environ |= {"RANK": str(number), "LOCAL_RANK": str(number), "WORLD_SIZE": str(count)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    import torch

    from vidaccel import processes
    from vidaccel.cli.main import main as vidaccel

    processes.BEAT, processes.SILENT = BEAT, SILENT
    torch.set_num_threads(1)
    sys.argv = ["vidaccel", *words]
    vidaccel()


def last_words(log: Path) -> str:
    lines = [line for line in log.read_text().splitlines() if line.strip()]
    return " / ".join(lines[-3:])


def differing(one: Path, other: Path) -> list[str]:
    """Names of files that are not alike, or in one of the folders alone."""
    names = {path.relative_to(folder) for folder in (one, other) for path in folder.rglob("*") if path.is_file()}
    names = {name for name in names if name.name != LOCK_FILE}
    return sorted(str(name) for name in names if content(one / name) != content(other / name))


def content(path: Path) -> Any:
    """What is compared of a file; None where it is not there."""
    if not path.is_file():
        return None
    if path.suffix == ".safetensors":  # the order in its header is chance
        return {name: tensor.numpy().tobytes() for name, tensor in load_file(path).items()}
    if path.suffix in (".json", ".jsonl"):
        text = path.read_text()
        documents = [json.loads(line) for line in text.splitlines()] if path.suffix == ".jsonl" else json.loads(text)
        return without_clock(documents)
    return path.read_bytes()


def without_clock(document: Any) -> Any:
    if isinstance(document, dict):
        return {key: without_clock(value) for key, value in document.items() if key not in OF_THE_CLOCK}
    return [without_clock(each) for each in document] if isinstance(document, list) else document
