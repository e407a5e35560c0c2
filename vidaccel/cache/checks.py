"""What predicted steps would get wrong without a word, in one table: each row is a pipeline that is refused.

Samplers are tried and not looked up: whether one draws noise is asked of a copy that takes four steps, so that those of
other packages are known as well as diffusers'.
"""

import copy
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import nn

from vidaccel.compat.diffusers import execution_device
from vidaccel.errors import UserError
from vidaccel.families.base import DiTFamily
from vidaccel.models.grid import current_step


@dataclass(frozen=True)
class Check:
    """One thing that makes predicted steps wrong."""

    wrong: Callable[[DiffusionPipeline, DiTFamily], str | None]
    """What is wrong with a pipeline, in words; None if nothing is."""
    hint: str
    """What is supported."""


def check_pipeline(pipe: DiffusionPipeline, family: DiTFamily) -> None:
    """`UserError` by the first row of `CHECKS` that finds something."""
    for check in CHECKS:
        if (found := check.wrong(pipe, family)) is not None:
            raise UserError(found, check.hint)


def check_forecaster(forecaster: Any, pipe: DiffusionPipeline) -> None:
    """`UserError` unless an object that was handed over can stand in for the trunk of this pipeline."""
    name = forecaster.__name__ if isinstance(forecaster, type) else type(forecaster).__name__
    history = getattr(forecaster, "history", None)
    if isinstance(forecaster, type) or not callable(forecaster) or not isinstance(history, int) or history < 1:
        raise UserError(
            f"the {'class' if isinstance(forecaster, type) else 'object'} {name} is no forecaster",
            "give the folder or the name of one, or an object that can be called and has a history of 1 or more steps",
        )
    weights = list(forecaster.parameters()) if isinstance(forecaster, nn.Module) else []
    device = execution_device(pipe)
    if wrong := {weight.device.type for weight in weights} - {device.type}:
        raise UserError(f"the {name} is on {', '.join(sorted(wrong))}, and the pipeline on {device.type}", "move it")


def _missing_transformer(pipe: DiffusionPipeline, family: DiTFamily) -> str | None:
    missing = [d.attribute for d in family.denoisers if getattr(pipe, d.attribute, None) is None]
    return f"this {type(pipe).__name__} has no {missing[0]}" if missing else None


def _further_transformer(pipe: DiffusionPipeline, family: DiTFamily) -> str | None:
    known = {denoiser.attribute for denoiser in family.denoisers}
    for name, part in pipe.components.items():
        if type(part).__name__ == family.transformer and name not in known:
            return f"this {type(pipe).__name__} has a second transformer, {name}"
    return None


def _no_boundary(pipe: DiffusionPipeline, family: DiTFamily) -> str | None:
    for denoiser, following in zip(family.denoisers, family.denoisers[1:], strict=False):
        if denoiser.until_config and pipe.config.get(denoiser.until_config) is None:
            return f"this {type(pipe).__name__} has a {following.attribute} and no {denoiser.until_config}"
    return None


def _no_position(pipe: DiffusionPipeline, family: DiTFamily) -> str | None:
    if family.predicts != "flow" and not hasattr(pipe.scheduler, "step_index"):
        return None  # the pipeline says it (`step_of`)
    try:
        current_step(_begun(pipe.scheduler))
    except (AttributeError, IndexError) as error:
        return f"the {type(pipe.scheduler).__name__} does not say where a sampling stands ({error})"
    return None


def _draws_noise(pipe: DiffusionPipeline, family: DiTFamily) -> str | None:
    name = type(pipe.scheduler).__name__
    try:
        same = torch.equal(_sampled(pipe.scheduler, seed=0), _sampled(pipe.scheduler, seed=1))
    except Exception as error:  # whatever a scheduler of anyone's raises
        return f"the {name} could not be tried on four steps: {' '.join(str(error).split())[:200]}"
    return (
        None if same else f"the {name} adds fresh noise at each step, and what a full step left is of the noise before"
    )


CHECKS = (
    Check(_missing_transformer, "load the whole pipeline"),
    Check(
        _further_transformer,
        "predicted steps are for the transformers that its family is known to have; run this one as it is",
    ),
    Check(_no_boundary, "say below which share of the times it takes over: pipe.register_to_config(...)"),
    Check(
        _draws_noise,
        "sample without noise, such as by FlowMatchEulerDiscreteScheduler with stochastic_sampling=False, or without "
        "predicted steps",
    ),
    Check(_no_position, "sample with a scheduler that has `step_index` and `sigmas`"),
)
"""In the order in which they are asked."""


def _begun(scheduler: Any) -> Any:
    """A copy at the beginning of a sampling of 4 steps, or of as many as it lists, on the CPU."""
    begun = copy.deepcopy(scheduler)
    more = {"mu": 1.0} if scheduler.config.get("use_dynamic_shifting") else {}
    listed = scheduler.config.get("times")
    begun.set_timesteps(len(listed) - 1 if listed else 4, device="cpu", **more)
    return begun


def _sampled(scheduler: Any, seed: int) -> torch.Tensor:
    """Latents [1, 1, 1, 2, 2] after all steps of a copy; PyTorch's random state is left alone."""
    begun, sample = _begun(scheduler), torch.ones(1, 1, 1, 2, 2)
    step = type(scheduler).step  # and not what may have been put in its place on the instance
    needed = [p.name for p in inspect.signature(step).parameters.values() if p.default is p.empty][1:]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for timestep in begun.timesteps:
            known = {"model_output": torch.zeros_like(sample), "timestep": timestep, "sample": sample}
            arguments = {name: known.get(name) for name in needed if name not in ("args", "kwargs")}
            sample = step(begun, **arguments, return_dict=False)[0]
    return sample
