"""Triton reads TRITON_INTERPRET when it is first imported, and diffusers imports it: so it is set before all tests."""

import gc
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

gc.disable()  # until all is imported and collected: hardly any of it is ever garbage

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

from tests.students import save_teacher  # noqa: E402
from tests.tiny import tiny_pipeline  # noqa: E402
from vidaccel.models.loading import LoadedPipeline, load_pipeline  # noqa: E402

LONGEST = (
    *("own_model", "accelerate", "fuzz", "gpu", "runner", "distill", "training", "every_family", "parallel", "trainer"),
    *("shipped", "compile", "make", "throughput", "published", "config", "commands"),
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The files that take longest come first: at the end, one would keep one process busy while the others wait."""
    items.sort(key=lambda item: item.path.stem.removeprefix("test_") not in LONGEST)


def pytest_collection_finish() -> None:
    """What there is now, half a million objects, stays: the garbage collector would go through it all again each time,
    for a twentieth of the suite's time."""
    gc.freeze()
    gc.set_threshold(5_000, 10, 10)
    gc.enable()


@pytest.fixture(scope="session")
def saved(tmp_path_factory) -> Callable[[str], Path]:
    """`saved(family)`: the folder of that family's tiny pipeline, not to be written to."""
    folders: dict[str, Path] = {}

    def folder(family: str) -> Path:
        if family not in folders:
            folders[family] = tmp_path_factory.mktemp(family)
            tiny_pipeline(family).save_pretrained(folders[family])
        return folders[family]

    return folder


@pytest.fixture
def broken(saved, tmp_path) -> Path:
    """A copy of the tiny HunyuanVideo folder, for a test to break."""
    return Path(shutil.copytree(saved("hunyuan_video"), tmp_path / "model"))


@pytest.fixture(scope="session")
def teachers(tmp_path_factory) -> dict[str, LoadedPipeline]:
    """Tiny teachers loaded from their folders, for tests that change neither."""
    root = tmp_path_factory.mktemp("teachers")
    return {name: load_pipeline(save_teacher(root / name, name)) for name in ("hunyuan_video", "wan")}
