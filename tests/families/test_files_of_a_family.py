"""A family touches four files: its own, its line in the registry, its tiny builder for tests, its YAML.

So no other code of the package names one: not its record, its classes in diffusers or its name. Docstrings and comments
may say where a habit comes from.
"""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import vidaccel
from vidaccel.families.registry import FAMILIES

PACKAGE = Path(vidaccel.__file__).parent
ALLOWED = {
    "config/benchmark.py": "the family that a plan is of unless it says: HunyuanVideo, which the published rows are of",
    "worlds/sprites": "its model is a small HunyuanVideo, made of diffusers' classes",
}
"""Files and folders that may name a family -> why."""
FILES = [
    file
    for file in sorted(PACKAGE.rglob("*.py"))
    if file.relative_to(PACKAGE).parts[0] != "families"
    and not any(file.relative_to(PACKAGE).as_posix().startswith(allowed) for allowed in ALLOWED)
]


def stems() -> set[str]:
    """What the names of a family's classes in diffusers begin with."""
    return {family.transformer.removesuffix("Transformer3DModel") for family in FAMILIES.values()}


def names_a_family() -> re.Pattern[str]:
    names = [*FAMILIES, *(name.upper() for name in FAMILIES)]
    classes = [rf"\w*{stem}(?:[A-Z]\w*)?" for stem in stems()]
    return re.compile(rf"\b(?:{'|'.join([*names, *classes])})\b")


def code(source: str) -> Iterator[tuple[int, str]]:
    """(line, text) of every identifier, module path and string of a file but its docstrings."""
    tree = ast.parse(source)
    docs = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        match node:
            case ast.Constant(value=str(text)) if id(node) not in docs:
                yield node.lineno, text
            case ast.Name(id=text) | ast.Attribute(attr=text) | ast.arg(arg=text):
                yield node.lineno, text
            case ast.ImportFrom(module=str(module), names=names):
                yield from ((node.lineno, text) for text in (*module.split("."), *(name.name for name in names)))
            case ast.Import(names=names):
                yield from ((node.lineno, text) for name in names for text in name.name.split("."))


def mentions(source: str) -> list[str]:
    pattern = names_a_family()
    return [f"line {line}: {text}" for line, text in code(source) if pattern.search(text)]


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.relative_to(PACKAGE).as_posix())
def test_no_code_outside_its_folder_names_a_family(file):
    assert mentions(file.read_text()) == []


def test_what_is_allowed_is_used():
    for place in ALLOWED:
        files = [PACKAGE / place] if place.endswith(".py") else (PACKAGE / place).rglob("*.py")
        assert any(mentions(file.read_text()) for file in files), place


@pytest.mark.parametrize(
    "source",
    [
        "from diffusers import WanTransformer3DModel",
        "import vidaccel.families.wan",
        "from vidaccel.families.hunyuan_video_15 import HUNYUAN_VIDEO_15",
        "if family.name == 'wan': pass",
        "TEXTS = {'hunyuan_video': 1}",
        "type(model) is FusedHunyuanVideoBlock",
        "f(transformer_wan.WanAttnProcessor)",
    ],
)
def test_the_check_sees_a_name(source):
    assert mentions(source)


@pytest.mark.parametrize("source", ['"""As HunyuanVideo does."""', "x = 1  # Wan has none", "want = 'a swan'", "wandb"])
def test_the_check_lets_prose_pass(source):
    assert not mentions(source)


def test_a_family_has_its_own_folder_or_file_and_one_line_in_the_registry():
    for name, family in FAMILIES.items():
        own = [PACKAGE / "families" / name, PACKAGE / "families" / f"{name}.py"]
        assert sum(path.exists() for path in own) == 1
        owners = [other for other in FAMILIES if name.startswith(other)]  # or of the family that it varies
        assert family.fused is None or family.fused in {f"vidaccel.families.{owner}.fused" for owner in owners}
