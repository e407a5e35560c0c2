"""`vidaccel distill`: a model to one pass a step, or to few steps."""

from pathlib import Path
from typing import Annotated

import typer

from vidaccel import api
from vidaccel.cli.common import (
    Debug,
    Device,
    Explain,
    Planning,
    PrintConf,
    Settings,
    default_said,
    plan_settings,
    quiet_libraries,
    settings,
    shared,
    show_plan,
)
from vidaccel.config.defaults import default_conf


@shared
def distill(
    overrides: Settings = None,
    output: Annotated[
        Path, typer.Option("-o", "--output", help="Folder of what is made, its checkpoints and metrics.")
    ] = Path("runs/student"),
    conf: Annotated[str | None, typer.Option("--conf", help=default_said("distill"), show_default=False)] = None,
    plan: Planning = False,
    device: Device = "auto",
    print_conf: PrintConf = False,
    explain: Explain = None,
    debug: Debug = False,
) -> None:
    """Distil a model, or its decoder (method=decoder), going on where an earlier run of the same command was stopped.

    vidaccel distill teacher=path/to/model features=runs/features -o runs/cfg

    vidaccel distill --conf few_steps teacher=runs/cfg features=runs/features -o runs/student

    vidaccel distill --conf wan_14b/cfg --plan gpu=h100 price=2.5

    On many processes: torchrun --nproc-per-node=8 -m vidaccel distill ...
    """
    words, planned = plan_settings(overrides or [], plan)
    config = settings("distill", conf, words, print_conf, explain)
    quiet_libraries()
    if plan:
        show_plan(config, planned, conf or default_conf("distill", words), words)
        return
    if api.distill(config, output, device=device):
        from vidaccel.train.methods import method_of
        from vidaccel.train.methods.base import OtherTraining

        if isinstance(method := method_of(config.method), OtherTraining):
            typer.echo(f"{output}: {method.made.format(output=output)}")
        elif (other := _undistilled(output, config.denoiser)) is None:
            typer.echo(f"{output}: the student; `vidaccel generate PROMPT model={output}` runs it")
            typer.echo(f"to share: {output} without checkpoints/ and samples/")
        else:
            following = f"vidaccel distill teacher={output} denoiser={other} -o ANOTHER"
            typer.echo(f"{output}: its {config.denoiser}, no model yet; `{following}` distils the {other} too")


def _undistilled(output: Path, denoiser: str | None) -> str | None:
    """The other of two transformers, where only this one has been distilled."""
    if denoiser is None or not (output / "model_index.json").is_file():
        return None
    from vidaccel.models.folder import read_pipeline_folder

    made = read_pipeline_folder(output)
    others = [each.attribute for each in made.family.denoisers if each.attribute != denoiser]
    return next((name for name in others if name not in made.conditionings), None)
