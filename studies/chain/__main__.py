"""The whole chain of a world within a set time: `python -m studies.chain minutes=8`, and its pieces put together again.

Settings are those of settings.py, from NAME.yaml beside this file or a path (--conf), and KEY=VALUE words after it.
Another call in the same folder goes on from what is there. No network is needed.
"""

import logging
import sys
import time
from pathlib import Path
from typing import Annotated

import typer

from studies.chain.settings import CONF, ChainConfig
from vidaccel.cli.common import Debug, quiet_libraries, reported
from vidaccel.config import loader as configuration
from vidaccel.locks import locked
from vidaccel.worlds import world

STARTED = time.monotonic()
app = typer.Typer()


@app.command()
@reported
def run(
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Settings to change.")] = None,
    conf: Annotated[str, typer.Option(help="NAME.yaml beside this module, or a path.")] = "sprites",
    debug: Debug = False,
) -> None:
    """Run the named stages within the minutes; the pieces of what they made end in the setting `output`."""
    config = configuration.load(CONF, ChainConfig, conf, overrides or [])
    quiet_libraries()
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(message)s", force=True)
    from studies.chain.stages import Chain

    with locked(config.work):
        chain = Chain(config, STARTED)
        report = chain.run()
        files = chain.export()
    for name, stage in report["stages"].items():  # type: ignore[attr-defined]
        typer.echo(f"{name}, {stage['seconds']} s\n{stage['outcome']}")
    typer.echo("\n".join(map(str, files)))


@app.command()
@reported
def unpack(
    files: Annotated[list[Path], typer.Argument(help="All pieces that a chain wrote.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="A new folder.")] = Path("runs/chain/unpacked"),
    of_world: Annotated[str, typer.Option("--world", help="Whose chain it was.")] = "sprites",
    ship: Annotated[bool, typer.Option("--ship", help="Put them where the package's weights lie as well.")] = False,
    machine: Annotated[str | None, typer.Option(help="What trained them, for their cards.")] = None,
    debug: Debug = False,
) -> None:
    """Put the pieces together: model folders as the chain left them."""
    from studies.chain import pieces

    weights = world(of_world).SHIPPED
    for name in pieces.join(files, weights / "teacher", output):
        typer.echo(str(output / name))
    for name in pieces.ship(output, weights, machine) if ship else []:
        typer.echo(f"{weights / name}: shipped")


if __name__ == "__main__":
    words = sys.argv[1:]
    named = words[:1] in (["run"], ["unpack"]) or "--help" in words
    app(words if named else ["run", *words], prog_name="python -m studies.chain")
