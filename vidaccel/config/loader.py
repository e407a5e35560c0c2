"""Every setting a user meets: dataclasses that validate themselves once, filled by Hydra from `conf/`.

`load` composes conf/<command>/<name>.yaml (or the YAML at a path) with `key=value` overrides and returns the dataclass.
A key that does not exist names its nearest neighbour; a value of the wrong type or out of range says what it may be."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from copy import copy, deepcopy
from dataclasses import fields, is_dataclass
from functools import cache
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, TypeVar, cast, get_args, get_origin, get_type_hints

from vidaccel.compat.hydra import quoted
from vidaccel.config.benchmark import BenchmarkConfig
from vidaccel.config.collect import CollectConfig
from vidaccel.config.distill import DistillConfig
from vidaccel.config.generate import GenerateConfig
from vidaccel.config.predictor import PredictorConfig
from vidaccel.errors import UserError, nearest

log = logging.getLogger(__name__)
Schema = TypeVar("Schema")


SCHEMAS = {
    "generate": GenerateConfig,
    "distill": DistillConfig,
    "collect-features": CollectConfig,
    "train-predictor": PredictorConfig,
    "benchmark": BenchmarkConfig,
}
"""Of each command; a world has settings of its own beside these."""


def conf_root() -> Path:
    """The folder of shipped YAMLs: inside the package in a wheel, beside it in a checkout."""
    package = Path(__file__).resolve().parents[1]
    return package / "conf" if (package / "conf").is_dir() else package.parent / "conf"


def load(command: str | Path, schema: type[Schema], conf: str, overrides: Sequence[str] = ()) -> Schema:
    """The settings of `command`: conf/<command>/<conf>.yaml, or the YAML file `conf`, then the overrides.

    A world, whose YAMLs lie with it, gives their folder in place of a command.

    Either may build on a shipped one, by its name: `defaults: [teacher, _self_]`.

    Raises:
        UserError: no such file, no such key, or a value the schema refuses.
    """
    path = _find(command, conf)
    words = [_override(word, schema) for word in overrides]
    return _checked(_composed(command, path, words), schema, path.name)


def again(schema: type[Schema], recorded: Mapping[str, Any], overrides: Sequence[str], where: str) -> Schema:
    """The settings that an earlier run recorded in the file `where`, with overrides; errors as `load`."""
    changes = _changes([_override(word, schema) for word in overrides], where)
    return _checked(_merged(with_current_names(recorded, schema, where), changes), schema, where)


def settings_of(command: str, config: Schema | str, changes: Mapping[str, Any]) -> Schema:
    """Settings as Python gives them: the dataclass itself, or what `load` takes for `conf`, with `changes` made to it.

    A key is the name of a setting, "train.steps" that of one in a group; so is {"train": {"steps": 5}}. What is a
    mapping is merged into what is there, all else takes its place.

    Raises:
        UserError: as `load`, or the settings of another command.
    """
    schema = SCHEMAS[command]
    if isinstance(config, schema):
        where, settings = schema.__name__, to_dict(config)
    elif isinstance(config, str | Path):
        path = _find(command, str(config))
        where, settings = path.name, _composed(command, path, [])
    else:
        raise UserError(
            f"{type(config).__name__} is not what {command} is configured by", f"give a {schema.__name__} or a name"
        )
    settings = with_current_names(settings, schema, where)
    for key, value in changes.items():
        for part in reversed(key.split(".")):
            value = {part: value}
        settings = _merged(settings, value)
    return _checked(settings, schema, where)


def _merged(settings: Any, change: Any) -> Any:
    if isinstance(settings, Mapping) and isinstance(change, Mapping):
        return {**settings, **{key: _merged(settings.get(key), value) for key, value in change.items()}}
    if isinstance(change, Mapping):
        return {key: _merged(None, value) for key, value in change.items()}
    return str(change) if isinstance(change, Path) else change


def _changes(words: Sequence[str], where: str) -> dict[str, Any]:
    """What overrides say, in Hydra's grammar, beside no folder of configurations: Hydra takes a setting that is called
    like a folder there, as of a model, for the choice of a file in it."""
    from hydra import compose, initialize_config_dir
    from omegaconf import OmegaConf

    with _explained(where), initialize_config_dir(str(Path(__file__).parent), version_base=None):
        return cast("dict[str, Any]", OmegaConf.to_container(compose(None, list(words))))


def _composed(command: str | Path, path: Path, words: Sequence[str]) -> dict[str, Any]:
    """What the YAML file says with the overrides, in Hydra's grammar; nothing is checked yet."""
    folder = _folder(command)
    settings = deepcopy(_shipped(folder, path)) if path.is_relative_to(folder) else _read(folder, path)
    return _merged(settings, _changes(words, path.name)) if words else settings


