"""The boundary around a whole pass: a transformer that is called, or whose call is answered by fitted scalars.

A predicted pass enters nothing of the transformer, embedders and head included: what answers it are the latents and
velocities of the last full passes (forecasters/multistep.py). It takes the place that PyTorch has for a compiled
module's call, as `StaticEmbedder` does, because CPU offload puts a transformer's forward back after each generation.
Hooks of PyTorch's kind run in either pass, so that whoever counts passes counts these; weights that are offloaded stay
where they are.

Scalars on top of a network are the exception: a predicted pass then enters the transformer as the network's own does,
which is attached beneath (attach.py), and what that gives is one more term of the answer.

Passes of a step are told apart by their order, which is the same in every step of a generation. What the first of two
transformers has left is forgotten where the second takes over.

B batch, C channels, T frames, H and W latent pixels
"""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from torch import Tensor, nn

from vidaccel.cache.checks import check_pipeline
from vidaccel.cache.policy import FullSteps
from vidaccel.cache.trunk import HOOK
from vidaccel.compat.diffusers import hook_registry
from vidaccel.compat.torch import call_of, compiled_call, set_compiled_call
from vidaccel.errors import UserError
from vidaccel.families.base import DiTFamily
from vidaccel.families.walk import blocks_of, denoisers_of, passes_of_call
from vidaccel.forecasters.multistep import FittedList
from vidaccel.models.grid import Step, current_step, times_of
from vidaccel.models.own_call import keep_transformers
from vidaccel.models.step_hook import StepHook, step_hook_of


class Left(NamedTuple):
    """What a full pass was called with and gave, [B, C, T, H, W]."""

    x: Tensor
    u: Tensor


def takes_euler_steps(scheduler: Any) -> bool:
    """Whether a step is Euler's: x_r = x_t - (t - r) u is what scalars are fitted to."""
    return isinstance(scheduler, FlowMatchEulerDiscreteScheduler)


def check_sampler(scheduler: Any) -> None:
    """`UserError` unless a step is Euler's."""
    name = type(scheduler).__name__
    hint = "sample with FlowMatchEulerDiscreteScheduler, as vidaccel.load_pipeline does for students"
    if not takes_euler_steps(scheduler):
        raise UserError(f"scalars are fitted to steps of flow-match Euler, and the pipeline's are the {name}'s", hint)


class Network(Protocol):
    """A network that is attached to the transformers under the same full steps, as `Attachment` is."""

    def detach(self) -> None:
        """Take it off; a second call does nothing."""


