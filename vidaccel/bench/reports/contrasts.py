"""Which row is better than which, in words: by the verdicts of paired differences, and by nothing else."""

from collections.abc import Iterator, Sequence
from typing import Any

from vidaccel.bench.measures.pairs import BETTER, OPEN, TOO_FEW, WORSE
from vidaccel.bench.results import BASELINE, EQUAL_TIME, NAMED, TRAINING_FREE
from vidaccel.config.benchmark import EQUAL_COMPUTE

QUESTIONS = {
    NAMED: "What was asked beforehand",
    EQUAL_COMPUTE: "Against the same model in as many full passes, by FLOPs",
    EQUAL_TIME: "Against the same model in as many full passes, as timed",
    TRAINING_FREE: "Against the best row without a trained network that costs no more",
    BASELINE: "Against the baseline",
}
"""Of a contrast in results.json, the most telling first, and what a reader is told of it."""
ABOUT = (
    "Differences in pairs of prompt and noise, with 95 % bootstrap intervals over meanings. A verdict is of a measure "
    "that was named beforehand, corrected (Holm) for all rows and measures of its table: one false claim in twenty "
    "tables."
)
SHOWN = ("own_fidelity.dynamic_degree",)
"""Without a verdict beside the endpoints: more motion is not better, and less is what shortcuts cost."""
UNDECIDED = (OPEN, TOO_FEW)
"""Verdicts that order nothing."""
NAMES = {
    "latent_relative_l2": "latent error",
    "psnr_db": "PSNR, dB",
    "ssim": "SSIM",
    "lpips": "LPIPS",
    "dynamic_degree": "motion",
    "agreement": "details that agree",
}


def tables_of(results: dict[str, Any], runs: Sequence[dict[str, Any]]) -> Iterator[tuple[str, list[str], list[list]]]:
    """Title, headings and lines of each question that these runs of results.json answer; none in files of before."""
    for question, title in QUESTIONS.items():
        asked = list(_contrasts(runs, question))
        wanted = dict.fromkeys((*results.get("endpoints", ()), *SHOWN)) if "endpoints" in results else ()
        names = [name for name in wanted if any(name in each["deltas"] for _, each in asked)]
        if names:
            lines = [
                [run["method"], each["with"], *(_cell(each["deltas"].get(n)) for n in names)] for run, each in asked
            ]
            yield title, ["method", "against", *map(measure, names)], lines


def orders(results: dict[str, Any], runs: Sequence[dict[str, Any]]) -> Iterator[str]:
    """A sentence for each question and measure with a verdict: which rows are better or worse than what they were held
    against, and how many are not told apart from it."""
    for question, title in QUESTIONS.items():
        asked = list(_contrasts(runs, question))
        for name in results.get("endpoints", ()):
            told: dict[str, list[str]] = {verdict: [] for verdict in (BETTER, WORSE, *UNDECIDED)}
            for run, each in asked:
                if name in each["deltas"]:
                    told[each["deltas"][name]["verdict"]].append(f"{run['method']} than {each['with']}")
            if any(told.values()):
                found = [f"{verdict}: {', '.join(told[verdict])}" for verdict in (BETTER, WORSE) if told[verdict]]
                for verdict in UNDECIDED:
                    if count := len(told[verdict]):
                        found.append(f"{verdict}: {count} {'row' if count == 1 else 'rows'}")
                yield f"{title}, {measure(name)}: {'; '.join(found)}."


def measure(name: str) -> str:
    """An endpoint for people: fidelity is to the baseline's videos, own_fidelity to the model's own full run."""
    group, _, key = name.rpartition(".")
    whose = {"": "", "fidelity": " to the baseline", "own_fidelity": " to its own full run", "vbench": " by VBench"}[
        group
    ]
    return NAMES.get(key, key.replace("_", " ")) + whose


def _contrasts(runs: Sequence[dict[str, Any]], question: str) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    for run in runs:
        for each in run.get("contrasts") or ():
            if each["question"] == question:
                yield run, each


def _cell(difference: dict[str, Any] | None) -> str:
    if difference is None:
        return ""
    delta, low, high = (f"{difference[key]:+.3g}" for key in ("delta", "low", "high"))
    return f"{delta} [{low}, {high}] {difference['verdict'] or ''}".rstrip()
