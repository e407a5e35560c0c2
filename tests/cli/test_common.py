"""How commands end."""

import logging

import pytest
import typer
from typer.testing import CliRunner

from vidaccel.cli.common import Debug, reported, split_settings
from vidaccel.errors import TrainingFailed, UserError


def end(error: BaseException, *args: str):
    app = typer.Typer()

    @app.command()
    @reported
    def command(debug: Debug = False) -> None:
        logging.getLogger("vidaccel.somewhere").warning("careful")
        raise error

    return CliRunner().invoke(app, list(args))


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (UserError("it is wrong", "mend it"), 2, "error: it is wrong\nhint: mend it\n"),
        (TrainingFailed("ten in a row"), 1, "error: ten in a row\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
    ],
)
def test_status_and_words(error, status, said):
    result = end(error)
    assert result.exit_code == status
    assert result.stderr == f"warning: careful\n{said}"
    assert end(error, "--debug").exception is error or status == 130


def test_a_bug_keeps_its_traceback():
    assert isinstance(end(ZeroDivisionError("ours")).exception, ZeroDivisionError)


def test_settings_are_told_from_the_prompt():
    words = ["a red circle = round", "steps=3", "+a.b=c", "x = y", "seed="]
    assert split_settings(words) == (["a red circle = round", "x = y"], ["steps=3", "+a.b=c", "seed="])
