"""Private parts of diffusers."""

import inspect
import logging
import sys
from collections.abc import Callable, Iterable, Mapping
from types import SimpleNamespace
from typing import Any

import torch
from diffusers import ContextParallelConfig, DiffusionPipeline, ModelMixin
from diffusers.hooks import HookRegistry, ModelHook
from diffusers.hooks.hooks import StateManager
from diffusers.models._modeling_parallel import ContextParallelInput, ContextParallelOutput
from diffusers.models.attention_dispatch import (
    AttentionBackendName,
    _AttentionBackendRegistry,
    _check_attention_backend_requirements,
)
from torch import nn

__all__ = [
    "ContextParallelInput",
    "ContextParallelOutput",
    "attention_backends",
    "attention_constraints",
    "built_with",
    "can_checkpoint",
    "check_attention_backend",
    "checkpointing",
    "do_without_ftfy",
    "enable_context_parallel",
    "execution_device",
    "float32_modules",
    "forget_listed_hooks",
    "hook_registry",
    "hook_states",
    "parallel_of",
    "process_attention",
    "remove_hook_registry",
    "set_checkpointing",
    "set_parallel",
    "set_process_attention",
    "set_stateful",
]

log = logging.getLogger(__name__)


def do_without_ftfy(pipeline: type[DiffusionPipeline]) -> None:
    """Let a pipeline class take prompts as they are where ftfy, which mends broken Unicode, is not installed: some
    (WanImageToVideoPipeline in 0.42.1) call it all the same, where others of them do without."""
    module = sys.modules[pipeline.__module__]
    clean = getattr(module, "basic_clean", None)
    if clean is None or hasattr(module, "ftfy") or "is_ftfy_available()" in inspect.getsource(clean):
        return
    log.info("%s: ftfy is not installed, so broken Unicode in prompts is not mended", pipeline.__name__)
    vars(module)["ftfy"] = SimpleNamespace(fix_text=lambda text: text)


def hook_registry(module: nn.Module) -> HookRegistry | None:
    """The hooks of diffusers' kind on a module; its public way makes a registry where there is none."""
    return getattr(module, "_diffusers_hook", None)


def remove_hook_registry(module: nn.Module) -> None:
    """Leave a module without its registry; diffusers only takes hooks out of it."""
    del module._diffusers_hook


def forget_listed_hooks(module: nn.Module) -> None:
    """Have `cache_context` look for hooked modules again: it keeps a list of those it tells."""
    if (registry := hook_registry(module)) is not None:
        registry.invalidate_child_registries_cache()


def set_stateful(hook: ModelHook, stateful: bool) -> None:
    """Whether diffusers tells this hook of contexts and resets it; a class says so for all of its hooks."""
    hook._is_stateful = stateful


def hook_states(manager: StateManager) -> dict[str, Any]:
    """State by context; `get_state` gives only that of the context that is open."""
    return manager._state_cache


def execution_device(pipe: DiffusionPipeline) -> torch.device:
    """Where the pipeline computes, also when its modules are offloaded and `pipe.device` says otherwise."""
    return pipe._execution_device


def float32_modules(model: ModelMixin) -> set[str]:
    """Names of the parts that stay in float32 when the model is loaded in another type."""
    return set(model._keep_in_fp32_modules or ())


def built_with(config: Mapping[str, Any]) -> dict[str, Any]:
    """What a model was built with, by its config: what begins with _ in it diffusers notes for itself."""
    return {name: value for name, value in config.items() if not name.startswith("_")}


def can_checkpoint(module: nn.Module) -> bool:
    """Whether its class has activation checkpointing; turning it on where there is none raises."""
    return getattr(module, "_supports_gradient_checkpointing", False)


def checkpointing(model: Any) -> Callable:
    """What the model's forward calls its blocks through while activations are recomputed."""
    return model._gradient_checkpointing_func


def set_checkpointing(model: Any, call: Callable) -> None:
    """`enable_gradient_checkpointing(func)` would wrap it, and turn checkpointing on in every part."""
    model._gradient_checkpointing_func = call


def process_attention() -> str:
    """The attention backend of all models that were told no other; only a `with` block sets it publicly."""
    return _AttentionBackendRegistry._active_backend


def set_process_attention(name: str) -> None:
    _AttentionBackendRegistry.set_active_backend(name)


def check_attention_backend(name: str) -> None:
    """Raises `RuntimeError` where a package or device that the backend needs is missing; a model would be needed."""
    _check_attention_backend_requirements(AttentionBackendName(name))


def attention_constraints(name: str) -> Iterable[Callable[..., None]]:
    """What the backend asks of query, key, value and mask: each raises `ValueError`, and runs only under a flag of
    diffusers' environment."""
    return _AttentionBackendRegistry._constraints[AttentionBackendName(name)]


def attention_backends() -> dict[AttentionBackendName, Callable[..., Any]]:
    """The function of every backend, which attention goes through whatever the model; changed in place."""
    return _AttentionBackendRegistry._backends


def enable_context_parallel(model: ModelMixin, config: ContextParallelConfig, plan: dict[str, Any] | None) -> None:
    """`model.enable_parallelism`, which divides by the number of accelerators (0.42.1): on a CPU there are none."""
    counted = torch.accelerator.device_count
    torch.accelerator.device_count = lambda: max(1, counted())
    try:
        model.enable_parallelism(config=config, cp_plan=plan)
    finally:
        torch.accelerator.device_count = counted


def parallel_of(processor: Any) -> Any:
    """How an attention processor goes about tokens that are split; None where they are not, or it cannot."""
    return getattr(processor, "_parallel_config", None)


def set_parallel(processor: Any, parallel: Any) -> None:
    """Let an attention processor go about split tokens so."""
    processor._parallel_config = parallel