@cache
def _shipped(folder: Path, path: Path) -> dict[str, Any]:
    """As `_read`, of a file in the folder of shipped ones, all of which stay as they are: once a process."""
    return _read(folder, path)


def _read(folder: Path, path: Path) -> dict[str, Any]:
    """What the YAML file says, with those that it builds on, beside it or in the folder of shipped ones."""
    from hydra import compose, initialize_config_dir
    from omegaconf import OmegaConf
    from yaml import YAMLError

    shipped = quoted(f"file://{folder}")
    try:
        with _explained(path.name), initialize_config_dir(str(path.parent), version_base=None):
            chosen = compose(path.stem, [f"hydra.searchpath=[{shipped}]"])
            return cast("dict[str, Any]", OmegaConf.to_container(chosen))
    except RecursionError:
        raise UserError(f"{path} builds on itself", "give it another name than what its defaults list") from None
    except (YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not YAML: {' '.join(str(error).split())}", "mend that line") from error


@contextmanager
def _explained(where: str) -> Iterator[None]:
    """What Hydra refuses of the settings in the file `where`, as a `UserError`."""
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    try:
        yield
    except (HydraException, OmegaConfBaseException) as error:
        reason = next(iter(str(error).splitlines()), "a key that is no name")  # OmegaConf says nothing of a null key
        raise UserError(f"{where}: {reason}", "see `--print-conf` for what can be set") from error


def _checked(settings: Mapping[str, Any], schema: type[Schema], where: str) -> Schema:
    """`settings`, which came from the file `where`, as the dataclass; `UserError` where it refuses them."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    settings = with_current_names(settings, schema, where)
    _check_keys(settings, schema, where)
    if "${" not in repr(settings):  # what refers to another setting needs the whole
        with suppress(OmegaConfBaseException):  # to be said below, with the row's name
            return _with_rows_apart(settings, schema)
    try:
        return cast(Schema, OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(schema), settings)))
    except OmegaConfBaseException as error:
        key = getattr(error, "full_key", None) or where
        raise UserError(f"{key}: {str(error).splitlines()[0]}", "see `--print-conf` for values that fit") from error


def _with_rows_apart(settings: Mapping[str, Any], schema: type[Schema]) -> Schema:
    """`settings` as the dataclass, its rows by name each made by itself: hundreds of them, as a benchmark has, take
    OmegaConf ten times as long within one tree."""
    from omegaconf import OmegaConf

    def made(node: Any) -> Any:
        return OmegaConf.to_object(node) if OmegaConf.is_config(node) else node

    groups = {}
    for group, row in _groups_of_rows(schema).items():
        rows = settings.get(group, {})
        if all(isinstance(name, str) for name in rows):
            groups[group] = {name: row(**_typed(row, given)) for name, given in rows.items()}
    rest = {key: value for key, value in settings.items() if key not in groups}
    merged = OmegaConf.merge(OmegaConf.structured(schema), rest)
    return schema(**{str(key): made(value) for key, value in merged.items()} | groups)


def _groups_of_rows(schema: type) -> dict[str, type]:
    """Those settings of `schema` that hold rows by name, and the dataclass of a row."""
    of_dict = {key: get_args(hint) for key, hint in get_type_hints(schema).items() if get_origin(hint) is dict}
    return {key: cast(type, args[1]) for key, args in of_dict.items() if is_dataclass(args[1])}


def _typed(schema: type, given: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of `schema` as plain values of their types. OmegaConf, which takes a millisecond a row, sees only those
    that it would change or refuse."""
    from omegaconf import OmegaConf

    hints = get_type_hints(schema)
    unfit = {key: value for key, value in given.items() if not _fits(value, hints[key])}
    if unfit:
        merged = OmegaConf.merge(OmegaConf.structured(schema), unfit)
        typed = cast("dict[str, Any]", OmegaConf.to_container(merged, throw_on_missing=True))
        unfit = {key: typed[key] for key in unfit}
    return deepcopy(dict(given)) | unfit


def _fits(value: Any, hint: Any) -> bool:
    """Whether the value is of that very type, all within it too."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin is UnionType:
        return any(_fits(value, each) for each in inner)
    if origin is list:
        return type(value) is list and all(_fits(each, inner[0]) for each in value)
    if origin is dict:
        return type(value) is dict and all(_fits(k, inner[0]) and _fits(each, inner[1]) for k, each in value.items())
    if hint is Any:
        return any(_fits(value, each) for each in (str, int, float, bool, NoneType))
    return type(value) is hint and value != "???"  # which stands for no value


def to_yaml(config: Any) -> str:
    """The settings as YAML text that `--conf` would accept."""
    from omegaconf import OmegaConf

    return OmegaConf.to_yaml(OmegaConf.create(to_dict(config)))


def to_dict(config: Any) -> dict[str, Any]:
    """The settings as plain dictionaries, lists and scalars, for run.json."""
    from omegaconf import OmegaConf

    rows = {key: getattr(config, key) for key in _groups_of_rows(type(config))}
    rest = copy(config)
    vars(rest).update(dict.fromkeys(rows, {}))
    return cast("dict[str, Any]", OmegaConf.to_container(OmegaConf.structured(rest))) | {
        key: {name: _row_to_dict(row) for name, row in group.items()} for key, group in rows.items()
    }


def _row_to_dict(row: Any) -> dict[str, Any]:
    default = type(row)()
    changed = {key: value for key, value in vars(row).items() if value != getattr(default, key)}
    return vars(default) | _typed(type(row), changed)


def with_current_names(settings: Mapping[str, Any], schema: type, where: str | None = None) -> dict[str, Any]:
    """`settings` as earlier versions wrote them, by the names that `schema` has now: its RENAMED, old name -> new, and
    what its `renamed_values` says of settings that are called as now.

    With `where`, the file that they come from, each old name is warned of.
    """
    renamed = getattr(schema, "RENAMED", {})
    hints = get_type_hints(schema)
    current = {key: value for key, value in settings.items() if key not in renamed}
    for old, new in renamed.items():
        if old in settings:
            current.setdefault(new, settings[old])  # an override has the new name
            if where is not None:
                log.warning('%s: "%s" is called "%s" now; the next release will not know the old name', where, old, new)
    values = schema.renamed_values(current) if hasattr(schema, "renamed_values") else {}
    for key, new in values.items() if where is not None else ():
        old = current[key]
        log.warning("%s: %s=%s is called %s now; the next release will not know the old value", where, key, old, new)
    current |= values
    for key, value in current.items():
        inner = hints.get(key)
        if not isinstance(value, Mapping):
            continue
        if is_dataclass(inner):
            current[key] = with_current_names(value, inner, where)
        elif get_origin(inner) is dict and is_dataclass(get_args(inner)[1]):
            each = cast(type, get_args(inner)[1])
            current[key] = {
                name: with_current_names(row, each, where) if isinstance(row, Mapping) else row
                for name, row in value.items()
            }
    return current


def as_recorded_now(recorded: Mapping[str, Any], now: Mapping[str, Any], schema: type) -> dict[str, Any]:
    """Settings that an earlier version recorded, as this one would: by their names of today, and those of `now` that it
    did not know at their defaults."""

    def filled(old: Mapping[str, Any], new: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
        result = {key: defaults[key] for key in new if key in defaults and key not in old} | dict(old)
        for key, value in new.items():
            if (
                isinstance(value, Mapping)
                and isinstance(old.get(key), Mapping)
                and isinstance(defaults.get(key), Mapping)
            ):
                result[key] = filled(old[key], value, defaults[key])
        return result

    return filled(with_current_names(recorded, schema), now, to_dict(schema()))


def _folder(command: str | Path) -> Path:
    return command if isinstance(command, Path) else conf_root() / command


def _find(command: str | Path, conf: str) -> Path:
    if conf.endswith((".yaml", ".yml")):
        path = Path(conf).resolve()
        if path.suffix == ".yml":
            raise UserError(f"{conf} does not end in .yaml", "rename it: Hydra reads no other suffix")
        if not path.is_file():
            raise UserError(
                f"no configuration file {conf}", "give the path of a YAML file, or the name of a shipped one"
            )
        return path
    folder = _folder(command)
    path = folder / f"{conf}.yaml"
    if not path.is_file():
        names = [str(p.relative_to(folder).with_suffix("")) for p in folder.rglob("*.yaml")]
        raise UserError(f'no configuration "{conf}" for {folder.name}', nearest(conf, names))
    return path


def _override(word: str, schema: type) -> str:
    """A `key=value` word, checked, as Hydra takes it.

    Text is quoted, unless it is already: to Hydra's grammar a comma in a path is a sweep and an accent an error.
    """
    key, equals, value = word.lstrip("+").partition("=")
    if not equals:
        raise UserError(f'"{word}" is neither a flag nor a key=value setting', "write settings as key=value")
    here, parts = schema, key.split(".")
    for place, part in enumerate(parts):
        if get_origin(here) is dict:  # of rows or settings by name
            here = get_args(here)[1]
            continue
        hints = get_type_hints(here) if is_dataclass(here) else {}
        if part in (renamed := getattr(here, "RENAMED", {})):
            log.warning('"%s" is called "%s" now; the next release will not know the old name', part, renamed[part])
            parts[place] = part = renamed[part]
        if part not in hints:
            known = list(hints) or [f.name for f in fields(schema)]
            raise UserError(f'there is no setting "{key}"', nearest(part, known))
        here = hints[part]
    if here in (str, str | None) and value != "null" and not value.startswith(("'", '"')):
        value = quoted(value)
    return f"++{'.'.join(parts)}={value}"


def _check_keys(chosen: dict, schema: type, where: str) -> None:
    hints = get_type_hints(schema)
    for key, value in chosen.items():
        if key not in hints:
            raise UserError(f'{where}: there is no setting "{key}"', nearest(str(key), hints))
        if is_dataclass(hints[key]):
            if not isinstance(value, dict):
                raise UserError(f"{where}: {key}={value!r}, where {key} is a group of settings", f"set {key}.<name>")
            _check_keys(value, hints[key], where)
        elif isinstance(value, list) and "list[list[" in str(hints[key]) and any(type(part) is int for part in value):
            raise UserError(f"{where}: {key}={value} is no list of lists", f"write {key}=[{value}]")
        elif get_origin(hints[key]) is dict and is_dataclass(row := get_args(hints[key])[1]):
            _check_rows(key, value, cast(type, row), where)


def _check_rows(group: str, rows: Any, schema: type, where: str) -> None:
    """Of a group of rows by name, such as `methods`, that each has settings of a row and no others."""
    if not isinstance(rows, dict):
        raise UserError(f"{where}: {group}={rows!r}, where {group} holds rows by name", f"set {group}.NAME.<setting>")
    known = get_type_hints(schema)
    for name, settings in rows.items():
        if not isinstance(settings, dict):
            raise UserError(f"{where}: the row {name} is {settings!r}, not settings", f"write {name}: {{steps: 20}}")
        for key in settings:
            if key not in known:
                meant = nearest(str(key), known)
                every = "" if meant.startswith("choose") else f" A row may have: {', '.join(sorted(known))}"
                raise UserError(f'{where}: the row {name} has no setting "{key}"', meant + every)
