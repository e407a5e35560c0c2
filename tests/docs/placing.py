"""Examples of docs/extending*.md put where their first lines say: files, lines of tables, statements."""

import importlib
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.docs.pages import EXTENDING, ROOT, Code, blocks
from vidaccel.config import loader

FIRST = re.compile(r"# ([\w./]+)(?:, in (\w+)|, the last line of ([\w.]+))?\n")


class Placed:
    """The blocks of one example, in place until `undo`."""

    def __init__(self, name: str, folder: Path, patch: pytest.MonkeyPatch):
        self.folder, self.patch = folder, patch
        self.namespaces: dict[str, dict] = {}
        """What statements for files that there are left behind, by their path."""
        self.last_lines: dict[str, str] = {}
        """Last lines of functions, by the names of those."""
        self.added: set[str] = set()
        """Modules."""
        for code in examples()[name]:
            self._place(code)

    def _place(self, code: Code) -> None:
        path, table, function = FIRST.match(code.text).groups()
        text = code.text.partition("\n")[2]
        if function:
            self.last_lines[function] = text
        elif table:
            module = importlib.import_module(_module(path))
            for key, value in eval(f"{{{text}}}", vars(module)).items():
                assert key not in getattr(module, table)
                self.patch.setitem(getattr(module, table), key, value)
        elif code.language == "yaml":
            self._write(path, code.text)
        elif (ROOT / path).exists():
            names = vars(importlib.import_module(_module(path)))
            self.namespaces[path] = {name: dict(it) if type(it) is dict else it for name, it in names.items()}
            exec(text, self.namespaces[path])
        else:
            self._write(path, code.text)
            self._find(path)

    def _write(self, path: str, text: str) -> None:
        file = self.folder / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)

    def _find(self, path: str) -> None:
        """Let Python find a module of the package that lies elsewhere."""
        module = _module(path)
        self.added.add(module)
        parts = module.split(".")
        for depth in range(1, len(parts)):
            parent, beside = ".".join(parts[:depth]), str(self.folder / Path(*parts[:depth]))
            if (ROOT / Path(*parts[:depth])).is_dir():
                package = importlib.import_module(parent)
                if beside not in package.__path__:
                    self.patch.setattr(package, "__path__", [*package.__path__, beside])
            else:
                self.added.add(parent)
                (self.folder / Path(*parts[:depth]) / "__init__.py").touch()

    def undo(self) -> None:
        for module in self.added:
            sys.modules.pop(module, None)
            parent, _, name = module.rpartition(".")
            if parent in sys.modules:
                vars(sys.modules[parent]).pop(name, None)


def _module(path: str) -> str:
    return path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def examples() -> dict[str, list[Code]]:
    found: dict[str, list[Code]] = {}
    for page in EXTENDING:
        for code in blocks(page):
            if code.example:
                found.setdefault(code.example, []).append(code)
    return found


def place(name: str, folder: Path) -> Iterator[Placed]:
    """For a fixture."""
    with pytest.MonkeyPatch.context() as patch:
        placed = Placed(name, folder, patch)
        conf = folder / "conf"
        shutil.copytree(ROOT / "conf", conf, dirs_exist_ok=True)
        patch.setattr(loader, "conf_root", lambda: conf)
        yield placed
        placed.undo()
