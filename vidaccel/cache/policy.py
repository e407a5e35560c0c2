"""Which steps run the trunk: those at the positions of a list."""

from collections.abc import Sequence

from vidaccel.errors import UserError
from vidaccel.models.grid import Step


class FullSteps:
    """The listed steps are full."""

    def __init__(self, full_steps: Sequence[int], steps: int):
        """Raises `UserError` as `check_full_steps` does."""
        self.full_steps, self.steps = frozenset(check_full_steps(full_steps, steps)), steps

    def __call__(self, step: Step) -> bool:
        """Whether the passes of this step are full; `UserError` if the pipeline runs another number of steps."""
        if step.count != self.steps:
            raise UserError(
                f"the schedule is for {self.steps} steps, and the pipeline runs {step.count}",
                f"pass num_inference_steps={self.steps} to the pipeline, or attach a schedule for {step.count} steps",
            )
        return step.index in self.full_steps


def check_full_steps(full_steps: Sequence[int], steps: int) -> tuple[int, ...]:
    """The list as a tuple; `UserError` unless it starts at 0, rises, and stays below `steps`."""
    full = tuple(full_steps)
    if steps < 1:
        raise UserError(f"a schedule of {steps} steps", "there is at least one step")
    if any(not isinstance(step, int) or isinstance(step, bool) for step in full):
        raise UserError(f"full_steps={list(full)} are not all whole numbers", "list positions, such as [0, 2, 5]")
    if not full or full[0] != 0 and min(full) != 0:
        raise UserError(
            f"full_steps={list(full)} does not start at 0", "the first step has no cache to predict from: list it"
        )
    if list(full) != sorted(full):
        raise UserError(f"full_steps={list(full)} is not in order", f"sort it: {sorted(full)}")
    if repeated := sorted({step for step in full if full.count(step) > 1}):
        raise UserError(f"full_steps={list(full)} repeats {repeated}", f"list each step once: {sorted(set(full))}")
    if outside := [step for step in full if step >= steps]:
        raise UserError(
            f"full_steps={list(full)} lists {outside}, and there are {steps} steps",
            f"steps count from 0 to {steps - 1}",
        )
    return full
