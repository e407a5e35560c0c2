"""How many prompts each score needs to tell a row from one of fewer steps:

    python -m studies.sharpness studies/results/sprites.json student-20 student-4 student-3 student-2
    python -m studies.sharpness studies/results/chain/scores.json teacher-50 student-8 student-4 student-3

The file is a results.json of sprites, or the scores.json of studies.chain, which compares rows with its first alone.
Rows are compared in pairs of prompt and noise. With z, a difference over its standard error (its 95 % interval's width
over 3.92), on P prompts, one of that size is seen four times in five on P (2.8 / z)^2. A z is itself known to about 1.
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import typer

from vidaccel.bench.measures.pairs import differences
from vidaccel.cli.common import Debug, quiet_libraries, reported
from vidaccel.errors import UserError
from vidaccel.worlds import scorer_named

MEASURES = ("total", "semantic", "quality", "pair", "all_right", "frames_right", "margin")
SEEN = 2.8
"""Standard errors of a difference that is seen four times in five, at one false claim in twenty."""
INTERVAL = 3.92
"""Standard errors in a 95 % interval."""


class Sharpness(NamedTuple):
    """Of one score, of a row less another."""

    delta: float
    """In percent points."""
    z: float
    prompts: float
    """On which it is seen four times in five; infinite where there is no difference."""


def sharpness(found: Mapping[str, Any], row: str, other: str) -> dict[str, Sharpness]:
    """By the names in MEASURES, of the content of a results.json or scores.json.

    Raises:
        UserError: the rows are not there, or were not compared in pairs.
    """
    if "rows" in found:
        first = next(iter(found["rows"]))
        if row != first or other == first or other not in found["rows"]:
            raise UserError(
                f'"{row}" was not compared with "{other}"', f"it has {first} and {', '.join(found['rows'])}"
            )
        paired = found["rows"][other]["paired"]  # of the other less the first
        ends = {name: [-paired[name][key] for key in ("mean", "low", "high")] for name in MEASURES}
        return {name: _sharp(ends[name], found["prompts"]) for name in MEASURES}
    ours, others = (_scores(found, name) for name in (row, other))
    deltas = differences(ours, others, found["meanings"], scorer_named("sprites").totals)
    return {name: _sharp(deltas[name][:3], len(found["prompts"])) for name in MEASURES}


def table(found: Mapping[str, Any], row: str, others: Sequence[str]) -> Iterator[list[str]]:
    """Headings, alignment and a line for each score."""
    yield ["score", *(f"less {other}: points, z, prompts" for other in others)]
    yield ["---", *["--:"] * len(others)]
    measured = [sharpness(found, row, other) for other in others]
    for name in MEASURES:
        yield [name.replace("_", " "), *(_cell(each[name]) for each in measured)]


def _scores(found: Mapping[str, Any], name: str) -> dict[str, np.ndarray]:
    run = next((run for run in found["runs"] if run["method"] == name), None)
    kept = (run or {}).get("per_prompt")
    if not kept or not kept["scores"]:
        raise UserError(f'there are no scores of each prompt of a row "{name}"', "take a row that --quality scored")
    return {measure: np.array(values, dtype=np.float64) for measure, values in kept["scores"].items()}


def _sharp(difference: Sequence[float], prompts: int) -> Sharpness:
    delta, low, high = difference
    error = abs(high - low) / INTERVAL
    z = delta / error if error else 0.0
    return Sharpness(delta, z, prompts * (SEEN / z) ** 2 if z else math.inf)


def _cell(each: Sharpness) -> str:
    return f"{each.delta:+.2f}, {each.z:.1f}, {each.prompts:.0f}" if each.z else "none"


app = typer.Typer()


@app.command()
@reported
def main(
    results: Annotated[Path, typer.Argument(help="A results.json or scores.json.")],
    row: Annotated[str, typer.Argument(help="A row, by name.")],
    others: Annotated[list[str], typer.Argument(help="Rows that it is to be told from.")],
    debug: Debug = False,
) -> None:
    """Say how many prompts each score needs to tell rows apart."""
    quiet_libraries()
    for line in table(json.loads(results.read_text(encoding="utf-8")), row, others):
        typer.echo("| " + " | ".join(line) + " |")


if __name__ == "__main__":
    app(prog_name="python -m studies.sharpness")
