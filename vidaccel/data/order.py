"""The order in which samples are drawn: computed from (seed, position), so a position alone resumes a run.

No shuffle buffer, no state: an epoch is a permutation seeded by (seed, epoch), and epochs follow one another.
"""

import functools

import numpy as np


@functools.lru_cache(maxsize=4)  # a batch may span two epochs; a run may draw from two folders
def epoch_order(count: int, seed: int, epoch: int) -> np.ndarray:
    """The indices [count] in the order of one epoch: read-only, a function of the arguments alone."""
    order = np.random.default_rng([seed, epoch]).permutation(count)
    order.flags.writeable = False
    return order


def index_at(position: int, count: int, seed: int) -> int:
    """The index, below `count`, of the sample drawn at `position` (from 0, over all epochs)."""
    epoch, place = divmod(position, count)
    return int(epoch_order(count, seed, epoch)[place])
