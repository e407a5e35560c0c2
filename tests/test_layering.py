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
    "vidaccel",  # __init__.py: the version and the public names, imported when they are asked for
    "vidaccel.errors",
    "vidaccel.students",  # imported by diffusers
    "vidaccel.file_hashes",
    "vidaccel.artefacts",
    "vidaccel.locks",
    "vidaccel.prompts",
    "vidaccel.ranks",
    "vidaccel.progress",
    "vidaccel.numbers",
    "vidaccel.compat",
    "vidaccel.processes",
    "vidaccel.worlds",  # the table of worlds, which imports them by name
    "vidaccel.forecasters.registry",  # the table of forecasters, likewise
    "vidaccel.config",
    "vidaccel.kernels",
    "vidaccel.families",
    "vidaccel.models",
    "vidaccel.runtime",
    "vidaccel.data",
    "vidaccel.forecasters",
    "vidaccel.cache",
    "vidaccel.sampling",
    "vidaccel.session",
    "vidaccel.comparison",
    "vidaccel.collect",
    "vidaccel.train",
    "vidaccel.bench",
    "vidaccel.api",
    "vidaccel.cli",
    "vidaccel.__main__",
    "vidaccel.worlds.sprites",
    "vidaccel.sprites",
)
FILES = sorted(PACKAGE.rglob("*.py"))


def module(file: Path) -> str:
    parts = file.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module(file) for file in FILES}


def layer(name: str) -> int:
    """Position of the layer with the longest name that `name` lies in."""
    parts = name.split(".")
    names = (".".join(parts[:count]) for count in range(len(parts), 0, -1))
    return LAYERS.index(next(part for part in names if part in LAYERS and (part != "vidaccel" or len(parts) == 1)))


def imported(source: str) -> Iterator[tuple[int, str]]:
    """(line, module) of each import from this package; `from vidaccel import errors` imports vidaccel.errors."""
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
        ("vidaccel.errors", "import vidaccel.config.loader", True),
        ("vidaccel.config.loader", "from vidaccel.errors import UserError", False),
        ("vidaccel.data.clips", "from vidaccel.data.video import read_video", False),
        ("vidaccel.families.wan", "def f():\n    from vidaccel import sampling", True),
        ("vidaccel.models.loading", "if True:\n    import numpy, vidaccel.worlds.sprites.world as w", True),
        ("vidaccel.models.loading", "from vidaccel.worlds import WORLDS", False),
        ("vidaccel.artefacts", "from vidaccel import __version__", False),
        ("vidaccel.worlds.sprites.make", "from vidaccel.train.trainer import train", False),
        ("vidaccel.cli.main", "from vidaccel.worlds.sprites.__main__ import app", True),
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
        "imageio_ffmpeg",
        "matplotlib",
    }
    assert "typer" in loaded
    assert loaded & heavy == set()
