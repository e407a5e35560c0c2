"""Numbers for people, and what is said of many of them: quartiles, intervals by resampling, corrected p-values."""

from collections.abc import Callable, Hashable, Sequence

import numpy as np

PREFIXES = ("", "k", "M", "G", "T", "P", "E")


def si(value: float, unit: str = "") -> str:
    """Three digits, a decimal prefix and the unit: 1234567 bytes ("B") are "1.23 MB"."""
    prefixes = iter(PREFIXES)
    prefix = next(prefixes)
    while value >= 999.5 and prefix != PREFIXES[-1]:
        value, prefix = value / 1000, next(prefixes)
    return f"{value:.3g} {prefix}{unit}".strip()


def rounded(value: float) -> str:
    """Three digits, and all of those before the point."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


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


def cluster_draws(clusters: Sequence[Hashable], resamples: int, seed: int = 0) -> np.ndarray:
    """[R, P] how often each of P items is drawn where whole clusters are, as many as there are, with replacement.

    Items that share a cluster are one observation made twice: drawing them apart would make intervals too narrow. One
    matrix serves every statistic of every column, and both sides of a pair.
    """
    numbers: dict[Hashable, int] = {}
    own = np.array([numbers.setdefault(cluster, len(numbers)) for cluster in clusters])
    count = len(numbers)
    drawn = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), size=resamples)
    return drawn[:, own].astype(np.float64)


def holm(p_values: Sequence[float]) -> list[float]:
    """The p-values corrected for there being so many (Holm 1979): the chance of one false claim among them stays below
    what each is compared with."""
    count, corrected, highest = len(p_values), [1.0] * len(p_values), 0.0
    for rank, place in enumerate(np.argsort(p_values, kind="stable").tolist()):
        highest = max(highest, min(1.0, (count - rank) * p_values[place]))
        corrected[place] = highest
    return corrected
