"""What pyproject.toml says of the package, against the package."""

import ast
import re
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import vidaccel

ROOT = Path(vidaccel.__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
NAMES = {"PIL": "pillow", "yaml": "pyyaml", "hydra": "hydra-core"}
"""Modules whose distribution is called otherwise."""
UNDECLARED = {
    "packaging": "comes with hatchling and pytest",
    "jvp-flash-attention": "a rival's kernel, which the GPU study compares with where it is installed",
}
"""What tests and studies import all the same -> why."""


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def names(requirements: list[str]) -> set[str]:
    return {normal(Requirement(each).name) for each in requirements}


def imported(folder: str) -> dict[str, str]:
    """Distribution of each module of other projects that files in the folder import -> one of those files."""
    found = {}
    for file in sorted((ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            modules = []
            if isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module:
                modules = [node.module]
            for top in {module.partition(".")[0] for module in modules} - sys.stdlib_module_names:
                if top not in ("vidaccel", "tests", "studies"):
                    found.setdefault(normal(NAMES.get(top, top)), f"{file.relative_to(ROOT)} ({top})")
    return found


DEPENDENCIES = names(PROJECT["dependencies"])
EXTRAS = {extra: names(given) for extra, given in PROJECT["optional-dependencies"].items()}
OF_USERS = DEPENDENCIES.union(*(given for extra, given in EXTRAS.items() if extra != "dev"))


def test_all_that_is_imported_is_declared():
    assert {name: where for name, where in imported("vidaccel").items() if name not in OF_USERS} == {}


def test_all_that_is_declared_is_imported():
    assert OF_USERS - imported("vidaccel").keys() == set()


@pytest.mark.parametrize("folder", ["tests", "studies"])
def test_what_tests_and_studies_import_is_declared(folder):
    known = OF_USERS | EXTRAS["dev"] | UNDECLARED.keys()
    assert {name: where for name, where in imported(folder).items() if name not in known} == {}


def test_the_modules_with_names_of_their_own_are_of_those_distributions():
    installed = packages_distributions()
    assert {module: normal(installed[module][0]) for module in NAMES} == NAMES


def test_what_is_declared_is_pinned_where_it_is_tested():
    lines = (line.partition("#")[0].strip() for line in (ROOT / "constraints.txt").read_text().splitlines())
    assert DEPENDENCIES | EXTRAS["dev"] | EXTRAS["train"] <= names([line for line in lines if line])


def test_any_later_python_will_do():
    assert PROJECT["requires-python"] == ">=3.11"


def test_the_version_is_said_once():
    assert "version" in PROJECT["dynamic"] and "version" not in PROJECT
    said = [file for file in (ROOT / "vidaccel").rglob("*.py") if "__version__ =" in file.read_text()]
    assert said == [ROOT / "vidaccel" / "__init__.py"]
    done = subprocess.run([sys.executable, "-m", "vidaccel", "--version"], capture_output=True, text=True, check=True)
    assert vidaccel.__version__ in done.stdout