class WholePass:
    """A pipeline whose transformers are under fitted scalars, until `detach()`; also a context manager."""

    def __init__(
        self,
        pipe: DiffusionPipeline,
        family: DiTFamily,
        scalars: FittedList,
        check_grid: Callable[[], None] = lambda: None,
        check_guidance: Callable[..., None] = lambda *scales: None,
        two_pass: bool = True,
        network: Network | None = None,
    ):
        """
        Args:
            scalars: their list of full steps and numbers.
            check_grid: called when a generation begins, which it may refuse.
            check_guidance: told the scale of a generation before its first predicted step, and may refuse it; of two
                transformers that of the second as well, with the first's.
            two_pass: whether guidance in two passes is served.
            network: what answers beneath, for scalars on top of one; taken off with this.
        """
        self.policy, self.leaving = FullSteps(scalars.full_steps, scalars.steps), ExitStack()
        """Which steps are full; and what is undone after the transformers are let go."""
        self.full_passes, self.predicted_passes = 0, 0
        """Passes of either kind that went well, since it was attached; two a step under two-pass guidance."""
        self.remembered: list[list[Left]] = []
        """Of the generation under way: for each pass of a step, in their order, its last full ones, newest first."""
        self._pipe, self._family, self._scalars, self._two_pass = pipe, family, scalars, two_pass
        self._check_grid, self._check_guidance = check_grid, check_guidance
        self._timesteps: Tensor | None = None
        self._index, self._place = 0, 0
        self._scheduler = pipe.scheduler  # the last one that was checked
        self._scale: float | None = None
        self._running: _Call | None = None  # of the transformer under way
        self._first = 0  # the step with which it began
        self._network = network
        self._calls = [_Call(self, transformer) for transformer in denoisers_of(pipe, family)]
        self._release = keep_transformers(pipe, family)

    def detach(self) -> None:
        """Leave the pipeline as it was; a second call does nothing."""
        self.remembered.clear()
        if self._calls:
            self._release()
        while self._calls:
            self._calls.pop().remove()
        if self._network is not None:
            self._network.detach()
        self.leaving.close()

    def __enter__(self) -> "WholePass":
        return self

    def __exit__(self, *error) -> None:
        self.detach()

    def run(self, call: "_Call", args: tuple, kwargs: dict[str, Any]) -> Any:
        """A pass of a transformer, whichever way it goes."""
        step = current_step(self._pipe.scheduler)
        self._follow(step)
        full = self.policy(step)
        place, self._place = self._place, self._place + 1
        passes = passes_of_call(self._pipe, self._family)
        x = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        if self._running is not None and step.index == self._first + 1 and place == 0:
            self._check_generation(self._running.transformer, x, kwargs)
        if call is not self._running:
            self._switch(call, step.index)
        try:
            if full:
                output = call.full(args, kwargs)
                self._keep(place, Left(x, self._flow(output[0]).detach()))
                self.full_passes += passes
            elif self._scalars.network:
                self.predicted_passes += passes  # before hooks on the end of the pass, which ask
                network = self._flow(call.full(args, kwargs)[0])  # as the network that is attached beneath answers it
                output = _as_output(self._flow(self._forecast(step, place, x, network)), kwargs)
            else:
                u = self._forecast(step, place, x)
                self.predicted_passes += passes  # before hooks on the end of the pass, which ask
                output = call.answered(_as_output(self._flow(u), kwargs), args, kwargs)
        except BaseException:
            self._timesteps = None
            self.remembered.clear()
            raise
        if step.index == step.count - 1 and place < len(self.remembered):  # freed before the video is decoded
            self.remembered[place] = []
        return output

    def _follow(self, step: Step) -> None:
        """Start anew with a generation, which has timesteps of its own, and count anew with a step."""
        timesteps = self._pipe.scheduler.timesteps
        if timesteps is not self._timesteps or step.index < self._index:
            self.remembered.clear()
            self._timesteps = self._running = None
            if self._pipe.scheduler is not self._scheduler:
                check_pipeline(self._pipe, self._family)
                check_sampler(self._pipe.scheduler)
                self._scheduler = self._pipe.scheduler
            self._check_grid()
            self._timesteps, self._place = timesteps, 0
        if step.index != self._index:
            self._index, self._place = step.index, 0

    def _switch(self, call: "_Call", index: int) -> None:
        """To the transformer of this call; what the one before has left is freed."""
        if self._running is None and index:
            raise UserError(
                f"a sampling begins at step {index}, and the scalars are for whole ones", "take predictor=taylor"
            )
        if index not in self._scalars.firsts:
            self._timesteps = None
            raise UserError(
                f"the pipeline switches its transformer at step {index}, and the scalars were fitted to other steps",
                "fit some to this pipeline (vidaccel train-predictor forecaster=multistep)",
            )
        self.remembered.clear()
        self._running, self._first = call, index

    def _keep(self, place: int, left: Left) -> None:
        if place == len(self.remembered):
            self.remembered.append([])
        x = left.x if left.x.shape == left.u.shape else left.x[:, : left.u.shape[1]].clone()  # without an image's
        self.remembered[place] = [Left(x, left.u), *self.remembered[place]][: self._scalars.history]

    @torch.no_grad()
    def _forecast(self, step: Step, place: int, x: Tensor, network: Tensor | None = None) -> Tensor:
        """The velocity of a predicted step."""
        if place >= len(self.remembered):
            raise RuntimeError(f"pass {place} of predicted step {step.index} has no full pass to look back on")
        known = self.remembered[place]
        x = x[:, : known[0].u.shape[1]]
        us, xs = zip(*((each.u, each.x) for each in known), strict=True)
        return self._scalars.velocity(step.index, us, xs, x, network, self._scale)

    def _flow(self, u: Tensor) -> Tensor:
        """A velocity that the transformer gives, as one from the video to noise; or that one, as it gives it."""
        return -u if self._family.rises else u

    def _check_generation(self, transformer: nn.Module, x: Tensor, kwargs: dict[str, Any]) -> None:
        """Refuse guidance that the scalars were not fitted for, when the first step of a transformer, which is full,
        is over; `kwargs` are of the pass that follows it."""
        hook = step_hook_of(transformer)
        if hook is not None and hook.instantaneous:
            raise UserError("the scalars are for a student's mean velocities", "leave instantaneous=true out")
        if not self._two_pass and self._passes() > 1:
            raise UserError("the scalars are for guidance in one pass a step, and the pipeline makes two", "fit others")
        scale = self._guidance(transformer, hook, x, kwargs)
        if self._first == 0:
            self._scale = scale
        if scale is not None and self._scale is not None:
            self._check_guidance(scale, *([self._scale] if self._first else []))

    def _passes(self) -> int:
        """Of a step of the generation under way."""
        return len(self.remembered) * passes_of_call(self._pipe, self._family)

    def _guidance(
        self, transformer: nn.Module, hook: StepHook | None, x: Tensor, kwargs: dict[str, Any]
    ) -> float | None:
        """The scale that the generation under way is guided with."""
        if self._passes() == 1:
            if hook is not None and hook.embeds_guidance:
                return hook.guidance
            key, argument = self._family.g_config, self._family.g_argument
            config: Any = transformer.config
            if key is None or argument is None or not config[key]:
                return 1.0
            return float(kwargs[argument].flatten()[0]) / 1000
        # No pipeline tells its scale in the same way: it is read off the step that was taken from two known passes.
        lasts = [kept[0] for kept in self.remembered]
        if len(lasts) == 1:  # of a doubled batch
            lasts = [Left(*halves) for halves in zip(lasts[0].x.chunk(2), lasts[0].u.chunk(2), strict=True)]
            x = x.chunk(2)[0]
        first, second = lasts[:2]
        times = times_of(self._pipe.scheduler)[self._first : self._first + 2].tolist()
        taken = (first.x.float() - x[:, : first.u.shape[1]].float()) / (times[0] - times[1])
        apart = (first.u.float() - second.u.float()).flatten()
        if not (square := float(apart @ apart)):
            return None
        scale = float((taken - second.u.float()).flatten() @ apart) / square
        return max(scale, 1 - scale)  # whichever of the two came first


