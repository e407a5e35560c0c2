"""`vidaccel collect-features`: clips and captions to what training reads, once."""

from pathlib import Path
from typing import Annotated

import typer

from vidaccel import api
from vidaccel.cli.common import Debug, Device, PrintConf, Settings, default_said, quiet_libraries, reported, settings


@reported
def collect_features(
    overrides: Settings = None,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Folder for the features.", show_default=False)
    ] = None,
    conf: Annotated[
        str | None, typer.Option("--conf", help=default_said("collect-features"), show_default=False)
    ] = None,
    device: Device = "auto",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say how many and how large, and stop.")] = False,
    print_conf: PrintConf = False,
    debug: Debug = False,
) -> None:
    """Encode clips and captions into a folder that `distill` and `train-predictor` read.

    The same command continues a run that was stopped.
    """
    config = settings("collect-features", conf, overrides or [], print_conf)
    quiet_libraries()
    planned = api.collect_features(config, output, device=device, dry_run=dry_run)
    typer.echo(str(planned) if dry_run else f"{output}: {planned}")
