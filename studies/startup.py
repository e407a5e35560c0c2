"""Seconds from the command to the first denoising step of a model of some GB: `python -m studies.startup -o FILE.json`.

It writes a checkpoint of random weights beside the shipped encoders, and takes times in processes of their own:

    read   all weight files once through, without looking at them
    load   what `vidaccel generate` does after imports, whose seconds are told apart, up to the first pass of the
           transformer, every page of its weights touched as a copy to a device would
    ratio  loading over reading; `_cpu` is processor time alone, which other work disturbs less

cold with the files put out of the page cache before (how much was left is said), and warm. Peak memory is what was
resident at most: on a CPU weights are mapped, and the pages of the file are the weights.
"""

import ctypes
import json
import mmap
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import psutil
import torch
import typer
from torch import nn

from vidaccel.artefacts import write_json
from vidaccel.bench.environment import environment
from vidaccel.cli.common import Debug, quiet_libraries, reported
from vidaccel.config.generate import GenerateConfig
from vidaccel.errors import UserError
from vidaccel.models.loading import load_pipeline
from vidaccel.session import session

PROMPT = "a red circle moving right on black"
HEADS = 32
"""Of the transformer that is written, of the shipped one's width each."""
app = typer.Typer()


@app.command()
@reported
def main(
    gigabytes: Annotated[float, typer.Option(min=0.001, help="Of the transformer's weights, in bfloat16.")] = 2.0,
    rounds: Annotated[int, typer.Option(min=1, help="Times that each is taken; the median counts.")] = 3,
    work: Annotated[Path | None, typer.Option(help="Where the checkpoint is written, and deleted again.")] = None,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="A .json for the numbers.")] = None,
    loading: Annotated[Path | None, typer.Option(help="Load this model and print seconds, no more.")] = None,
    debug: Debug = False,
) -> None:
    """Measure how long a model takes to its first step."""
    quiet_libraries()
    if loading is not None:
        typer.echo(json.dumps(loaded_from(loading)))
        return
    with tempfile.TemporaryDirectory(dir=work) as folder:
        needed, free = gigabytes * 1e9, psutil.disk_usage(folder).free
        if needed * 1.2 > free:
            raise UserError(
                f"{gigabytes:g} GB do not fit where {free / 1e9:.3g} are free", "name a disk: --work FOLDER"
            )
        model = Path(folder) / "model"
        written(model, gigabytes)
        rows = {state: measured(model, state, rounds) for state in ("cold", "warm")}
    for state, row in rows.items():
        typer.echo(line(state, row))
    if output is not None:
        write_json(output, {"gigabytes": gigabytes, "rounds": rounds, **rows, "environment": environment("cpu")})


def written(folder: Path, gigabytes: float) -> None:
    """A pipeline folder, the shipped teacher's but for the transformer, which has so many bytes of bfloat16."""
    pipe = load_pipeline("sprites/teacher").pipe
    small = pipe.transformer
    settings = {name: value for name, value in small.config.items() if not name.startswith("_")}
    settings["num_attention_heads"] = HEADS

    def sized(blocks: int) -> nn.Module:
        with torch.device("meta"):
            made = type(small).from_config(settings | {"num_single_layers": blocks})
        return nn.Module.to(made, torch.bfloat16)

    one, two = (sum(weight.nbytes for weight in sized(blocks).parameters()) for blocks in (1, 2))
    transformer: Any = sized(max(1, round((gigabytes * 1e9 - one) / (two - one)) + 1)).to_empty(device="cpu")
    noise = 0.02 * torch.randn(max(weight.numel() for weight in transformer.parameters())).bfloat16()
    for weight in transformer.parameters():
        weight.data.copy_(noise[: weight.numel()].view_as(weight))
    pipe.transformer = transformer
    pipe.save_pretrained(folder)


