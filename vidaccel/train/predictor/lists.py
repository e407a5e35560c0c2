"""Lists of full steps, run as they serve: what they have in common is run once."""

from collections.abc import Callable, Collection, Iterator
from typing import TypeVar

State = TypeVar("State")
FullSteps = tuple[int, ...]
"""Positions of the full steps of a run, rising from 0."""


def run_lists(
    lists: Collection[FullSteps],
    steps: int,
    start: State,
    full: Callable[[State, int], State],
    predicted: Callable[[State, int], State],
) -> Iterator[tuple[FullSteps, State]]:
    """(list, state after its last step) of each, by steps that make a new state of one and its position.

    A step that is the same in several lists, and everything before it, is run for all of them together: of S steps, all
    2^(S - 1) lists that begin with 0 take 2^(S - 1) full steps.
    """
    yield from _from(start, 0, sorted(set(lists)), steps, full, predicted)


def _from(state, step, lists, steps, full, predicted) -> Iterator:
    if step == steps:
        yield lists[0], state
        return
    for run, group in ((full, [e for e in lists if step in e]), (predicted, [e for e in lists if step not in e])):
        if group:
            yield from _from(run(state, step), step + 1, group, steps, full, predicted)
