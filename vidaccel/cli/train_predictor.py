"""`vidaccel train-predictor`: what stands in for a student's trunk on most steps, and on which of them."""

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

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
from vidaccel.config.predictor import PredictorConfig

if TYPE_CHECKING:  # which imports torch
    from vidaccel.cache.schedule import Schedule


@shared
def train_predictor(
    overrides: Settings = None,
    output: Annotated[
        Path, typer.Option("-o", "--output", help="Folder of the predictor, its schedules and checkpoints.")
    ] = Path("runs/predictor"),
    conf: Annotated[
        str | None, typer.Option("--conf", help=default_said("train-predictor"), show_default=False)
    ] = None,
    features: Annotated[
        Path | None, typer.Option(help="A folder from collect-features to learn from.", show_default=False)
    ] = None,
    plan: Planning = False,
    device: Device = "auto",
    print_conf: PrintConf = False,
    explain: Explain = None,
    debug: Debug = False,
) -> None:
    """Train a predictor for a student and search its schedules, going on where an earlier run was stopped.

    vidaccel train-predictor student=runs/student features=runs/features -o runs/predictor

    The student's own runs, where the settings want them and the features are encoded clips, are collected first.

    vidaccel train-predictor -o runs/predictor stage=search steps=8

    A search without --conf goes by the settings of the predictor's training, which name its student.

    vidaccel train-predictor --conf wan_14b --plan gpu=h100 price=2.5

    On many processes: torchrun --nproc-per-node=8 -m vidaccel train-predictor ...
    """
    given = [] if features is None else [f"features={features}"]
    words, planned = plan_settings(overrides or [], plan)
    config = settings("train-predictor", conf, [*words, *given], print_conf, explain, output)
    quiet_libraries()
    if plan:
        show_plan(config, planned, conf or default_conf("train-predictor", words), words)
        return
    schedules = api.train_predictor(config, output, device=device)
    for schedule in schedules:
        full, of = " ".join(map(str, schedule.full_steps)), f"{schedule.budget} of {schedule.steps}"
        typer.echo(f"{of} steps full, expected error {schedule.expected_error:.3f}: {full}")
    if schedules:
        made = {"learned": "the predictor and ", "multistep": "the scalars and "}.get(config.forecaster, "")
        typer.echo(f"{output}: {made}these schedules; {_generating(config, output, schedules)} runs it")
        if config.forecaster == "learned":
            typer.echo(f"to share: {output} without checkpoints/ and trajectories/")


def _generating(config: PredictorConfig, output: Path, schedules: "list[Schedule]") -> str:
    """The `vidaccel generate` that uses what was made, with about a third of the steps in full."""
    from vidaccel.forecasters.checkpoint import SCHEDULE_FILE
    from vidaccel.models.files import local_path

    by_folder = config.forecaster in ("learned", "multistep", "linear")
    released = config.model is not None and local_path(config.student).is_file()
    words = [f"model={config.model} student={config.student}" if released else f"model={config.student}"]
    words += [f"lora=[{','.join(config.lora)}]"] if config.lora else []
    words += [f"predictor={output if by_folder else config.forecaster}"]
    words += [] if by_folder else [f"schedule={output / SCHEDULE_FILE}"]
    schedule = schedules[len(schedules) // 3]
    listed = {name: getattr(config, name) for name in ("timesteps", "sigmas") if getattr(config, name)}
    grid = listed or {"steps": schedule.steps}
    own = {name: getattr(config, name) for name in ("shift", "guidance", "guidance_2")}
    given = {name: value for name, value in own.items() if value is not None}
    said = ({"budget": schedule.budget} | grid | given).items()
    words += [f"{name}={str(value).replace(' ', '')}" for name, value in said]
    words += [shlex.quote(f"negative_prompt={config.negative_prompt}")] if config.negative_prompt else []
    return f"`vidaccel generate PROMPT {' '.join(words)}`"