def measured(model: Path, state: str, rounds: int) -> dict[str, Any]:
    """Medians of `rounds` readings and loadings, taken in turn."""
    files = sorted(model.rglob("*.safetensors"))
    taken: list[dict[str, float]] = []
    for _ in range(rounds):
        left = made_cold(files) if state == "cold" else 1.0
        started, cpu = time.perf_counter(), time.process_time()
        read(files)
        row = {"read": time.perf_counter() - started, "read_cpu": time.process_time() - cpu}
        if state == "cold":
            left = max(left, made_cold(files))
        row |= in_a_process(model) | {"cached": left}
        taken.append(row | {"ratio": row["load"] / row["read"]})
    return {name: sorted(row[name] for row in taken)[len(taken) // 2] for name in taken[0]} | {
        "bytes": sum(file.stat().st_size for file in files)
    }


def read(files: list[Path]) -> None:
    buffer = bytearray(2**24)
    for file in files:
        with file.open("rb", buffering=0) as stream:
            while stream.readinto(buffer):
                pass


def made_cold(files: list[Path]) -> float:
    """Put files out of the page cache; the share of their pages that stayed."""
    for file in files:
        with file.open("rb") as stream:
            os.fsync(stream.fileno())
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return cached(files)


def cached(files: list[Path]) -> float:
    """The share of the files' pages that are in the page cache."""
    libc, there, pages = ctypes.CDLL(None, use_errno=True), 0, 0
    for file in files:
        with file.open("r+b") as stream, mmap.mmap(stream.fileno(), 0) as mapped:
            count = -(-len(mapped) // mmap.PAGESIZE)
            states, view = (ctypes.c_ubyte * count)(), (ctypes.c_char * len(mapped)).from_buffer(mapped)
            if libc.mincore(ctypes.byref(view), ctypes.c_size_t(len(mapped)), states):
                raise OSError(ctypes.get_errno(), f"mincore of {file}")
            del view
            there, pages = there + sum(state & 1 for state in states), pages + count
    return there / pages


def in_a_process(model: Path) -> dict[str, float]:
    """Seconds from the command to the first pass, of them those of imports and of loading; bytes at most."""
    started = time.monotonic()
    words = [sys.executable, "-m", "studies.startup", "--loading", str(model)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError("loading failed in its process", done.stderr.strip().splitlines()[-1])
    told = json.loads(done.stdout)
    return {
        "first_step": told["ended"] - started,
        "imports": told["began"] - started,
        "load": told["ended"] - told["began"],
        "load_cpu": told["cpu"],
        "session": told["session"],
        "peak_bytes": told["peak_bytes"],
    }


def loaded_from(model: Path) -> dict[str, float]:
    """Of this process: when loading began, when the transformer was called and all its weights were touched."""
    began, cpu = time.monotonic(), time.process_time()
    config = GenerateConfig(model=str(model), steps=1, dtype="bfloat16")
    with session(config, "cpu") as ready, stopping_at(ready.loaded.pipe.transformer):
        next(ready.videos([PROMPT]))
    ended, peak = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    cpu = time.process_time() - cpu
    return {"began": began, "ended": ended, "cpu": cpu, "session": ready.seconds, "peak_bytes": peak}


class FirstStep(Exception):
    """Everything before the first denoising step is done."""


@contextmanager
def stopping_at(transformer: nn.Module) -> Iterator[None]:
    """Ends the block when the transformer is first called."""

    def stop(*_: object) -> None:
        for weight in transformer.parameters():
            weight.view(torch.uint8).flatten()[:: mmap.PAGESIZE].sum()
        raise FirstStep

    hook = transformer.register_forward_pre_hook(stop, prepend=True)
    try:
        yield
    except FirstStep:
        pass
    finally:
        hook.remove()


def line(state: str, row: dict[str, Any]) -> str:
    cpu = f"processor {row['read_cpu']:.2f} and {row['load_cpu']:.2f} s"
    seconds = f"read in {row['read']:.2f} s, loaded in {row['load']:.2f} s ({row['ratio']:.2f} times; {cpu})"
    command = f"{row['first_step']:.1f} s from the command, imports {row['imports']:.1f}"
    memory = f"at most {row['peak_bytes'] / 1e9:.2f} GB resident; {row['cached']:.0%} cached before"
    return f"{state}: {row['bytes'] / 1e9:.2f} GB {seconds}; {command}; {memory}"


if __name__ == "__main__":
    app(prog_name="python -m studies.startup")
