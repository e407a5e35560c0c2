"""Which steps are full: listed, every n-th, or found by dynamic programming on measured costs.

    schedule.json    {"format": "schedule/1", "<budget>-of-<steps>": {"steps", "shift", "times", "full_steps", "budget",
                     "how", "expected_error"}, ...}, or one of the inner objects alone

The budget of a schedule is the number of its full steps. Budgets are found for a whole range at once, because the
program for the largest holds those for all smaller ones. A file may hold those of several grids.
"""

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from heapq import nsmallest
from pathlib import Path
from typing import cast

from vidaccel.artefacts import write_json
from vidaccel.cache.policy import check_full_steps
from vidaccel.errors import UserError
from vidaccel.forecasters.checkpoint import SCHEDULE_FILE
from vidaccel.models.grid import Grid

FORMAT = "schedule/1"
HOW = ("list", "every", "search")

PUBLISHED: dict[tuple[int, int], tuple[int, ...]] = {
    (20, 10): (0, 1, 2, 5, 9, 11, 13, 15, 17, 19),
    (20, 8): (0, 1, 2, 5, 9, 13, 17, 19),
    (8, 4): (0, 2, 4, 7),
}
"""Full steps by (steps, budget), from the authors' released inference code (method.md, section 3); the last is
image-to-video."""


@dataclass(frozen=True)
class Schedule:
    """Full steps of one grid."""

    steps: int
    """Steps of the grid."""
    full_steps: tuple[int, ...]
    """Positions of the full ones, rising from 0."""
    how: str = "list"
    """How it was come by: list, every or search."""
    shift: float | None = None
    """Shift that makes the grid it was searched on, if one does."""
    expected_error: float | None = None
    """What the search expects it to cost, in the unit of the costs."""
    times: tuple[float, ...] | None = None
    """Times [steps + 1] of the grid it was searched on, which follow from a shift; None: it is for any grid."""
    boundary: float | None = None
    """Time below which the second of the two transformers takes over that it was searched for; None: it is for one."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "full_steps", check_full_steps(self.full_steps, self.steps))
        object.__setattr__(self, "times", self.grid and self.grid.times)
        if self.how not in HOW:
            raise UserError(f"a schedule made by {self.how!r}", f"known are {', '.join(HOW)}")

    @property
    def grid(self) -> Grid | None:
        """The grid it was searched on; None if it is for any."""
        return Grid.recorded(self.steps, self.shift, self.times)

    @property
    def budget(self) -> int:
        """The number of full steps."""
        return len(self.full_steps)


def every(steps: int, n: int) -> Schedule:
    """Every n-th step, from 0."""
    if n < 1:
        raise UserError(f"every {n} steps", "1 makes every step full")
    return Schedule(steps, tuple(range(0, steps, n)), "every")


Costs = Sequence[Sequence[float]]
"""[S][S + 1]: costs[i][j] is the error made by a stretch that is full at step i and predicted up to the next full step
j, or to the end where j = S. Infinite where a stretch is not to be used; entries with j <= i are not read. Errors of
stretches add."""


def candidates(costs: Costs | Sequence[Costs], count: int = 1) -> dict[int, list[tuple[float, tuple[int, ...]]]]:
    """The cheapest lists of full steps of every budget 1 to S, cheapest first, each with its cost, exactly.

    Args:
        costs: those of stretches, in O(S^3); or [S] of such, one for each full step h before the stretch's own, in
            O(S^4). That of the first stretch, which has none before, is then read at h = 0.
        count: how many of each budget; fewer where there are not that many of finite cost, and a budget that has none
            is left out.
    """
    known = not isinstance(costs[0][0], float | int)
    steps = len(costs)
    after = cast("Sequence[Costs]", costs if known else [costs])
    for each in after:
        _check_costs(each, steps)
    # best[h, i]: the cheapest ways from full step i, after h, to the end with the full steps left, and the steps taken.
    befores = {(h, i): after[h] for i in range(steps) for h in (range(i) if i and known else [0])}
    best = {(h, i): [(of[i][steps], (i,))] for (h, i), of in befores.items()}
    found = {}
    for budget in range(1, steps + 1):
        if lists := [each for each in best[0, 0] if math.isfinite(each[0])]:
            found[budget] = lists
        best = {
            (h, i): nsmallest(
                count,
                (
                    (of[i][j] + cost, (i, *rest))
                    for j in range(i + 1, steps)
                    for cost, rest in best[i if known else 0, j]
                ),
            )
            for (h, i), of in befores.items()
        }
    return found


def write_schedules(path: str | Path, schedules: Iterable[Schedule]) -> None:
    """schedule.json, grid by grid, with rising budgets."""
    ordered = sorted(schedules, key=lambda s: (s.steps, s.budget))
    entries = {f"{s.budget}-of-{s.steps}": asdict(s) | {"budget": s.budget} for s in ordered}
    for entry in entries.values():
        if entry["boundary"] is None:
            del entry["boundary"]
    write_json(path, {"format": FORMAT, **entries})


def read_schedules(path: str | Path) -> list[Schedule]:
    """The schedules of a file; `UserError` naming the file and what is wrong with it."""
    path = Path(path)
    try:
        content = json.loads(path.read_bytes())
        if (made_as := content.pop("format", FORMAT)) != FORMAT:
            raise UserError(f"{path} is of format {made_as}", f"this vidaccel reads {FORMAT}")
        entries = [content] if "full_steps" in content else content.values()
        return [_schedule(**entry) for entry in entries]
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}", "give the path of a schedule.json") from error
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path} is no schedule: {error}", "search it again, or list full_steps=") from error


def schedules_of(predictor: Path) -> list[Schedule]:
    """Those of a predictor's folder; for a file of weights that others have released the published lists."""
    if predictor.is_file():
        return [Schedule(steps, listed) for (steps, _), listed in PUBLISHED.items()]
    return read_schedules(predictor / SCHEDULE_FILE)