def scalars_on(transformer: nn.Module) -> WholePass | None:
    """What a transformer is under, if it is."""
    call = compiled_call(transformer)
    return call.owner if isinstance(call, _Call) else None


def require_free(pipe: DiffusionPipeline, family: DiTFamily) -> None:
    """`UserError` where a predictor or scalars are attached already, or a cache of diffusers is enabled."""
    for transformer in denoisers_of(pipe, family):
        name = type(transformer).__name__
        registries = [hook_registry(block) for _, block in blocks_of(transformer, family)]
        attached = any(HOOK in registry.hooks for registry in registries if registry is not None)
        if attached or scalars_on(transformer) is not None:
            raise UserError(f"this {name} is attached already", "detach it first, or leave its `with` block")
        if getattr(transformer, "is_cache_enabled", False):
            raise UserError(f"a cache of diffusers is enabled on this {name}", "call its disable_cache() first")


class _Call:
    """In the place of a transformer's call."""

    def __init__(self, owner: WholePass, transformer: nn.Module):
        self.owner, self.transformer, self._compiled = owner, transformer, compiled_call(transformer)
        set_compiled_call(transformer, self)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.owner.run(self, args, kwargs)

    def full(self, args: tuple, kwargs: dict[str, Any]) -> Any:
        return (self._compiled or call_of(self.transformer))(*args, **kwargs)

    def answered(self, answer: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        """A call whose hooks run and whose forward, whatever has taken its place, gives this."""
        own = vars(self.transformer).get("forward")
        self.transformer.forward = lambda *args, **kwargs: answer
        try:
            return call_of(self.transformer)(*args, **kwargs)
        finally:
            if own is None:
                del self.transformer.forward
            else:
                self.transformer.forward = own

    def remove(self) -> None:
        """Leave the transformer as it was, or as it has been compiled since."""
        if compiled_call(self.transformer) is self:
            set_compiled_call(self.transformer, self._compiled)


@dataclass
class _Output:
    """What a transformer gives unless it is told return_dict=False, as far as pipelines read it."""

    sample: Tensor

    def __getitem__(self, index: int) -> Tensor:
        return (self.sample,)[index]


def _as_output(u: Tensor, kwargs: dict[str, Any]) -> Any:
    """As a transformer that is called so gives a velocity."""
    return (u,) if kwargs.get("return_dict") is False else _Output(u)
