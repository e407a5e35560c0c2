"""The times that Mochi's pipeline gives its scheduler."""

from diffusers.pipelines.mochi.pipeline_mochi import linear_quadratic_schedule

THRESHOLD = 0.025
"""How far the first half of the steps leads, in even steps; as its pipeline has it."""


def times(steps: int) -> list[float]:
    """[steps] from 1 down."""
    return linear_quadratic_schedule(steps, THRESHOLD)