def pick(schedules: Iterable[Schedule], budget: int | None, steps: int | None = None) -> Schedule:
    """The only schedule with that many full steps, of that many steps; None is any. `UserError` naming those there are
    unless it is one."""
    schedules = list(schedules)
    fitting = [s for s in schedules if budget in (None, s.budget) and steps in (None, s.steps)]
    if len(fitting) != 1:
        asked = [f"{name}={value}" for name, value in (("budget", budget), ("steps", steps)) if value is not None]
        found = f"{len(fitting)} schedules" if fitting else "no schedule"
        raise UserError(f"{found} for {' with '.join(asked) or 'any steps'}", f"choose {_listed(fitting or schedules)}")
    return fitting[0]


def _listed(schedules: Iterable[Schedule]) -> str:
    """What budget= and steps= may be: "budget=4 or 6 with steps=8; budget=6 with steps=20"."""
    budgets: dict[int, list[int]] = {}
    for schedule in schedules:
        budgets.setdefault(schedule.steps, []).append(schedule.budget)
    ways = []
    for steps, numbers in sorted(budgets.items()):
        *others, last = map(str, sorted(numbers))
        ways.append(f"budget={', '.join(others)}{' or ' if others else ''}{last} with steps={steps}")
    return "; ".join(ways) or "another file: this one has none"


def _schedule(budget: int, **fields) -> Schedule:
    schedule = Schedule(**fields)
    if schedule.budget != budget:
        raise ValueError(f"{schedule.budget} full steps under budget {budget}")
    return schedule


def _check_costs(costs: Costs, steps: int) -> None:
    if len(costs) != steps or any(len(row) != steps + 1 for row in costs):
        raise ValueError(f"costs are [{steps}][{steps + 1}] for {steps} steps")
    used = [costs[i][j] for i in range(steps) for j in range(i + 1, steps + 1)]
    if any(math.isnan(cost) or cost < 0 for cost in used):
        raise ValueError("a cost is negative or not a number")
