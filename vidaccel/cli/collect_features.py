"""`vidaccel collect-features`: clips and captions to what training reads, once."""

from pathlib import Path
from typing import Annotated

import typer

from vidaccel.artefacts import check_output
from vidaccel.cli.common import Conf, Debug, Device, PrintConf, Settings, quiet_libraries, reported, settings
from vidaccel.errors import UserError


@reported
def collect_features(
    overrides: Settings = None,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Folder for the features.", show_default=False)
    ] = None,
    conf: Conf = "sprites",
    device: Device = "auto",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say how many and how large, and stop.")] = False,
    print_conf: PrintConf = False,
    debug: Debug = False,
) -> None:
    """Encode clips and captions into a folder that `distill` and `train-predictor` read.

    The same command continues a run that was stopped.
    """
    config = settings("collect-features", conf, overrides or [], print_conf)
    if output is None and not dry_run:
        raise UserError("no place was given for the features", "name a folder: -o runs/features")
    quiet_libraries()
    from vidaccel.collect.features import FORMAT
    from vidaccel.collect.job import collect, plan
    from vidaccel.collect.kinds import job_of
    from vidaccel.models.loading import load_pipeline

    if output is not None:
        check_output(output, FORMAT)
    job = job_of(load_pipeline(config.model, device=device, dtype=config.dtype), config)
    planned = plan(job)
    if dry_run:
        typer.echo(str(planned))
        return
    typer.echo(str(planned), err=True)
    collect(job, output)
    typer.echo(f"{output}: {planned}")
