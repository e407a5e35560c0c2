"""The layers of the package: a file imports only from its own and the ones above, inside functions as well."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import vidaccel

PACKAGE = Path(vidaccel.__file__).parent
LAYERS = (
    "vidaccel",  # __init__.py, which holds the version
    "vidaccel.errors",
    "vidaccel.artefacts",
    "vidaccel.progress",
    "vidaccel.config",
    "vidaccel.kernels",
    "vidaccel.models",
    "vidaccel.data",
    "vidaccel.sprites",
    "vidaccel.predictor",
    "vidaccel.cache",
    "vidaccel.sampling",
    "vidaccel.collect",
    "vidaccel.train",
    "vidaccel.bench",
    "vidaccel.cli",
    "vidaccel.__main__",
)
PROGRAMS = {f"vidaccel.sprites.{name}": "vidaccel.cli" for name in ("__main__", "make", "score_model", "ship")}
"""Modules that count as another layer than the package they lie in."""
FILES = sorted(PACKAGE.rglob("*.py"))


def module(file: Path) -> str:
    parts = file.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module(file) for file in FILES}


def layer(name: str) -> int:
    return LAYERS.index(PROGRAMS.get(name, ".".join(name.split(".")[:2])))


def imported(source: str) -> Iterator[tuple[int, str]]:
    """(line, module) of each import from this package; `from vidaccel import config` imports vidaccel.config."""
    for node in ast.walk(ast.parse(source)):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: imports are absolute here"
            inner = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name if name in MODULES else node.module for name in inner]
        yield from ((node.lineno, name) for name in names if name.split(".")[0] == "vidaccel")


def upward(name: str, source: str) -> list[str]:
    return [f"{name}:{line} imports {other}" for line, other in imported(source) if layer(other) > layer(name)]


@pytest.mark.parametrize("file", FILES, ids=module)
def test_a_file_imports_only_from_its_own_layer_and_those_above(file):
    assert upward(module(file), file.read_text()) == []


@pytest.mark.parametrize(
    ("name", "source", "wrong"),
    [
        ("vidaccel.errors", "import vidaccel.config", True),
        ("vidaccel.config", "from vidaccel.errors import UserError", False),
        ("vidaccel.data.clips", "from vidaccel.data.video import read_video", False),
        ("vidaccel.models.wan", "def f():\n    from vidaccel import sampling", True),
        ("vidaccel.models.wan", "if True:\n    import numpy, vidaccel.sprites.world as w", True),
        ("vidaccel.artefacts", "from vidaccel import __version__", False),
        ("vidaccel.sprites.render", "from vidaccel.train.loop import train", True),
        ("vidaccel.sprites.__main__", "from vidaccel.train.loop import train", False),
        ("vidaccel.train.loop", "from vidaccel.sprites.__main__ import make", True),
    ],
)
def test_the_check_itself(name, source, wrong):
    assert bool(upward(name, source)) == wrong


HELP = """
import sys
from vidaccel.cli.main import main

sys.argv = ["vidaccel", *sys.argv[1:]]
try:
    main()
except SystemExit as end:
    assert not end.code, end.code
print("LOADED", *sorted({name.partition(".")[0] for name in sys.modules}))
"""


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["generate", "--help"]], ids=" ".join)
def test_help_loads_nothing_heavy(arguments):
    done = subprocess.run([sys.executable, "-c", HELP, *arguments], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.rpartition("LOADED")[2].split())
    heavy = {
        "torch",
        "diffusers",
        "transformers",
        "numpy",
        "hydra",
        "omegaconf",
        "decord",
        "imageio_ffmpeg",
        "matplotlib",
    }
    assert "typer" in loaded
    assert loaded & heavy == set()
