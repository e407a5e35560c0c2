"""What training-free caches of parts of the trunk share: hooks on a pipeline's transformers that know the step.

    with Fora(pipe, every=3) as cache:
        video = pipe("a cat on a surfboard").frames[0]
    cache.full_passes, cache.skipped_passes

What is remembered is kept apart by transformer and by the context that `transformer.cache_context` has in force. The
first pass of each is full; a generation forgets the one before, and its own with its last step.
"""

from collections.abc import Callable, Iterator
from typing import Any

from diffusers import DiffusionPipeline
from diffusers.hooks import HookRegistry, ModelHook
from torch import nn

from vidaccel.cache.blocks import OpenContext
from vidaccel.compat.diffusers import forget_listed_hooks, remove_hook_registry, set_stateful
from vidaccel.errors import UserError
from vidaccel.families.base import DiTFamily
from vidaccel.families.registry import family_of
from vidaccel.families.walk import denoisers_of
from vidaccel.models.grid import Step, step_of
from vidaccel.models.loading import LoadedPipeline

NAME = "vidaccel_parts"


class Unsupported(Exception):
    """A cache cannot run here; the message says why."""


class PartHook(ModelHook):
    """Base of the hooks on modules."""

    def __init__(self, cache: "PartsCache"):
        super().__init__()
        self.cache, self.open = cache, cache.open
        """`open` is where `cache_context` finds it."""
        set_stateful(self, True)

    def reset_state(self, module: nn.Module) -> nn.Module:
        """Pipelines of diffusers ask for this at the end of a generation."""
        self.cache.reset()
        return module


class PartsCache:
    """Attached to a pipeline within a `with` block, which leaves it as it was.

    A cache says which modules get hooks (`hooks`) and which passes are full (`begin`). Arguments of its own
    `__init__`, between `pipe` and `family`, are the settings of a row.
    """

    one_at_a_time = False
    """Whether it decides by what it sees: videos of one batch would share its decisions."""

    @classmethod
    def calibrated(
        cls, loaded: LoadedPipeline, settings: dict[str, Any], generate: Callable[[], None]
    ) -> dict[str, Any]:
        """The settings with those that are the model's own; `generate` makes a video to find them on."""
        return settings

    def __init__(self, pipe: DiffusionPipeline, family: DiTFamily | None = None):
        """`family` is the pipeline's own unless given."""
        self.pipe, self.family = pipe, family or family_of(pipe)
        self.open = OpenContext()
        self.full_passes, self.skipped_passes = 0, 0
        """Passes that went well."""
        self.full = True
        """Whether the pass that is under way computes everything."""
        self.step: Step
        """Of that pass."""
        self.kept: dict[Any, Any] = {}
        """What its context remembers."""
        self._memory: dict[tuple[nn.Module, str | None], dict[Any, Any]] = {}
        self._undo: list[Callable[[], None]] = []

    def hooks(self, transformer: nn.Module) -> Iterator[tuple[nn.Module, PartHook]]:
        """Which modules get which hook."""
        raise NotImplementedError

    def begin(self) -> None:
        """A pass begins: `step` and `kept` are its own."""

    def reset(self) -> None:
        """Forget everything."""
        self._memory.clear()
        self.kept = {}

    def __enter__(self) -> "PartsCache":
        """Raises `UserError` if a cache is on the transformer already."""
        for transformer in denoisers_of(self.pipe, self.family):
            if getattr(transformer, "is_cache_enabled", False):
                raise UserError("a cache of diffusers is enabled on this pipeline", "call its disable_cache() first")
            self._undo.append(lambda transformer=transformer: forget_listed_hooks(transformer))
            for module, hook in list(self.hooks(transformer)):
                self._put_on(module, hook)
            forget_listed_hooks(transformer)
            self._undo.append(transformer.register_forward_pre_hook(self._begin).remove)
            self._undo.append(transformer.register_forward_hook(self._end, always_call=True).remove)
        return self

    def __exit__(self, *error) -> None:
        self.reset()
        while self._undo:
            self._undo.pop()()

    def _put_on(self, module: nn.Module, hook: PartHook) -> None:
        registry = HookRegistry.check_if_exists_or_initialize(module)
        before = vars(module).get("forward")

        def take_off() -> None:
            registry.remove_hook(NAME, recurse=False)
            if before is None:
                del module.forward
            if not registry.hooks:
                remove_hook_registry(module)

        registry.register_hook(hook, NAME)
        self._undo.append(take_off)

    def _begin(self, transformer: nn.Module, inputs: tuple) -> None:
        self.step = step_of(self.pipe)
        key = transformer, self.open.name
        if self.step.index == 0:
            self._memory.pop(key, None)
        self.kept = self._memory.setdefault(key, {})
        self.begin()

    def _end(self, transformer: nn.Module, inputs: tuple, output: Any) -> None:
        """`output` is None if the pass raised."""
        if output is None:
            self.reset()
            return
        self.full_passes += self.full
        self.skipped_passes += not self.full
        if self.step.index == self.step.count - 1:
            self._memory.pop((transformer, self.open.name), None)
        self.kept = {}
