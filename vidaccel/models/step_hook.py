"""What a student's transformer is told before each pass and its pipeline does not know of: r, and the scale g.

A diffusers `ModelHook` on the transformer asks the pipeline's scheduler, by position, which step is being taken, so
that the stock pipeline samples a student when it is simply called. It supplies what is missing and nothing else: who
calls the transformer with numbers of their own, as `Velocity` does, is left alone.
"""

from contextlib import nullcontext
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.hooks import HookRegistry, ModelHook
from torch import Tensor, nn

from vidaccel.compat.diffusers import hook_registry
from vidaccel.errors import UserError
from vidaccel.families.base import DiTFamily
from vidaccel.families.walk import denoisers_of, embeds, passes_of_call
from vidaccel.models.conditioning import Conditioning
from vidaccel.models.grid import current_step

NAME = "vidaccel_step"


class StepHook(ModelHook):
    """Registered on the pipeline's transformer until `remove()`."""

    def __init__(
        self, pipe: DiffusionPipeline, family: DiTFamily, conditioning: Conditioning | None, guidance: float = 1.0
    ):
        """`conditioning` is attached already; where the model has an argument for r, that is supplied as well."""
        super().__init__()
        self.guidance = guidance
        """Scale g of the passes to come, for a conditioning that embeds it."""
        self.instantaneous = False
        """r = t at every step: a student of mean velocities then gives the instantaneous ones."""
        self._pipe, self._family, self._conditioning = pipe, family, conditioning
        self._transformer = denoisers_of(pipe, family)[0]
        self._r_argument = family.r_argument if embeds(self._transformer, family, "r") else None
        self._last: tuple[Tensor, int] | None = None
        HookRegistry.check_if_exists_or_initialize(self._transformer).register_hook(self, NAME)

    @property
    def embeds_guidance(self) -> bool:
        """Whether it tells the model its scale."""
        return self._conditioning is not None and "g" in self._conditioning.config.embeds

    @property
    def tells_end(self) -> bool:
        """Whether it tells the model where a step ends."""
        conditioned = self._conditioning is not None and "r" in self._conditioning.config.embeds
        return conditioned or self._r_argument is not None

    def remove(self) -> None:
        HookRegistry.check_if_exists_or_initialize(self._transformer).remove_hook(NAME, recurse=False)

    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        conditioning = self._conditioning if self._conditioning and not self._conditioning.is_given else None
        given = kwargs.get(self._r_argument) is not None and not (self.instantaneous and self._family.embeds_r)
        r_argument = None if given else self._r_argument
        if not conditioning and not r_argument:
            return self.fn_ref.original_forward(*args, **kwargs)
        timestep = kwargs["timestep"]
        told = self._numbers()
        numbers = {name: timestep.new_full(timestep.shape[:1], n, dtype=torch.float32) for name, n in told.items()}
        if r_argument:
            r = timestep.new_full(timestep.shape, told["r"], dtype=torch.float32)
            kwargs[r_argument] = (1000 * r).to(timestep.dtype)
        with conditioning.given(**numbers) if conditioning else nullcontext():
            return self.fn_ref.original_forward(*args, **kwargs)

    def _numbers(self) -> dict[str, float]:
        """r and g of the step that the pipeline is about to take."""
        scheduler = self._pipe.scheduler
        step = current_step(scheduler)
        if self.embeds_guidance:
            self._refuse_second_pass(scheduler.timesteps, step.index)
        return {"r": step.t if self.instantaneous else step.r, "g": self.guidance}

    def _refuse_second_pass(self, timesteps: Tensor, index: int) -> None:
        """A generation has a tensor of timesteps of its own, so the first step after an aborted one is not a second."""
        second = self._last is not None and self._last[0] is timesteps and self._last[1] == index
        if second or passes_of_call(self._pipe, self._family) > 1:
            raise UserError(
                "the pipeline makes two passes a step, and this student embeds its guidance in one",
                "leave the pipeline's own guidance out, or off (guidance_scale=1.0), and set the scale of what "
                "vidaccel.load_pipeline gave: loaded.guidance = 4",
            )
        self._last = timesteps, index

    def __deepcopy__(self, memo: dict) -> "StepHook":
        # diffusers' hooks close over the module they were registered on: a copy's forward would run the original.
        raise TypeError("a transformer with a StepHook cannot be copied: remove() the hook, or load the model again")


def step_hook_of(transformer: nn.Module) -> StepHook | None:
    """The one that is on a transformer."""
    registry = hook_registry(transformer)
    hook = None if registry is None else registry.hooks.get(NAME)
    return hook if isinstance(hook, StepHook) else None
