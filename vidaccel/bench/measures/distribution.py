"""How far a set of videos is from another as a whole: Frechet and kernel distances of what was measured of each.

Scores say whether a video is right; these also see what all of them have in common and should not, such as shorter
movement or softer edges. Both sets are points of a fixed space that a world's scorer measures, with no network in it.

N, M points, D features
"""

import numpy as np


def frechet(ours: np.ndarray, others: np.ndarray, weights: np.ndarray | None = None) -> float:
    """|m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^1/2) of the normal distributions through [N, D] and [M, D] (Heusel 2017).

    Args:
        weights: [N] how often each of `ours` counts.
    """
    (mean, covariance), (other_mean, other_covariance) = _moments(ours, weights), _moments(others, None)
    values, directions = np.linalg.eigh(other_covariance)
    root = directions * np.sqrt(values.clip(0)) @ directions.T
    middle = np.linalg.eigvalsh(root @ covariance @ root).clip(0)
    apart = np.square(mean - other_mean).sum()
    return float(max(0.0, apart + np.trace(covariance) + np.trace(other_covariance) - 2 * np.sqrt(middle).sum()))


def kernel_distance(ours: np.ndarray, others: np.ndarray) -> float:
    """Squared maximum mean discrepancy under the kernel (x y / D + 1)^3, without bias, so that it may be below 0
    (KID, Binkowski 2018)."""
    within = [_kernel(each, each) for each in (ours, others)]
    means = [(k.sum() - np.trace(k)) / (len(k) * (len(k) - 1)) for k in within]
    return float(sum(means) - 2 * _kernel(ours, others).mean())


def _kernel(ours: np.ndarray, others: np.ndarray) -> np.ndarray:
    return (ours @ others.T / ours.shape[1] + 1) ** 3


def _moments(points: np.ndarray, weights: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    weights = np.ones(len(points)) if weights is None else weights
    mean = weights @ points / weights.sum()
    centred = points - mean
    return mean, (weights[:, None] * centred).T @ centred / weights.sum()
