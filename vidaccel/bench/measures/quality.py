"""How good videos are: their likeness to the baseline's at equal seeds, and scores where a world has a scorer.

Likeness is to the videos that the baseline, 50 steps of the teacher under two-pass guidance, makes from the same noise,
and to those of the same model's own full run, in which nothing was predicted or skipped.
The dynamic degree is how much a video changes from frame to frame, as a share of how much the baseline's does: motion
that slows down after distillation shows here. LPIPS is measured where its package is installed.
VBench's own package is asked in an environment of its own (bench/vbench.py), if one is named.

T frames, H and W pixels, P prompts
"""

import importlib.util
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import nn

from vidaccel.bench.generation import TimedGeneration
from vidaccel.bench.measures.distribution import frechet, kernel_distance
from vidaccel.bench.measures.pairs import Totals, averages, draws, interval
from vidaccel.config.benchmark import BenchmarkConfig
from vidaccel.errors import UserError
from vidaccel.worlds import Scorer, scorer_named

FIDELITY = ("latent_relative_l2", "psnr_db", "ssim", "lpips", "dynamic_degree")
AGREEMENT = "agreement"
"""What a world says of two videos (`Scorer.agreement`), beside them."""
FITTING_PROMPTS = 8
DISTRIBUTION_RESAMPLES = 400


def scorer_of(config: BenchmarkConfig) -> Scorer | None:
    """What scores this benchmark's videos; None where only their likeness to the baseline's is measured."""
    return scorer_named(config.scorer) if config.scorer else None


def prompts_of(config: BenchmarkConfig, count: int, stream: str = "report") -> list[str]:
    """The first `count` prompts of the configuration or, where it has none, of that stream of the scorer's world.

    Raises:
        UserError: there are fewer.
    """
    scorer = scorer_of(config)
    if scorer is not None and not config.prompts:
        return scorer.held_out_prompts(count) if stream == "report" else scorer.choosing_prompts(count)
    if len(config.prompts) < count:
        raise UserError(
            f"there are {len(config.prompts)} prompts, and {count} are asked for",
            "list more in prompts=[...], or set timed_prompts and scored_prompts",
        )
    return config.prompts[:count]


def fitting_prompts(config: BenchmarkConfig) -> list[str]:
    """What a forecaster may be fitted on: prompts that the scorer's world trains on, else the configuration's first."""
    scorer = scorer_of(config)
    if scorer is not None and not config.prompts:
        return scorer.training_prompts(FITTING_PROMPTS)
    return config.prompts[:FITTING_PROMPTS]


def likeness(made: TimedGeneration, reference: TimedGeneration, index: int) -> dict[str, float | None]:
    """Of video `index` of a batch to the baseline's only one, by the names in FIDELITY; None where it is infinite."""
    frames, others = made.frames[index], reference.frames[0]
    measured = fidelity(made.latents[index], reference.latents[0], frames, others)
    motion = mean_change(others)
    return {
        "latent_relative_l2": measured["latent_relative_l2"],
        "psnr_db": measured["psnr"] if np.isfinite(measured["psnr"]) else None,
        "ssim": measured["ssim"],
        "lpips": perceptual_distance(frames, others),
        "dynamic_degree": mean_change(frames) / motion if motion else None,
    }


def fidelity(
    latent: torch.Tensor,
    reference_latent: torch.Tensor,
    frames: np.ndarray | torch.Tensor,
    reference_frames: np.ndarray | torch.Tensor,
) -> dict[str, float]:
    """How near a sampler comes to a reference sampler from the same noise.

    Args:
        latent, reference_latent: final latents, of one shape.
        frames, reference_frames: decoded clips, uint8 [T, H, W, 3].

    Returns:
        "latent_relative_l2": |latent - reference| / |reference|; "psnr" in dB, infinite for equal frames; "ssim".
    """
    from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

    reference = reference_latent.float()
    pixels, reference_pixels = (torch.as_tensor(f).movedim(-1, 1).float() for f in (frames, reference_frames))
    return {
        "latent_relative_l2": float((latent.float() - reference).norm() / reference.norm()),
        "psnr": float(peak_signal_noise_ratio(pixels, reference_pixels, data_range=255.0)),
        "ssim": float(structural_similarity_index_measure(pixels, reference_pixels, data_range=255.0)),
    }


