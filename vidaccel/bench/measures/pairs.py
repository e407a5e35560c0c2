"""Differences between rows, in pairs: the same prompt from the same noise on both sides.

What makes one prompt harder than another is on both sides of a pair and falls out, so that a difference is known two to
eight times better than from two intervals of their own. Whole groups of prompts that mean the same are resampled.

P prompts, M meanings, R resamples
"""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from vidaccel.numbers import cluster_draws, holm

RESAMPLES = 4000
LEVEL = 0.05
"""Chance of a false claim among all verdicts on one question."""
LOWER_IS_BETTER = ("latent_relative_l2", "lpips")
"""Of the measures of fidelity."""
BETTER, WORSE, OPEN, TOO_FEW = "better", "worse", "not told apart", "too few prompts to tell"

Columns = Mapping[str, np.ndarray]
"""Of one row: name of what was measured -> values [P], NaN where there is none. Names of fidelity have a dot."""
Totals = Callable[[Mapping[str, np.ndarray]], Mapping[str, np.ndarray]]
"""A scorer's."""


class Difference(NamedTuple):
    """Between two rows, the first less the second."""

    delta: float
    low: float
    high: float
    """Ends of the 95 % interval, of this difference alone."""
    p: float
    """Two-sided, before any correction."""


@lru_cache(maxsize=2)
def draws(meanings: tuple[str, ...]) -> np.ndarray:
    """[R, P] how often each prompt is drawn, the same for every row."""
    return cluster_draws(meanings, RESAMPLES)


def averages(columns: Columns, drawn: np.ndarray, totals: Totals | None) -> dict[str, np.ndarray]:
    """[R] of each column and, of the dimensions among them, what the scorer makes of these; drawn [R, P]."""
    means = {}
    for name, values in columns.items():
        known = ~np.isnan(values)
        with np.errstate(invalid="ignore"):
            means[name] = drawn @ np.where(known, values, 0) / (drawn @ known)
    dimensions = {name: mean for name, mean in means.items() if "." not in name}
    return means | dict(totals(dimensions)) if totals and dimensions else means


def interval(resampled: np.ndarray) -> tuple[float, float]:
    """Ends of the 95 % interval of a statistic [R]."""
    low, high = np.nanpercentile(resampled, [2.5, 97.5]).tolist()
    return low, high


def differences(
    ours: Columns, others: Columns, meanings: Sequence[str], totals: Totals | None
) -> dict[str, Difference]:
    """Of everything that both rows have, over the prompts on which both have it."""
    shared = [name for name in ours if name in others]
    known = {name: ~np.isnan(ours[name]) & ~np.isnan(others[name]) for name in shared}
    shared = [name for name in shared if known[name].any()]
    sides = [{name: np.where(known[name], side[name], np.nan) for name in shared} for side in (ours, others)]
    ones = np.ones((1, len(meanings)))
    point, resampled = ([averages(side, drawn, totals) for side in sides] for drawn in (ones, draws(tuple(meanings))))
    found = {}
    for name in point[0]:
        delta, spread = float(point[0][name][0] - point[1][name][0]), resampled[0][name] - resampled[1][name]
        found[name] = Difference(delta, *interval(spread), p_value(delta, float(np.nanstd(spread)), len(set(meanings))))
    return found


def p_value(delta: float, error: float, meanings: int) -> float:
    """Of a difference with that standard error being none, by the normal distribution.

    M meanings can say no more than that all signs agree, which has a chance of 2^(1 - M): a handful tells nothing.
    """
    if delta == 0:
        return 1.0
    normal = math.erfc(abs(delta) / error / math.sqrt(2)) if error > 0 else 0.0
    return max(normal, smallest_p(meanings))


def smallest_p(meanings: int) -> float:
    """What any difference over so many meanings can reach."""
    return 2.0 ** (1 - meanings)


def lower_is_better(name: str) -> bool:
    return name.rpartition(".")[2] in LOWER_IS_BETTER


def verdicts(
    found: Sequence[Mapping[str, Difference]], endpoints: Sequence[str], meanings: int
) -> list[dict[str, dict[str, Any]]]:
    """What results.json says of the differences that answer one question: each with its interval and, of the
    `endpoints`, which were named beforehand, the p-value that Holm's correction leaves and a verdict.

    A verdict needs both: a corrected p-value below LEVEL, and an interval without 0. Where so few `meanings` were
    compared that none of the differences could have had one, whatever they are, it says that.
    """
    tested = [(place, name) for place, each in enumerate(found) for name in endpoints if name in each]
    corrected = dict(zip(tested, holm([found[place][name].p for place, name in tested]), strict=True))
    hopeless = len(tested) * smallest_p(meanings) >= LEVEL  # the least that Holm leaves of one
    told: list[dict[str, dict[str, Any]]] = []
    for place, each in enumerate(found):
        told.append({})
        for name, difference in each.items():
            told[-1][name] = difference._asdict() | {"p_holm": None, "verdict": None}
            if (p := corrected.get((place, name))) is not None:
                told[-1][name] |= {
                    "p_holm": p,
                    "verdict": TOO_FEW if hopeless else _verdict(name, difference, p),
                }
    return told


def _verdict(name: str, difference: Difference, corrected: float) -> str:
    if corrected >= LEVEL or difference.low <= 0 <= difference.high:
        return OPEN
    return BETTER if (difference.delta < 0) == lower_is_better(name) else WORSE


def smallest_difference(spread: float, meanings: int) -> float:
    """What is seen four times in five, where pairs differ by a standard deviation of `spread`: 2.8 standard errors."""
    return 2.8 * spread / math.sqrt(meanings)
