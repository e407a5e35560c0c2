"""What every command shares: how it fails, its settings, and its log lines on stderr."""

import functools
import logging
import re
import sys
from collections.abc import Callable
from typing import Annotated, TypeVar

import typer

from vidaccel.errors import TrainingFailed, UserError

Conf = Annotated[str, typer.Option("--conf", help="A shipped configuration, or the path of a YAML file.")]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
PrintConf = Annotated[bool, typer.Option("--print-conf", help="Print all settings and stop.")]
Settings = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Settings to change; --print-conf shows them all.")
]

_SETTING = re.compile(r"\+{0,2}[A-Za-z_][\w.]*=")


def reported(command: Callable) -> Callable:
    """A command that ends with 2 and one line and a hint for a user's mistake, 1 for a training that failed, and 130
    for Ctrl-C."""

    @functools.wraps(command)
    def run(*args, debug: bool = False, **kwargs):
        _log_to_stderr()
        try:
            return command(*args, debug=debug, **kwargs)
        except UserError as error:
            if debug:
                raise
            typer.echo(f"error: {error}", err=True)
            raise typer.Exit(2) from None
        except TrainingFailed as failure:
            if debug:
                raise
            typer.echo(f"error: {failure}", err=True)
            raise typer.Exit(1) from None
        except KeyboardInterrupt:
            if debug:
                raise
            typer.echo("interrupted", err=True)
            raise typer.Exit(130) from None

    return run


Schema = TypeVar("Schema")


def settings(command: str, conf: str, overrides: list[str], print_conf: bool) -> Schema:
    """The command's settings; printed, and the program ended, if that is all the user wants."""
    from vidaccel.config import loader as config

    loaded = config.load(command, config.SCHEMAS[command], conf, overrides)
    if print_conf:
        typer.echo(config.to_yaml(loaded), nl=False)
        raise typer.Exit
    return loaded


def split_settings(words: list[str]) -> tuple[list[str], list[str]]:
    """Positional words apart: those that are not `key=value`, and those that are."""
    overrides = [word for word in words if _SETTING.match(word)]
    return [word for word in words if word not in overrides], overrides


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
    """Keep diffusers' and transformers' warnings and progress bars off the user's terminal."""
    import diffusers
    import transformers

    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()
