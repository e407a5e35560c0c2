"""`vidaccel benchmark`: what every method costs and gains."""

import json
import shlex
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import typer

from vidaccel import api
from vidaccel.cli.common import (
    Debug,
    Device,
    Explain,
    PrintConf,
    Settings,
    default_said,
    plan_settings,
    quiet_libraries,
    settings,
    shared,
    show,
    split_settings,
)
from vidaccel.config.defaults import default_conf
from vidaccel.errors import UserError
from vidaccel.ranks import refuse_many

WAYS = ("--plan", "--speedup", "--speedup --quality", "--random-weights")


@shared
def benchmark(
    words: Settings = None,
    speedup: Annotated[
        bool, typer.Option("--speedup", help="Time every method; count its passes, FLOPs and memory.")
    ] = False,
    quality: Annotated[
        bool, typer.Option("--quality", help="Score the videos too, and sweep the caches' thresholds.")
    ] = False,
    plan: Annotated[
        bool, typer.Option("--plan", help="Work out every method's cost on the full-size model, without its weights.")
    ] = False,
    random_weights: Annotated[
        bool, typer.Option("--random-weights", help="Time the full-size model with random weights.")
    ] = False,
    conf: Annotated[str | None, typer.Option(help=default_said("benchmark"), show_default=False)] = None,
    output: Annotated[
        Path, typer.Option("-o", "--output", help="A folder for results.json, report.html and pictures.")
    ] = Path("runs/bench"),
    device: Device = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print the results as one JSON object.")] = False,
    print_conf: PrintConf = False,
    explain: Explain = None,
    debug: Debug = False,
) -> None:
    """Compare samplers, caches and the learned predictor on one model.

    vidaccel benchmark --speedup

    vidaccel benchmark --speedup --quality model=path/to/model

    vidaccel benchmark --speedup --quality --conf mine student=runs/student predictor=runs/predictor

    vidaccel benchmark --plan --conf hunyuan_video

    vidaccel benchmark --plan --conf wan_14b memory=24GB gpu=rtx4090

    The videos of --quality on many processes: torchrun --nproc-per-node=8 -m vidaccel benchmark --speedup --quality ...
    """
    free, overrides = split_settings(words or [])
    if free:
        raise UserError(f'"{free[0]}" is neither a flag nor a key=value setting', "write settings as key=value")
    overrides, on_card = plan_settings(overrides, plan)
    if on_card is not None and as_json:
        raise UserError("what fits a card is printed as a table alone", "leave --json out, or the settings of the card")
    config = settings("benchmark", conf, overrides, print_conf, explain)
    if quality and not speedup:
        raise UserError("--quality was asked for without --speedup", "add --speedup: scores stand beside times")
    way = _way(plan=plan, speedup=speedup, random_weights=random_weights)
    if not quality:
        refuse_many(f"benchmark {way}")
    quiet_libraries()
    chosen = conf or default_conf("benchmark", overrides)
    command = shlex.join(["vidaccel", "benchmark", way, *["--quality"] * quality, "--conf", chosen, *overrides])
    results, lines = _work(way, config, output, quality, device, command)
    if as_json:
        typer.echo(json.dumps(results, indent=2))
    else:
        show(lines)
        if on_card is not None:
            from vidaccel.bench.plan_card import card_tables

            show(card_tables(results, config, on_card))


def _way(**flags: bool) -> str:
    asked = [f"--{name.replace('_', '-')}" for name, on in flags.items() if on]
    if len(asked) != 1:
        what = " and ".join(asked) + " were asked for together" if asked else "nothing was asked for"
        raise UserError(what, f"give one of {', '.join(WAYS)}")
    return asked[0]


def _work(
    way: str, config: Any, output: Path, quality: bool, device: str, command: str
) -> tuple[dict[str, Any], Iterable[Any]]:
    """results.json's content, and what to print of it."""
    from vidaccel.bench.reports.tables import plan_tables, speed_tables

    if way == "--plan":
        results = api.plan(config)
        return results, plan_tables(results)
    if way == "--random-weights":
        from vidaccel.bench.random_weights import time_random_weights

        results = time_random_weights(config, device)
        return results, speed_tables(results)
    results = api.benchmark(config, output, device=device, quality=quality, command=command)
    return results, [*speed_tables(results), f"{output}: results.json, report.html, pareto.png and sheet.png"]
