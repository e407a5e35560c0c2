"""Settings with what they mean."""

from collections.abc import Iterator
from dataclasses import dataclass, field, fields, is_dataclass
from typing import get_type_hints

import pytest
import yaml
from typer.testing import CliRunner

from vidaccel.cli.main import app
from vidaccel.config.explained import commented, explain, meanings
from vidaccel.config.loader import SCHEMAS, to_yaml
from vidaccel.errors import UserError


@dataclass
class Group:
    """What a group is."""

    size: int = 2
    """How large,
    in words."""
    plain: bool = False


@dataclass
class Base:
    name: str = "a: b"
    """Of the base."""


@dataclass
class Settings(Base):
    group: Group = field(default_factory=Group)
    rows: dict[str, Group] = field(default_factory=lambda: {"one": Group()})
    """By name."""


def test_what_stands_under_a_field_is_its_comment():
    assert meanings(Group) == {"size": "How large, in words."}
    assert commented(Settings()) == (
        "# Of the base.\nname: 'a: b'\n# What a group is.\n"
        "group:\n  # How large, in words.\n  size: 2\n  plain: false\n"
        "# By name.\nrows:\n  one:\n    size: 2\n    plain: false\n"
    )
    assert explain(Settings, "group.size") == "group.size: int, 2 unless set. How large, in words."
    assert explain(Settings, "group") == "group: What a group is. It has group.size, group.plain."
    with pytest.raises(UserError, match='no setting "group.seize"') as caught:
        explain(Settings, "group.seize")
    assert caught.value.hint == 'did you mean "size"?'
    with pytest.raises(UserError, match='no setting "name.x"'):
        explain(Settings, "name.x")


@pytest.mark.parametrize("command", SCHEMAS)
def test_comments_change_no_setting_and_say_what_each_is(command):
    schema = SCHEMAS[command]
    text = commented(schema())
    assert yaml.safe_load(text) == yaml.safe_load(to_yaml(schema()))
    assert all(len(line) <= 118 for line in text.splitlines() if line.lstrip().startswith("#"))
    assert set(_silent(schema)) == set()


def _silent(schema: type, within: str = "") -> Iterator[str]:
    """Settings of which nothing is said."""
    kinds = get_type_hints(schema)
    for each in fields(schema):
        if is_dataclass(kinds[each.name]):
            yield from _silent(kinds[each.name], f"{within}{each.name}.")
        elif each.name not in meanings(schema):
            yield within + each.name
    for key in vars(schema()):
        assert explain(schema, key).startswith(f"{key}: ")


def test_from_the_command_line():
    said = CliRunner().invoke(app, ["distill", "--explain", "train.lora_rank"])
    assert said.exit_code == 0
    assert said.stdout.startswith("train.lora_rank: int, 0 unless set. Rank of low-rank adapters")
    said = CliRunner().invoke(app, ["generate", "--explain", "stepz"])
    assert said.exit_code == 2 and 'did you mean "steps"?' in said.stderr
    printed = CliRunner().invoke(app, ["train-predictor", "--print-conf"])
    assert "# Transformer blocks of the predictor.\nblocks: 1\n" in printed.stdout
