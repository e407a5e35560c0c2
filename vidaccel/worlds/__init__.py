"""Small worlds that vidaccel can show and score itself: models that ship, clips to train on, a program that scores.

A world is a package that has the names of `World`. Nothing outside imports it: it is found in `WORLDS` by its name and
imported when it is first asked for, so that a world of one's own is its folder and a line here.
"""

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from vidaccel.errors import UserError, nearest

if TYPE_CHECKING:
    import numpy as np

WORLDS = {"sprites": "vidaccel.worlds.sprites"}
"""Every world: name -> package."""

Split = Literal["train", "held_out"]
"""What models are trained on, and what they never see."""
Scores = Mapping[str, float]
"""Of one video, by dimension, 0 to 1."""


class Scorer(Protocol):
    """What tells how good a video is, from its frames and its prompt alone."""

    spreads: Mapping[str, float]
    """Score -> about the standard deviation, in points of a hundred, by which two samplings of one model differ from
    prompt to prompt: what tells beforehand how small a difference so many prompts can show. May be empty."""

    def held_out_prompts(self, count: int) -> list[str]:
        """The first `count` prompts of things that the world's models were never trained on."""
        ...

    def training_prompts(self, count: int) -> list[str]:
        """`count` prompts like those that they were trained on, for what is fitted before it is scored."""
        ...

    def choosing_prompts(self, count: int) -> list[str]:
        """`count` prompts for choosing settings on: of nothing that is held out, and not those of a training."""
        ...

    def score(self, frames: "np.ndarray", prompt: str) -> Scores:
        """Scores of one video, uint8 [T, H, W, 3]; `UserError` for a prompt that the world cannot judge."""
        ...

    def features(self, frames: "np.ndarray", prompt: str) -> list[list[float]]:
        """What is measured of each thing that such a video shows: points of one space, about 1 in size, in which sets
        of videos are compared as a whole; none where a world has no such measure."""
        ...

    def agreement(self, frames: "np.ndarray", reference: "np.ndarray", prompt: str) -> float | None:
        """How far two videos of a prompt agree in what it does not say, 0 to 1; None where there is nothing such."""
        ...

    def example(self, prompt: str, seed: int) -> "np.ndarray | None":
        """A video uint8 [T, H, W, 3] as the prompt asks for, which no model can do better than; None where the world
        cannot make one."""
        ...

    def meaning(self, prompt: str) -> str:
        """What the prompt says, in one form: prompts that mean the same are one observation, not two."""
        ...

    def totals(self, means: Mapping[str, "np.ndarray"]) -> dict[str, "np.ndarray"]:
        """`semantic`, `quality` and `total` from the dimensions' averages over videos, arrays of any one shape, in the
        unit that they are in; NaN, where no video that was drawn has a dimension, counts for nothing."""
        ...


class World(Protocol):
    """What the package of a world has."""

    SHIPPED: Path
    """A folder of model folders, if there are any; <name> in it is the shipped model WORLD/<name>."""

    def clip_source(self, loaded: Any, clips: int, seed: int, size: Mapping[str, int], fps: float) -> Any:
        """`clips` clips of that size and rate, a `vidaccel.collect.source.ClipSource`; None for a model of another
        world, `UserError` for a size or rate that the world has not."""
        ...

    def bank(self, loaded: Any, clips: int, captions: int, seed: int, split: Split) -> Any:
        """That many new clips with so many captions each, encoded by the model, a `vidaccel.collect.bank.Bank` on its
        device; None for a model of another world."""
        ...

    def scorer(self, prompts: str = "") -> Scorer:
        """With the world's own prompts or, where it has such, those of a set by its name; `UserError` if there is none.
        A world without sets takes no argument."""
        ...


def world(name: str) -> World:
    """The world of that name; `UserError` if there is none."""
    if name not in WORLDS:
        raise UserError(f"no world is called {name}", nearest(name, WORLDS))
    return importlib.import_module(WORLDS[name])  # type: ignore[return-value]  # a module has the protocol's names


def scorer_named(name: str) -> Scorer:
    """The scorer of `WORLD`, or of `WORLD/PROMPTS` with a set of prompts that the world has beside its own.

    Raises:
        UserError: there is no such world or set.
    """
    of_world, _, prompts = name.partition("/")
    found = world(of_world)
    sets = getattr(found, "PROMPTS", ())
    if prompts and prompts not in sets:
        raise UserError(f"{of_world} has no prompts called {prompts}", nearest(prompts, sets))
    return found.scorer(prompts) if prompts else found.scorer()


def shipped_models() -> dict[str, Path]:
    """The folder of every shipped model, by its name WORLD/<name>."""
    return {
        f"{name}/{folder.name}": folder
        for name in WORLDS
        for folder in sorted(world(name).SHIPPED.glob("*"))
        if folder.is_dir()
    }
