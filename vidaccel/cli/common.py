"""What every command shares: how it fails, its settings, and its log lines on stderr."""

import functools
import gc
import io
import logging
import re
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

from vidaccel.artefacts import RUN_FILE, last_checkpoint, read_run, told
from vidaccel.cli.together import LOST, one_of_many
from vidaccel.config.defaults import CONFS, default_conf
from vidaccel.config.plan import PlanConfig
from vidaccel.errors import FailedAlone, ProcessLost, TrainingFailed, UserError
from vidaccel.ranks import refuse_many

Device = Annotated[str, typer.Option(help="auto, cpu or cuda.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
PrintConf = Annotated[bool, typer.Option("--print-conf", help="Print all settings, what each means, and stop.")]
Explain = Annotated[
    str | None,
    typer.Option("--explain", metavar="KEY", help="Say what one setting means and stop.", show_default=False),
]
Planning = Annotated[
    bool,
    typer.Option("--plan", help="Work out FLOPs, hours, memory and disk (gpu=h100 price=2.5 gpus=[1,8]), and stop."),
]
Settings = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Settings to change; --print-conf shows them all.")
]


PREDICTOR = "predictor/1"
"""Format of the folders that schedules are searched for (forecasters/checkpoint.py, which imports torch)."""
PLANNED = ("distill", "train-predictor", "benchmark")
"""Commands with --plan."""
LONGEST = 500
"""Characters that are shown of an error that was not meant for a user."""
_SETTING = re.compile(r"\+{0,2}[A-Za-z_]\w*(\.[\w.-]*)?=")
"""Rows of a benchmark have hyphens in their names."""


def reported(command: Callable) -> Callable:
    """A command that ends with a line and a hint: with 2 for a user's mistake and for what the operating system says of
    a path, with 1 for a training that failed and for a fault of ours, and with 130 for Ctrl-C.

    Only --debug shows a traceback. More than one process of torchrun's is refused.
    """
    return _reported(command, together=False)


def shared(command: Callable) -> Callable:
    """A `reported` command whose work torchrun's processes share, or refuse: what they all have to say is said once."""
    return _reported(command, together=True)


def _reported(command: Callable, together: bool) -> Callable:
    @functools.wraps(command)
    def run(*args, debug: bool = False, **kwargs):
        print_any_character()
        _log_to_stderr()
        with one_of_many() as heard, _uncollected() if kwargs.get("plan") else nullcontext():
            try:
                if not together:
                    refuse_many(f"`{command.__name__.replace('_', '-')}`")
                return command(*args, debug=debug, **kwargs)
            except (typer.Exit, typer.Abort, BrokenPipeError):
                raise  # which end as they should
            except (Exception, KeyboardInterrupt) as error:
                if debug:
                    raise
                status, said = _ending(error, kwargs.get("output"))
                if heard(said, isinstance(error, ProcessLost)):
                    typer.echo(said, err=True)
                raise typer.Exit(status) from None

    return run


@contextmanager
def _uncollected() -> Iterator[None]:
    """Without looking for garbage, which takes as long as a plan does and finds none in what it imports."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def _ending(error: BaseException, output: Path | None) -> tuple[int, str]:
    """Exit status and last words of a command that writes to `output`."""
    if isinstance(error, FailedAlone) and error.__cause__ is not None:
        error = error.__cause__
    if isinstance(error, KeyboardInterrupt):
        return 130, _interrupted(output)
    if isinstance(error, TrainingFailed):
        return 1, f"error: {error}"
    if isinstance(error, ProcessLost):
        return 1, LOST
    user_error = told(error) if isinstance(error, OSError) else error
    if isinstance(user_error, UserError):
        return 2, f"error: {user_error}"
    said = " ".join(str(error).split())[:LONGEST]
    hint = "the same command with --debug shows where; if it is not yours to mend, it is a fault of vidaccel's"
    return 1, f"error: {type(error).__name__}{': ' if said else ''}{said}\nhint: {hint}"


def default_said(command: str) -> str:
    """What --help says of --conf, for a command whose default goes by the model."""
    _, shipped, own = CONFS[command]
    return f"A shipped configuration, or the path of a YAML file. Default: {shipped}; for a model of your own {own}."


def _interrupted(output: Path | None) -> str:
    """Where the same command goes on from: of a training its last checkpoint."""
    step = None if output is None else last_checkpoint(output)
    if step is None:
        collected = output is not None and any(output.glob("shard-*.tar"))
        if collected:
            return "interrupted; the same command goes on from what is collected"
        if output is not None and any(output.glob(".made/*.json")):
            return "interrupted; the same command goes on from the videos that are made"
        begun = output is not None and any(output.glob("**/metrics.jsonl"))
        return f"interrupted{'; nothing is saved yet, save_every= says how often' if begun else ''}"
    return f"interrupted; the same command goes on from {step}"


def print_any_character() -> None:
    """Characters that the console or its locale cannot show are printed as escapes, rather than ending the command."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


Schema = TypeVar("Schema")


def settings(
    command: str,
    conf: str | None,
    overrides: list[str],
    print_conf: bool,
    explain: str | None = None,
    searched: Path | None = None,
) -> Schema:
    """The command's settings, without a `conf` those of its model; printed, or the one called `explain` explained, and
    the program ended, if that is all the user wants.

    A search of schedules without a `conf` takes those that the folder `searched` was trained with.
    """
    from vidaccel.config import explained
    from vidaccel.config import loader as config

    schema = config.SCHEMAS[command]
    if explain:
        of_plan = command in PLANNED and explain in {field.name for field in fields(PlanConfig)}
        typer.echo(explained.explain(PlanConfig if of_plan else schema, explain))
        raise typer.Exit
    if searched and conf is None and "stage=search" in overrides and (searched / RUN_FILE).is_file():
        run = read_run(searched, PREDICTOR)
        loaded = config.again(schema, run["config"], overrides, str(searched / RUN_FILE))
    else:
        loaded = config.load(command, schema, conf or default_conf(command, overrides), overrides)
    if print_conf:
        typer.echo(explained.commented(loaded), nl=False)
        raise typer.Exit
    return loaded


def plan_settings(overrides: list[str], planning: bool) -> tuple[list[str], PlanConfig | None]:
    """The settings that are the command's own, and those of its plan; None where there are none.

    Raises:
        UserError: there are some, and no plan is asked for; or one of them is not possible.
    """
    own = [word for word in overrides if is_setting(word, PlanConfig)]
    if not own:
        return overrides, None
    if not planning:
        raise UserError(f"{own[0]} is for a plan", "add --plan, or leave it out")
    from vidaccel.config.loader import again

    return [word for word in overrides if word not in own], again(PlanConfig, {}, own, "--plan")


def show_plan(config: Any, plan: PlanConfig | None, conf: str, words: list[str]) -> None:
    """Print what the training of `config` costs, which is from the configuration `conf` changed by `words`."""
    from vidaccel.bench.plan_distill import plan_distillation
    from vidaccel.bench.plan_predictor import plan_predictor
    from vidaccel.bench.reports.training import training_tables
    from vidaccel.config.distill import DistillConfig

    of_student = isinstance(config, DistillConfig)
    key = "teacher" if of_student else "student"
    named = any(word.lstrip("+").startswith(f"{key}=") for word in words)
    plan = plan or PlanConfig()
    planned = (plan_distillation if of_student else plan_predictor)(config, plan, conf, named)
    show(training_tables(planned, plan))


def show(lines: Iterable[Any]) -> None:
    """Lines and tables."""
    from rich.console import Console

    console = Console(highlight=False)
    for line in lines:
        console.print(line, markup=False)


def split_settings(words: list[str]) -> tuple[list[str], list[str]]:
    """Positional words apart: those that are not `key=value`, and those that are."""
    overrides = [word for word in words if _SETTING.match(word)]
    return [word for word in words if word not in overrides], overrides


def is_setting(word: str, schema: type) -> bool:
    """Whether a word that looks like `key=value` begins with the name of a setting, of a group or an old one too."""
    key = word.lstrip("+").partition("=")[0].split(".")[0]
    return key in {field.name for field in fields(schema)} | set(getattr(schema, "RENAMED", {}))


def _log_to_stderr() -> None:
    """Warnings as `warning: ...` lines; the libraries' own only from errors upwards."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_LowerCaseLevel("%(levelname)s: %(message)s"))
    logger = logging.getLogger("vidaccel")
    logger.handlers = [handler]
    logger.setLevel(logging.INFO)
    logger.propagate = False


class _LowerCaseLevel(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        record.levelname = record.levelname.lower()
        return super().format(record)


def quiet_libraries() -> None:
    """Keep diffusers' and transformers' warnings and progress bars off the user's terminal, and one of torch's."""
    import diffusers
    import transformers

    # Autocast leaves a norm float32 weights beside bfloat16 input, and the kernels that are not fused are as exact.
    warnings.filterwarnings("ignore", message="Mismatch dtype between input and weight", category=UserWarning)
    warnings.filterwarnings("ignore", ".*all_gather_tensor. is deprecated", FutureWarning)  # in diffusers
    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()
