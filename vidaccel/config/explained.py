"""Settings with what they mean: the text under each field of their dataclass, which Python itself does not keep."""

import ast
import functools
import inspect
import textwrap
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any, get_type_hints

import yaml

from vidaccel.config.checks import default
from vidaccel.errors import UserError, nearest

WIDTH = 118


@functools.cache
def meanings(schema: type) -> dict[str, str]:
    """What is written under each field that has such a text, on one line."""
    found: dict[str, str] = {}
    for cls in reversed([cls for cls in schema.__mro__ if is_dataclass(cls)]):
        try:
            (definition,) = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
        except (OSError, TypeError):  # made of another, with groups that explain themselves
            continue
        last = None
        for statement in getattr(definition, "body", []):
            if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
                last = statement.target.id
            elif isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant) and last:
                found[last] = " ".join(str(statement.value.value).split())
            else:
                last = None
    return found


def commented(config: Any, indent: str = "") -> str:
    """The settings as YAML that --conf would accept, what each means in a comment above it."""
    text = ""
    for field in fields(config):
        value = getattr(config, field.name)
        meaning = meanings(type(config)).get(field.name)
        if meaning is None and is_dataclass(value):
            meaning = inspect.getdoc(type(value))
        if meaning:
            text += textwrap.fill(meaning, WIDTH, initial_indent=f"{indent}# ", subsequent_indent=f"{indent}# ") + "\n"
        if is_dataclass(value):
            text += f"{indent}{field.name}:\n{commented(value, indent + '  ')}"
        else:
            dumped = yaml.safe_dump({field.name: _plain(value)}, sort_keys=False, allow_unicode=True)
            text += textwrap.indent(dumped, indent)
    return text


def explain(schema: type, key: str) -> str:
    """One setting, "train.steps" that of a group: what it may be, its default, what it means; of a group all it has.

    Raises:
        UserError: there is none of that name.
    """
    here: Any = schema
    field = None
    for part in key.split("."):
        known = {each.name: each for each in fields(here)} if is_dataclass(here) else {}
        if part not in known:
            raise UserError(f'there is no setting "{key}"', nearest(part, known))
        field, owner = known[part], here
        here = get_type_hints(here)[part]
    assert field is not None
    meaning = meanings(owner).get(field.name, "")
    if is_dataclass(here):
        names = ", ".join(f"{key}.{each.name}" for each in fields(here))
        return f"{key}: {meaning or inspect.getdoc(here)} It has {names}."
    kind = here.__name__ if isinstance(here, type) and not hasattr(here, "__args__") else str(here)
    shown = yaml.safe_dump(_plain(default(field)), default_flow_style=True).removesuffix("\n...\n").strip()
    return f"{key}: {kind}, {shown} unless set. {meaning}".rstrip()


def _plain(value: Any) -> Any:
    """Without dataclasses, as rows of a benchmark are."""
    if is_dataclass(value):
        return {field.name: _plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, Mapping):
        return {key: _plain(each) for key, each in value.items()}
    return [_plain(each) for each in value] if isinstance(value, list | tuple) else value
