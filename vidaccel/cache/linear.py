"""The linear member of the zoo, fitted to a model's own sampling: no training, one generation, a small linear system.

Every step of that generation runs in full. On those that a schedule would predict, the map learns to make the tokens
that leave the trunk from those that enter it and those that left it on the last full step.
"""

from collections.abc import Callable, Collection

from diffusers import DiffusionPipeline
from torch import Tensor, nn

from vidaccel.models.family import DiTFamily
from vidaccel.models.steps import current_step
from vidaccel.predictor.forecasters import LinearMap, Tokens, fit_linear


def fitted(
    pipe: DiffusionPipeline, family: DiTFamily, full_steps: Collection[int], generate: Callable[[], None]
) -> LinearMap:
    """The map for these full steps; `generate` runs the pipeline, which makes one pass a step, once."""
    return fit_linear(predicted_passes(pipe, family, full_steps, generate))


def predicted_passes(
    pipe: DiffusionPipeline, family: DiTFamily, full_steps: Collection[int], generate: Callable[[], None]
) -> list[tuple[Tokens, Tokens, Tokens]]:
    """(entering, left on the last full step, leaving) of each step that is not full, as `fit_linear` takes them."""
    transformer = getattr(pipe, family.denoisers[0].attribute)
    kinds = family.block_lists[0], family.block_lists[-1]
    first, last = getattr(transformer, kinds[0].name)[0], getattr(transformer, kinds[1].name)[-1]
    entering: dict[str, Tensor] = {}
    cached: Tokens = {}
    found = []

    def enter(block: nn.Module, inputs: tuple) -> None:
        entering.update(zip(kinds[0].arguments, inputs, strict=False))

    def leave(block: nn.Module, inputs: tuple, output: Tensor | tuple[Tensor, ...]) -> None:
        nonlocal cached
        outputs = output if isinstance(output, tuple) else (output,)
        left = dict(zip(kinds[1].returns, outputs, strict=True))
        if current_step(pipe.scheduler).index in full_steps:
            cached = left
        else:
            found.append(({name: entering[name] for name in left}, cached, left))

    hooks = [first.register_forward_pre_hook(enter), last.register_forward_hook(leave)]
    try:
        generate()
    finally:
        for hook in hooks:
            hook.remove()
    return found
