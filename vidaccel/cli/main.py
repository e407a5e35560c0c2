"""The program: its commands, and how each of them ends.

Nothing here or in the command modules imports torch before a command runs, so that `--help` answers at once.
"""

import gc
from typing import Annotated

import typer

from vidaccel import __version__
from vidaccel.cli.benchmark import benchmark
from vidaccel.cli.collect_features import collect_features
from vidaccel.cli.common import print_any_character
from vidaccel.cli.distill import distill
from vidaccel.cli.generate import generate
from vidaccel.cli.train_predictor import train_predictor

app = typer.Typer(
    help="Make video diffusion transformers fast, and measure honestly what it cost.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"vidaccel {__version__}")
        raise typer.Exit


@app.callback()
def _program(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and stop.")
    ] = False,
) -> None:
    pass


app.command(no_args_is_help=True)(generate)
app.command()(collect_features)
app.command()(distill)
app.command()(train_predictor)
app.command(no_args_is_help=True)(benchmark)


def main() -> None:
    print_any_character()
    try:
        app(prog_name="vidaccel")
    finally:
        gc.freeze()  # a last look for garbage among all that is imported takes a second, and it ends with the process
