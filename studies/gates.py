"""The gates of a student: `python -m studies.gates runs/student --teacher sprites/teacher --distilled runs/cfg`.

How much of the guidance gap and of the mean-velocity gap it closes (vidaccel/train/gates.py): on scenes of the sprites
world that are held out, or on the last 2 % of a feature folder, which a training with `gate_samples` keeps out.
"""

import random
from pathlib import Path
from typing import Annotated, NamedTuple

import torch
import typer
from torch import Tensor, nn

from vidaccel.artefacts import write_json
from vidaccel.bench.environment import environment
from vidaccel.cli.common import Debug, Device, quiet_libraries, reported
from vidaccel.collect.encode import LATENT, batch, encode_samples, encode_texts
from vidaccel.collect.features import check_tensors, open_features
from vidaccel.data.shards import Sample
from vidaccel.errors import UserError
from vidaccel.models.calling import unwanted
from vidaccel.models.grid import fixed_shift
from vidaccel.models.loading import LoadedPipeline, load_pipeline
from vidaccel.models.velocity import Text, velocity_of
from vidaccel.models.weight_hashes import encoder_hashes
from vidaccel.train.clips import GATE_SHARE
from vidaccel.train.gates import (
    RUN_GUIDANCE,
    Measured,
    guidance_gap,
    mean_velocity_gap_closed,
)
from vidaccel.worlds.sprites.captions import caption, told
from vidaccel.worlds.sprites.render import render
from vidaccel.worlds.sprites.source import knows_sprites
from vidaccel.worlds.sprites.world import FPS, random_scene

ENCODED_AT_ONCE = 32

app = typer.Typer()


class Samples(NamedTuple):
    """Clips that were not trained on, noise for each, and what the teacher is told without a prompt."""

    x_0: Tensor
    eps: Tensor
    text: Text
    empty: Text


@app.command()
@reported
def main(
    model: Annotated[str, typer.Argument(help="A student: of few steps, or CFG-distilled.")],
    teacher: Annotated[str, typer.Option(help="The model, guided in two passes, whose student it is.")],
    distilled: Annotated[
        str | None, typer.Option(help="The CFG-distilled teacher of a student of few steps. Else its own r = t.")
    ] = None,
    features: Annotated[Path | None, typer.Option(help="Encoded clips; their last 2 % are taken.")] = None,
    samples: Annotated[int, typer.Option(min=2, help="Clips for the guidance gap.")] = 512,
    runs: Annotated[int, typer.Option(min=0, help="Captions for the mean-velocity gap, of the same; 0: none.")] = 512,
    run_guidance: Annotated[float, typer.Option(min=1, help="Scale of those runs.")] = RUN_GUIDANCE,
    batch_size: Annotated[int, typer.Option(min=1, help="Samples at once.")] = 32,
    seed: int = 0,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="A .json for the numbers.")] = None,
    device: Device = "auto",
    debug: Debug = False,
) -> None:
    """Compute the gates of a student, print them, and write them down."""
    quiet_libraries()
    loaded = load_pipeline(teacher, device=device, dtype="float32")
    student = _beside(loaded, model)
    frozen = _beside(loaded, distilled) if distilled else student
    two_pass, one_pass = velocity_of(loaded), velocity_of(student)
    if two_pass.embeds("g"):
        raise UserError(f"{teacher} is not guided in two passes", "name the teacher of the CFG distillation")
    if not one_pass.embeds("g"):
        raise UserError(f"{model} embeds no guidance scale", "name a student whose guidance was distilled")
    generator = torch.Generator().manual_seed(seed)
    taken = _samples(loaded, features, samples, seed, generator, away_from=unwanted(student))
    shift = fixed_shift(student.pipe.scheduler, student.family)
    guidance = guidance_gap(one_pass, two_pass, *taken, shift, generator, batch_size=batch_size)
    closed: dict[int, float] = {}
    if one_pass.embeds("r") and runs:
        noise, text = taken.eps[:runs], {name: tensor[:runs] for name, tensor in taken.text.items()}
        closed = mean_velocity_gap_closed(
            one_pass, velocity_of(frozen), noise, text, shift, run_guidance, batch_size=batch_size
        )
    measured = Measured(guidance, closed)
    typer.echo(str(measured))
    for gate in measured.gates:
        typer.echo(gate.said(model))
    if output is not None:
        counts = {"samples": len(taken.x_0), "runs": min(runs, len(taken.x_0)), "seed": seed, "shift": shift}
        counts |= {"teacher": teacher, "student": model, "distilled": distilled, "run_guidance": run_guidance}
        write_json(output, counts | measured.as_json() | {"environment": environment(device_of(loaded))})
        typer.echo(str(output))


def device_of(loaded: LoadedPipeline) -> torch.device:
    return torch.device(loaded.pipe.device)


def _beside(teacher: LoadedPipeline, model: str) -> LoadedPipeline:
    """That model, its encoders those of the teacher; `UserError` if its own are others."""
    denoisers = {denoiser.attribute for denoiser in teacher.family.denoisers}
    modules = {name: part for name, part in teacher.pipe.components.items() if isinstance(part, nn.Module)}
    given = {name: part for name, part in modules.items() if name not in denoisers}
    loaded = load_pipeline(model, device=device_of(teacher).type, dtype="float32", given=given)
    if encoder_hashes(loaded) != encoder_hashes(teacher):
        raise UserError(
            f"{model} and {teacher.source} have other text encoders or another autoencoder",
            "name the teacher that it was distilled from",
        )
    return loaded


def _samples(
    loaded: LoadedPipeline, features: Path | None, count: int, seed: int, generator: torch.Generator, away_from: str
) -> Samples:
    """`away_from` is the prompt that the teacher's guidance leads away from."""
    if features is None and not knows_sprites(loaded):
        raise UserError(f"no scenes can be rendered for {loaded.source}", "give encoded clips: --features FOLDER")
    rows = _scenes(loaded, count, seed) if features is None else _last(loaded, features, count)
    text = batch([tensors for tensors, _ in rows], device_of(loaded), torch.float32)
    x_0 = text.pop(LATENT)
    eps = torch.randn(x_0.shape, generator=generator).to(x_0)
    return Samples(x_0, eps, text, encode_texts(loaded, [away_from]))


def _scenes(loaded: LoadedPipeline, count: int, seed: int) -> list[Sample]:
    """Encoded scenes of combinations that training never sees, captioned as training's are."""
    rows: list[Sample] = []
    rng = random.Random(f"gates/{seed}")
    while len(rows) < count:
        scenes = [random_scene(rng, "held_out") for _ in range(min(ENCODED_AT_ONCE, count - len(rows)))]
        records = [{"caption": caption(told(scene, rng), rng), "fps": FPS} for scene in scenes]
        rows += encode_samples(loaded, list(render(scenes)), records, "float32")
    return rows


def _last(loaded: LoadedPipeline, folder: Path, count: int) -> list[Sample]:
    features = open_features(folder, "encoded", loaded.hashes)
    check_tensors(features, loaded)
    kept = max(1, round(GATE_SHARE * len(features)))
    return features.read(range(len(features) - min(count, kept), len(features)))


if __name__ == "__main__":
    app(prog_name="python -m studies.gates")
