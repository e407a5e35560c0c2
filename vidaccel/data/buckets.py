"""Clips of several sizes (buckets): which size each is brought to, and batches that are each of one.

A size is (frames, height, width) of a video, in pixels.
"""

import copy
import math
from collections import Counter
from collections.abc import Hashable, Sequence

import numpy as np

Size = tuple[int, int, int]


def nearest(sizes: Sequence[Size], shape: float, height: float) -> Size:
    """Of sizes whose frames a clip fills: the nearest in shape, then the longest, then the nearest in height.

    Args:
        sizes: one or more.
        shape: width over height of the clip as it is shown.
        height: its pixels.
    """

    def distance(size: Size) -> tuple[float, int, float]:
        frames, own_height, width = size
        return abs(math.log(width / own_height / shape)), -frames, abs(math.log(own_height / height))

    return min(sizes, key=distance)


class Buckets:
    """Batches of samples of one size each, in an order that is computed from (seed, index) alone.

    An epoch has every sample: those of a size in a new order, cut into batches, the last of which is filled up from the
    first, and the batches of all sizes shuffled.
    """

    def __init__(self, sizes: Sequence[Hashable]):
        """`sizes` are those of each sample."""
        counts = Counter(sizes)
        numbers = {size: number for number, size in enumerate(counts)}
        which = np.array([numbers[size] for size in sizes])
        self.groups = [np.flatnonzero(which == number) for number in range(len(numbers))]
        """Samples of each size."""
        self.commonest = max(self.groups, key=len)
        """Those of the size that most have, of the first such."""
        self._epochs: dict[tuple[int, int, int], list[list[int]]] = {}

    def without(self, left_out: Sequence[int] | np.ndarray) -> "Buckets":
        """Those of all samples but these, which leave some of each size."""
        made = copy.copy(self)
        made.groups = [np.setdiff1d(group, left_out) for group in self.groups]
        made.commonest, made._epochs = np.setdiff1d(self.commonest, left_out), {}
        return made

    def batch(self, index: int, count: int, seed: int) -> list[int]:
        """The samples of batch `index`, counted from 0 over all epochs."""
        epoch, place = divmod(index, sum(math.ceil(len(group) / count) for group in self.groups))
        if (key := (count, seed, epoch)) not in self._epochs:
            if len(self._epochs) == 2:  # the one under way, and that of evaluations
                del self._epochs[next(iter(self._epochs))]
            self._epochs[key] = self._epoch(count, seed, epoch)
        return self._epochs[key][place]

    def _epoch(self, count: int, seed: int, epoch: int) -> list[list[int]]:
        drawn, batches = np.random.default_rng([seed, epoch]), []
        for group in self.groups:
            order = np.resize(group[drawn.permutation(len(group))], math.ceil(len(group) / count) * count)
            batches += order.reshape(-1, count).tolist()
        return [batches[place] for place in drawn.permutation(len(batches))]
