"""`python -m vidaccel.sprites`: the shipped world made from nothing, on a CPU or a GPU, resumable at every step.

make    text encoders -> autoencoder -> encoded clips -> teacher -> scores -> model folder with its card
render  clips of the world as mp4 with captions.jsonl
score   scores any model that knows the world's captions
ship    a distilled student, its predictor and its scalars, as the package has them
"""

import random
from pathlib import Path
from typing import Annotated

import typer

from vidaccel.cli.common import Debug, Device, quiet_libraries, reported, shared
from vidaccel.config import loader as configuration
from vidaccel.config.generate import GenerateConfig
from vidaccel.data.clips import write_clips
from vidaccel.errors import UserError
from vidaccel.locks import locked
from vidaccel.models.loading import load_pipeline
from vidaccel.processes import locked_by_first, processes
from vidaccel.worlds.sprites.captions import caption
from vidaccel.worlds.sprites.make import make_model
from vidaccel.worlds.sprites.render import render, to_uint8
from vidaccel.worlds.sprites.score_model import score_model
from vidaccel.worlds.sprites.settings import CONF, SpritesConfig
from vidaccel.worlds.sprites.ship import ship_decoder, ship_predictor, ship_scalars, ship_student
from vidaccel.worlds.sprites.world import FPS, random_scene

app = typer.Typer(help="The sprites world: make its model, render its clips, score a model.", no_args_is_help=True)

Settings = Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Settings to change.")]


@app.command()
@reported
def make(
    overrides: Settings = None,
    output: Annotated[
        Path, typer.Option("-o", "--output", help="Working folder; the model ends in its model/.")
    ] = Path("runs/sprites"),
    conf: Annotated[str, typer.Option(help="NAME.yaml beside this module's conf/default.yaml, or a path.")] = "default",
    debug: Debug = False,
) -> None:
    """Train everything, from the newest checkpoint of each stage, and score the result."""
    config = configuration.load(CONF, SpritesConfig, conf, overrides or [])
    quiet_libraries()
    with locked(output):
        make_model(config, output)
    typer.echo(f"{output / 'model'}: the trained pipeline, its scores and its card")


@app.command(name="render")
@reported
def render_clips(
    output: Annotated[Path, typer.Option("-o", "--output", help="A folder for mp4s and captions.jsonl.")],
    clips: Annotated[int, typer.Option(min=1, help="How many.")] = 100,
    seed: int = 0,
    held_out: Annotated[bool, typer.Option("--held-out", help="Combinations that training never sees.")] = False,
    lamps: Annotated[float, typer.Option(min=0, max=1, help="Share of scenes with lamps.")] = 0.0,
    debug: Debug = False,
) -> None:
    """Write clips of random scenes, each with a caption."""

    def one(index: int):
        rng = random.Random(f"{seed}/{index}")
        scene = random_scene(rng, "held_out" if held_out else "train", lamps=lamps)
        return to_uint8(render([scene])[0]).numpy(), caption(scene, rng)

    write_clips(output, map(one, range(clips)), FPS)
    typer.echo(f"{output}: {clips} clips and captions.jsonl")


@app.command()
@shared
def score(
    model: Annotated[str, typer.Argument(help="A model folder, or sprites/teacher.")] = "sprites/teacher",
    overrides: Settings = None,
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder for marks.jsonl and score.json.")] = Path(
        "runs/score"
    ),
    prompts: Annotated[int, typer.Option(min=1, help="Held-out prompts.")] = 256,
    lamps: Annotated[bool, typer.Option("--lamps", help="Those with lamps, for a model that knows them.")] = False,
    device: Device = "auto",
    debug: Debug = False,
) -> None:
    """Score a model's videos of held-out prompts; settings are those of `vidaccel generate`."""
    quiet_libraries()
    config = configuration.load("generate", GenerateConfig, "teacher", [f"model={model}", *(overrides or [])])
    with processes(), locked_by_first(output):
        loaded = load_pipeline(config.model, device=device, dtype=config.dtype, decoder=config.decoder)
        summary = score_model(loaded, config, prompts, output, lamps)
    for name, score in summary.items():
        typer.echo(f"{name:24} {score['mean']:6.2f}  [{score['low']:.2f}, {score['high']:.2f}]")


@app.command()
@reported
def ship(
    student: Annotated[Path | None, typer.Option(help="A finished `vidaccel distill` folder.")] = None,
    predictor: Annotated[Path | None, typer.Option(help="A `vidaccel train-predictor` folder.")] = None,
    scalars: Annotated[
        Path | None, typer.Option(help="A `vidaccel train-predictor forecaster=multistep` folder.")
    ] = None,
    decoder: Annotated[Path | None, typer.Option(help="A `vidaccel distill method=decoder` folder.")] = None,
    distilled: Annotated[
        Path | None, typer.Option(help="The CFG-distilled teacher of the student; not kept, unless it is given.")
    ] = None,
    results: Annotated[Path | None, typer.Option(help="The results.json that their cards quote.")] = None,
    remark: Annotated[str, typer.Option(help="What the student's card is to say of its training as well.")] = "",
    predictor_remark: Annotated[str, typer.Option(help="The same of the predictor's.")] = "",
    scalars_remark: Annotated[str, typer.Option(help="The same of the scalars'.")] = "",
    decoder_remark: Annotated[str, typer.Option(help="The same of the decoder's.")] = "",
    machine: Annotated[str | None, typer.Option(help="What the student was trained on, if not this machine.")] = None,
    output: Annotated[Path, typer.Option("-o", "--output", help="A folder with one for each.")] = Path("runs/shipped"),
    debug: Debug = False,
) -> None:
    """Put what was distilled from the shipped teacher into the form that it ships in, with cards: what is named."""
    made = {"student": student, "predictor": predictor, "scalars": scalars, "decoder": decoder}
    named = [name for name, folder in made.items() if folder is not None]
    if not named:
        raise UserError("nothing to ship is named", "name some of --student, --predictor, --scalars and --decoder")
    if student is not None:
        ship_student(student, distilled, results, remark, output / "student", machine)
    if predictor is not None:
        ship_predictor(predictor, results, output / "predictor", predictor_remark)
    if scalars is not None:
        ship_scalars(scalars, output / "scalars", scalars_remark)
    if decoder is not None:
        ship_decoder(decoder, output / "decoder", decoder_remark)
    typer.echo(f"{output}: {', '.join(named)}, with a card each")