@cache
def perceptual_network() -> nn.Module | None:
    """LPIPS on AlexNet; None where the package is not installed.

    Raises:
        UserError: it is, and its weights cannot be had.
    """
    if importlib.util.find_spec("lpips") is None:
        return None
    from lpips import LPIPS

    try:
        return LPIPS(net="alex", verbose=False)
    except OSError as error:
        reason = " ".join(str(error).split())
        raise UserError(f"LPIPS cannot get its weights: {reason}", "go online once, or uninstall lpips") from error


def perceptual_distance(frames: np.ndarray, others: np.ndarray) -> float | None:
    """LPIPS of frames uint8 [T, H, W, 3], averaged over them; None without the package."""
    network = perceptual_network()
    if network is None:
        return None
    pixels, wanted = (torch.from_numpy(each).movedim(-1, 1) / 127.5 - 1 for each in (frames, others))  # [T, 3, H, W]
    with torch.no_grad():
        return float(network(pixels, wanted).mean())


def mean_change(frames: np.ndarray) -> float:
    """Mean absolute difference of neighbouring frames [T, H, W, 3], in levels of 255."""
    return float(np.abs(np.diff(frames.astype(np.int16), axis=0)).mean()) if len(frames) > 1 else 0.0


def columns(videos: Sequence[Mapping[str, Any]], own: str | None = None) -> dict[str, np.ndarray]:
    """Arrays [P] of all that was measured of a row's videos, NaN where it was not: dimensions in percent by their
    names, likeness to the baseline's videos as fidelity.<name>, to those of the row `own` as
    own_fidelity.<name>, what VBench says in percent as vbench.<dimension>."""
    found: dict[str, np.ndarray] = {}
    measured = (
        ("", 100.0, [video["marks"] for video in videos]),
        ("fidelity.", 1.0, [video["likeness"] for video in videos]),
        ("own_fidelity.", 1.0, [video.get("own", {}).get(own) for video in videos]),
        ("vbench.", 100.0, [video.get("vbench") for video in videos]),
    )
    for prefix, unit, values in measured:
        known = [each or {} for each in values]
        for name in dict.fromkeys(name for each in known for name in each):
            numbers = [each.get(name) for each in known]
            found[prefix + name] = np.array([np.nan if n is None else unit * n for n in numbers], dtype=np.float64)
    return {name: values for name, values in found.items() if not np.isnan(values).all()}


def summary(
    videos: Sequence[Mapping[str, Any]], meanings: Sequence[str], totals: Totals | None, own: str | None = None
) -> dict[str, Any]:
    """Fields of a run in results.json, from {"marks", "likeness", "own"} of each prompt's video: averages, and 95 %
    bootstrap intervals over meanings. Scores become percentages."""
    measured = columns(videos, own)
    if any(video["marks"] is None for video in videos):
        totals = None
    point = {name: float(mean[0]) for name, mean in averages(measured, np.ones((1, len(videos))), totals).items()}
    resampled = averages(measured, draws(tuple(meanings)), totals)
    scores = {name: value for name, value in point.items() if "." not in name}
    fields: dict[str, Any] = {name: scores.pop(name, None) for name in ("semantic", "quality", "total")}
    fields["dimensions"] = scores or None
    for group in ("fidelity", "own_fidelity"):
        known = any(name.startswith(f"{group}.") for name in point)
        names = [*FIDELITY, *([AGREEMENT] if f"{group}.{AGREEMENT}" in point else [])]
        fields[group] = {name: point.get(f"{group}.{name}") for name in names} if known else None
    return fields | {"intervals": {name: list(interval(resampled[name])) for name in point}}


def distribution(
    videos: Sequence[Mapping[str, Any]], others: Sequence[Mapping[str, Any]], meanings: Sequence[str]
) -> dict[str, Any] | None:
    """How far the videos as a whole are from `others`, by their features; None where there are too few for it.

    The interval is 1.96 standard errors each way, of these videos being drawn anew: what is drawn is itself farther off
    than it should be, so that percentiles would lie too high.
    """
    prompt = np.array([place for place, video in enumerate(videos) for _ in video.get("features", ())], dtype=int)
    ours, theirs = (
        np.array([point for video in each for point in video.get("features", ())]) for each in (videos, others)
    )
    if min(len(ours), len(theirs)) < 2:
        return None
    drawn = draws(tuple(meanings))[:DISTRIBUTION_RESAMPLES, prompt]
    resampled = np.array([frechet(ours, theirs, weights) for weights in drawn if weights.any()])
    found, error = frechet(ours, theirs), float(resampled.std())
    return {
        "clips": len(videos),
        "frechet": found,
        "interval": [max(0.0, found - 1.96 * error), found + 1.96 * error],
        "kernel": kernel_distance(ours, theirs),
    }
