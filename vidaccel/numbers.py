"""Numbers for people, and what is said of many of them: quartiles, and intervals by resampling."""

from collections.abc import Callable, Sequence

import numpy as np

PREFIXES = ("", "k", "M", "G", "T", "P", "E")


def si(value: float, unit: str = "") -> str:
    """Three digits, a decimal prefix and the unit: 1234567 bytes ("B") are "1.23 MB"."""
    prefixes = iter(PREFIXES)
    prefix = next(prefixes)
    while value >= 999.5 and prefix != PREFIXES[-1]:
        value, prefix = value / 1000, next(prefixes)
    return f"{value:.3g} {prefix}{unit}".strip()


def quartiles(values: Sequence[float]) -> dict[str, float]:
    """{"median", "p25", "p75", "rounds"} of what was measured in so many rounds."""
    p25, median, p75 = np.percentile(values, [25, 50, 75]).tolist()
    return {"median": median, "p25": p25, "p75": p75, "rounds": len(values)}


def bootstrap(
    values: Sequence[float] | np.ndarray,
    statistic: Callable[[np.ndarray], np.ndarray] = np.mean,
    resamples: int = 1000,
    seed: int = 0,
) -> np.ndarray:
    """[2, ...] low and high end of the 95 % interval of a statistic of values [P, ...], by resampling the P of them.

    NaN, where a statistic is not defined for what was drawn, counts for nothing.
    """
    values, rng = np.asarray(values), np.random.default_rng(seed)
    samples = [statistic(values[rng.integers(len(values), size=len(values))]) for _ in range(resamples)]
    return np.nanpercentile(np.stack(samples), [2.5, 97.5], axis=0)
