"""`vidaccel collect-features`: clips and captions to what training reads, once."""

import json
from pathlib import Path
from typing import Annotated

import typer

from vidaccel import api
from vidaccel.cli.common import (
    Debug,
    Device,
    Explain,
    PrintConf,
    Settings,
    default_said,
    quiet_libraries,
    settings,
    shared,
)


@shared
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
    explain: Explain = None,
    debug: Debug = False,
) -> None:
    """Encode clips and captions into a folder that `distill` and `train-predictor` read.

    vidaccel collect-features model=path/to/model data=clips num_frames=49 guidance=5 -o runs/features

    data= is a folder of videos with a file captions.jsonl in it, one line a video:

    {"file": "a.mp4", "caption": "a cat on a surfboard"}

    Size, frames, rate, guidance and negative prompt that are said here hold for all that is made of the features.

    The same command continues a run that was stopped.

    On many processes: torchrun --nproc-per-node=8 -m vidaccel collect-features ...
    """
    config = settings("collect-features", conf, overrides or [], print_conf, explain)
    quiet_libraries()
    planned = api.collect_features(config, output, device=device, dry_run=dry_run)
    if dry_run:
        typer.echo(str(planned))
        return
    model = config.model if not config.lora else f"{config.model} 'lora={json.dumps(config.lora)}'"
    learners = {"encoded": f"distill teacher={model}", "trajectory": f"train-predictor student={model}"}
    place = f" -o {output.with_name('cfg')}" if output and config.kind == "encoded" else ""  # the first of two students
    learns = f"`vidaccel {learners[config.kind]} features={output}{place}` learns from them"
    typer.echo(f"{output}: {planned.count} samples of the kind {config.kind}; {learns}")
