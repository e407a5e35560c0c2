"""Random scenes with their captions by their numbers, drawn in processes that import neither PyTorch nor the program.

A process is this file run on its own, pickles in and out: `multiprocessing` would import the caller's program again in
each (seconds of PyTorch, and a script that is not guarded would start anew), or fork one that uses a GPU.
"""

import os
import pickle
import random
import subprocess
import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from vidaccel.progress import Progress
from vidaccel.worlds import Split
from vidaccel.worlds.sprites.captions import caption, told
from vidaccel.worlds.sprites.world import Odds, Scene, random_scene

PART = 1000
"""Scenes that a process draws, which takes it some 0.2 s; it starts in 0.1 s."""


@dataclass(frozen=True)
class Scenes:
    """Random scenes without end: the i-th is a function of these settings and i alone."""

    seed: int
    split: Split = "train"
    pair_share: float = 0.5
    """Share of scenes with two sprites."""
    odds: Odds = field(default_factory=dict)
    lamps: float = 0.0
    """Share of scenes with lamps."""

    def scene(self, index: int) -> Scene:
        return self._draw(self._rng(index))

    def told(self, index: int, captions: int) -> tuple[Scene, list[str]]:
        """The scene, and as many captions of it as a training has them: some colours and motions are left unsaid."""
        rng = self._rng(index)
        scene = self._draw(rng)
        return scene, [caption(told(scene, rng), rng) for _ in range(captions)]

    def many(self, count: int, captions: int, processes: int | None = None) -> list[tuple[Scene, list[str]]]:
        """`told` of the first `count` scenes, by so many processes, one a core unless given, whatever their number."""
        self.scene(0)  # odds that cannot be are the caller's to hear of
        parts = [range(first, min(first + PART, count)) for first in range(0, count, PART)]
        processes = min(len(parts), processes or os.cpu_count() or 1)
        if processes < 2:
            return self._part(captions, range(count))
        drawn = []
        with ThreadPoolExecutor(processes) as pool, Progress("drawing scenes", total=count) as bar:
            for part in pool.map(lambda part: self._elsewhere(captions, part), parts):
                drawn += part
                bar.advance(len(part))
        return drawn

    def _part(self, captions: int, indices: Iterable[int]) -> list[tuple[Scene, list[str]]]:
        return [self.told(index, captions) for index in indices]

    def _elsewhere(self, captions: int, part: range) -> list[tuple[Scene, list[str]]]:
        """`_part` in a process of its own."""
        asked = pickle.dumps((self.seed, self.split, self.pair_share, dict(self.odds), self.lamps, captions, part))
        done = subprocess.run(
            [sys.executable, "-m", "vidaccel.worlds.sprites.drawing"],
            input=asked,
            stdout=subprocess.PIPE,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            check=True,
        )
        return pickle.loads(done.stdout)

    def _draw(self, rng: random.Random) -> Scene:
        return random_scene(rng, self.split, self.pair_share, self.odds, self.lamps)

    def _rng(self, index: int) -> random.Random:
        return random.Random(f"{self.seed}/{index}")


if __name__ == "__main__":
    *settings, captions, part = pickle.load(sys.stdin.buffer)
    pickle.dump(Scenes(*settings)._part(captions, part), sys.stdout.buffer)
