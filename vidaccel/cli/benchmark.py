"""`vidaccel benchmark`: what every method costs and gains."""

import json
from typing import Annotated

import typer

from vidaccel.cli.common import Conf, Debug, PrintConf, quiet_libraries, reported, settings, split_settings
from vidaccel.errors import UserError


@reported
def benchmark(
    words: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Settings to change.")] = None,
    plan: Annotated[
        bool, typer.Option("--plan", help="Work out every method's cost on the full-size model, without its weights.")
    ] = False,
    conf: Conf = "sprites",
    as_json: Annotated[bool, typer.Option("--json", help="Print the results as one JSON object.")] = False,
    print_conf: PrintConf = False,
    debug: Debug = False,
) -> None:
    """Compare samplers, caches and the learned predictor on one model.

    vidaccel benchmark --plan --conf hunyuan_video
    """
    free, overrides = split_settings(words or [])
    if free:
        raise UserError(f'"{free[0]}" is neither a flag nor a key=value setting', "write settings as key=value")
    config = settings("benchmark", conf, overrides, print_conf)
    if not plan:
        raise UserError("this version plans and does not yet time", "add --plan")
    quiet_libraries()
    from vidaccel.bench.plan import plan as work_out

    results = work_out(config)
    if as_json:
        typer.echo(json.dumps(results, indent=2))
    else:
        _show(results)


def _show(results: dict) -> None:
    from rich.console import Console

    from vidaccel.bench.tables import plan_tables

    console = Console(highlight=False)
    for part in plan_tables(results):
        console.print(part)
