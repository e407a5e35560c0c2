"""Other libraries' private names are used in vidaccel/compat/ alone: found by reading the syntax of every file.

A private name begins with one underscore. It is ours if the package defines it (a function, class, variable, parameter
or attribute of `self`), unless it is one of the classes that ours inherit from: overriding theirs is using it.
"""

import ast
import functools
from collections.abc import Iterator
from pathlib import Path

import pytest
from diffusers.hooks import ModelHook
from diffusers.hooks.hooks import BaseState, StateManager
from torch import nn
from torch.overrides import TorchFunctionMode

import vidaccel

PUBLIC = {
    "_exit": "os._exit is documented",
    "_class_name": "a key of the config.json and model_index.json that diffusers writes: a format of files",
    "_diffusers_version": "another",
    "_name_or_path": "another",
    "_asdict": "a documented method of named tuples",
    "_replace": "another",
    "_keys": "the end of a key in what diffusers says of loading, missing_keys and the like",
    **dict.fromkeys(
        (
            *("_native_math", "_native_flash", "_native_efficient", "_native_cudnn", "_native_npu"),
            *("_flash_3", "_flash_varlen_3", "_flash_3_varlen_hub"),
        ),
        "diffusers' documented name of an attention backend, which users write",
    ),
}
"""Names with an underscore that are public all the same -> why."""

ROOT = Path(vidaccel.__file__).parents[1]
FILES = [
    file
    for folder in ("vidaccel", "studies")
    for file in sorted((ROOT / folder).rglob("*.py"))
    if not {"compat", "sprites_h200"} & set(file.relative_to(ROOT).parts)  # the second's scripts are kept as they ran
]


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and name.isidentifier() and name != "_"


INHERITED = (nn.Module(), ModelHook(), StateManager(BaseState), TorchFunctionMode())
THEIRS = {name for each in INHERITED for name in dir(each) if is_private(name)}


def defined(tree: ast.AST) -> set[str]:
    """The private names that a file defines; those of `THEIRS` among them are methods and attributes of modules."""
    names = set()
    for node in ast.walk(tree):
        match node:
            case ast.FunctionDef(name=name) | ast.ClassDef(name=name) | ast.arg(arg=name):
                names.add(name)
            case ast.Name(id=name, ctx=ast.Store()):
                names.add(name)
            case ast.Attribute(value=ast.Name(id="self" | "cls"), attr=name, ctx=ast.Store()):
                names.add(name)
    return {name for name in names if is_private(name)}


def mentioned(node: ast.AST) -> list[str]:
    """The dotted or plain names that a node of the syntax tree uses, also as text for getattr and the like."""
    match node:
        case ast.Import(names=aliases):
            return [alias.name for alias in aliases]
        case ast.ImportFrom(module=str(module), names=aliases) if not module.startswith("vidaccel"):
            return [module, *(alias.name for alias in aliases)]
        case ast.Attribute(attr=name) | ast.Constant(value=str(name)):
            return [name]
    return []


def uses(tree: ast.AST, ours: set[str]) -> Iterator[tuple[int, str]]:
    """(line, name) of each private name that is neither in `ours` nor in `PUBLIC`."""
    pieces = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values}
    for node in ast.walk(tree):
        if id(node) in pieces:  # of an f-string, whose names are not known before it is made
            continue
        parts = [part for name in mentioned(node) for part in name.split(".")]
        yield from ((node.lineno, part) for part in parts if is_private(part) and part not in ours | PUBLIC.keys())


@functools.cache
def trees() -> dict[Path, ast.AST]:
    """Of all files; when they are first asked for, not where tests are merely collected."""
    return {file: ast.parse(file.read_text()) for file in FILES}


@functools.cache
def ours() -> set[str]:
    return set().union(*map(defined, trees().values())) - THEIRS


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_private_names_of_other_libraries_are_used_in_compat_alone(file):
    assert list(uses(trees()[file], ours())) == []


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("import torch._dynamo", ["_dynamo"]),
        ("import torch\ntorch._C._cuda_init()", ["_C", "_cuda_init"]),
        ("from torch._inductor import config", ["_inductor"]),
        ("from diffusers.models.attention_dispatch import _Registry", ["_Registry"]),
        ("from vidaccel.sampling import _Passes", []),
        ("pipe._execution_device", ["_execution_device"]),
        ("getattr(module, '_hf_hook', None)", ["_hf_hook"]),
        ("vars(mesh).get('_pg_registry')", ["_pg_registry"]),
        ("class A(nn.Module):\n    def _apply(self, fn): return super()._apply(fn)", ["_apply"]),
        ("class A:\n    def __init__(self): self._own = 1\n    def get(self): return self._own", []),
        ("class A(ModelHook):\n    def __init__(self): self._is_stateful = True", ["_is_stateful"]),
        ("def _helper(_x): return _x\n_helper(1).__class__", []),
        ("'_two words'", []),
        ("f'{kind}_keys'", []),
    ],
)
def test_the_check_itself(source, found):
    tree = ast.parse(source)
    names = [name for _, name in uses(tree, defined(tree) - THEIRS)]
    assert sorted(set(names)) == sorted(found)


def test_no_exception_outlives_its_use():
    used = {name for tree in trees().values() for node in ast.walk(tree) for name in mentioned(node)}
    assert PUBLIC.keys() - used == set()
