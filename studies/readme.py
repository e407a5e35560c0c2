"""The figures in README.md, written from studies/results/*.json: no number there is typed by hand.

    make readme-figures

Between a line `<!-- figures: NAME -->` and the next `<!-- end of figures -->` stands what studies/results/NAME.json
says, a results.json of `vidaccel benchmark`. A test compares the two.
"""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vidaccel.artefacts import atomic_path
from vidaccel.bench.reports.plots import above_ours, write_pareto
from vidaccel.bench.reports.tables import failures, passes_text, si

ROOT = Path(__file__).parents[1]
README, RESULTS = ROOT / "README.md", ROOT / "studies" / "results"
BLOCK = re.compile(r"(<!-- figures: (\S+) -->\n).*?(<!-- end of figures -->)", re.DOTALL)
MISSING = """\
**Nothing has been measured yet**: there is no `studies/results/{name}.json`, and so there is no figure here.
"""


def main() -> None:
    """Rewrite README.md and, where there are results, draw the picture beside them."""
    for name in BLOCK.findall(README.read_text(encoding="utf-8")):
        file = RESULTS / f"{name[1]}.json"
        if file.exists():
            write_pareto(file.with_suffix(".png"), json.loads(file.read_text(encoding="utf-8"))["runs"])
    with atomic_path(README) as temporary:
        temporary.write_text(filled(README.read_text(encoding="utf-8"), RESULTS), encoding="utf-8")


def filled(text: str, results: Path) -> str:
    """`text` with what stands between its marks as the files in `results` have it."""
    return BLOCK.sub(lambda block: block[1] + figures(block[2], results) + block[3], text)


def figures(name: str, results: Path) -> str:
    """Markdown about one results file, or that there is none."""
    file = results / f"{name}.json"
    if not file.exists():
        return MISSING.format(name=name)
    found = json.loads(file.read_text(encoding="utf-8"))
    ran = [run for run in found["runs"] if run["passes"]]
    parts = [
        f"`{found['command']}` on {_machine(found['environment'])} "
        f"([all of it](studies/results/{name}.json)). Speedups are relative to {found['baseline']}.",
        _table(ran),
        *_standing(found["baseline"], ran),
        f"![Speed against quality](studies/results/{name}.png)",
        *_errors(found["runs"]),
    ]
    return "\n\n".join(parts) + "\n"


def _machine(environment: dict[str, Any]) -> str:
    threads = f"{environment['threads']} thread{'s' * (environment['threads'] > 1)}"
    where = environment["cpu"] if environment["device"] == "cpu" else environment["device"]
    return f"{where}, {threads}, torch {environment['versions']['torch']}"


def _table(runs: Sequence[dict[str, Any]]) -> str:
    headings = ["method", "passes", "seconds", "speedup", "by FLOPs", "cache", "total", "latent error"]
    lines = [headings, ["---", *["--:"] * (len(headings) - 1)], *map(_cells, runs)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _cells(run: dict[str, Any]) -> list[str]:
    speedup, seconds, fidelity = run["speedup"], run["denoise_seconds"], run["fidelity"]
    return [
        run["method"],
        passes_text(run),
        f"{seconds['median']:.3g}" if seconds else "",
        f"{speedup['measured']:.2f}x" if speedup["measured"] is not None else "",
        f"{speedup['ideal']:.2f}x" if speedup["ideal"] is not None else "",
        f"{si(run['cache_bytes'])}B" if run["cache_bytes"] else "",
        _total(run),
        f"{fidelity['latent_relative_l2']:.3f}" if fidelity else "",
    ]


def _total(run: dict[str, Any]) -> str:
    if run["total"] is None:
        return ""
    low, high = run["intervals"]["total"]
    return f"{run['total']:.1f} [{low:.1f}, {high:.1f}]"


def _standing(baseline: str, runs: Sequence[dict[str, Any]]) -> list[str]:
    """Where ours are not the best from 3x to 20x, if speedups are over the two-pass sampler."""
    over_another = any(run["method"] == baseline and not run["settings"]["two_pass"] for run in runs)
    if over_another or not any(run["total"] is not None for run in runs):
        return []
    others = [f"{run['method']} ({run['speedup']['measured']:.2f}x, {run['total']:.1f})" for run in above_ours(runs)]
    if not others:
        return ["From 3x to 20x no row has a higher total than a row with a predictor that is as fast."]
    said = "From 3x to 20x these have a higher total than every row with a predictor that is as fast: "
    return [said + ", ".join(others)]


def _errors(runs: Sequence[dict[str, Any]]) -> list[str]:
    lines = [f"- {', '.join(methods)}: {why}" for why, methods in failures(runs).items()]
    return ["What could not run:\n\n" + "\n".join(lines)] if lines else []


if __name__ == "__main__":
    main()
