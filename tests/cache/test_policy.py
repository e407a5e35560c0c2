"""Lists of full steps: which are refused, and what the others decide."""

import pytest

from vidaccel.cache.policy import FullSteps, check_full_steps
from vidaccel.errors import UserError
from vidaccel.models.grid import Step


def step(index: int, count: int) -> Step:
    return Step(index, count, 1 - index / count, 1 - (index + 1) / count)


@pytest.mark.parametrize(
    ("full_steps", "steps", "message"),
    [
        ([0, 2, 1], 4, r"not in order\nhint: sort it: \[0, 1, 2\]"),
        ([2, 0, 1], 4, "not in order"),
        ([0, 1, 1, 3], 4, r"repeats \[1\]\nhint: list each step once: \[0, 1, 3\]"),
        ([0, 2, 4], 4, r"lists \[4\], and there are 4 steps\nhint: steps count from 0 to 3"),
        ([-1, 0, 2], 4, "does not start at 0"),
        ([1, 2], 4, "does not start at 0"),
        ([], 4, "does not start at 0"),
        ([0, 1.0], 4, "not all whole numbers"),
        ([0, True], 4, "not all whole numbers"),
        ([0], 0, "at least one step"),
    ],
)
def test_lists_that_cannot_be_meant_are_refused(full_steps, steps, message):
    with pytest.raises(UserError, match=message):
        check_full_steps(full_steps, steps)


def test_a_list_decides_by_position():
    policy = FullSteps([0, 2, 3], 5)
    assert [policy(step(i, 5)) for i in range(5)] == [True, False, True, True, False]


def test_another_number_of_steps_is_refused():
    with pytest.raises(UserError, match="for 5 steps, and the pipeline runs 8\nhint: pass num_inference_steps=5"):
        FullSteps([0, 2], 5)(step(0, 8))
