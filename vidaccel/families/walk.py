"""What a record names, in a loaded pipeline: its denoisers, their blocks, what a block is called with and gives back.

B batch, N tokens, D width
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from diffusers import DiffusionPipeline
from torch import Tensor, nn

from vidaccel.families.base import BlockList, Condition, DiTFamily


def denoisers_of(pipe: DiffusionPipeline, family: DiTFamily) -> list[nn.Module]:
    """The pipeline's transformers, in the order in which sampling meets them."""
    return [getattr(pipe, denoiser.attribute) for denoiser in family.denoisers]


def transformers_in(pipe: DiffusionPipeline, family: DiTFamily) -> list[nn.Module]:
    """All of the family's class in the pipeline: where the record is of one denoiser alone, the others too."""
    parts = [part for part in pipe.components.values() if isinstance(part, nn.Module)]
    return [part for part in parts if family.transformer in (base.__name__ for base in type(part).__mro__)]


def boundaries_of(pipe: DiffusionPipeline, family: DiTFamily) -> tuple[float, ...]:
    """Times below which the pipeline's next denoiser takes over, one fewer than there are denoisers."""
    first = family.denoisers[:-1]
    return tuple(pipe.config[each.until_config] if each.until_config else each.until for each in first)


def blocks_of(transformer: nn.Module, family: DiTFamily) -> list[tuple[BlockList, nn.Module]]:
    """The blocks of the trunk, in the order in which they run, each with the list it is of."""
    return [(kind, block) for kind in family.block_lists for block in getattr(transformer, kind.name)]


def side_blocks_of(transformer: nn.Module, family: DiTFamily) -> list[tuple[BlockList, nn.Module]]:
    """The blocks beside the trunk, each with the list it is of."""
    return [(kind, block) for kind in family.side_lists for block in getattr(transformer, kind.name)]


def conditions_of(transformer: nn.Module, family: DiTFamily) -> list[Condition]:
    """Those that this transformer takes."""
    config: Any = transformer.config
    return [each for each in family.conditions if each.width_config is None or config[each.width_config] is not None]


def embeds(transformer: nn.Module, family: DiTFamily, number: str) -> bool:
    """Whether a transformer was built with an embedding of "r" or "g"."""
    config: Any = transformer.config
    key = getattr(family, f"{number}_config")
    return bool(config[key]) if key else number == "r" and family.embeds_r


def stored_inputs(transformer: nn.Module, family: DiTFamily) -> list[str]:
    """Names in a feature folder of all that a transformer is given besides latents and numbers: texts, conditions."""
    return [each.stored for each in (*family.text_tensors, *conditions_of(transformer, family))]


def named_arguments(kind: BlockList, args: tuple, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """What a block was called with, by the record's names and in their order, then whatever else it got by keyword.

    What is passed by position behind those that the record names is left out: HunyuanVideo passes some.
    """
    given = dict(zip(kind.arguments, args, strict=False)) | dict(kwargs)
    return {name: given[name] for name in kind.arguments if name in given} | given


def call_block(kind: BlockList, block: nn.Module, arguments: Mapping[str, Any]) -> Tensor | tuple[Tensor, ...]:
    """A block called as its transformer calls it, with those of `arguments` that the record names."""
    values = {name: arguments[name] for name in kind.arguments}
    return block(**values) if kind.keywords else block(*values.values())


def named_outputs(kind: BlockList, output: Tensor | tuple[Tensor, ...]) -> dict[str, Tensor]:
    """What a block gave, tokens [B, N, D] by the record's names."""
    return dict(zip(kind.returns, output if isinstance(output, tuple) else (output,), strict=True))


def as_output(kind: BlockList, tokens: Mapping[str, Tensor]) -> Tensor | tuple[Tensor, ...]:
    """`tokens` in the form in which a block of the kind gives them."""
    left = tuple(tokens[name] for name in kind.returns)
    return left if len(left) > 1 else left[0]


def as_taken(family: DiTFamily, x: Tensor) -> Tensor:
    """Latents [B, C, T, H, W] as the family's transformer takes them."""
    match family.latents:
        case "tokens":
            return x.flatten(2).mT
        case "BTCHW":
            return x.transpose(1, 2)
    return x


def as_latents(family: DiTFamily, given: Tensor, size: Sequence[int]) -> Tensor:
    """What is shaped as the family's transformer takes and gives it, as [B, C, *size], where size is (T, H, W)."""
    if family.latents == "tokens":
        return given.mT.unflatten(2, tuple(size))
    return as_taken(family, given)


def passes_of_call(pipe: Any, family: DiTFamily, context: str | None = None) -> int:
    """Forward passes that one call of a transformer is, in the generation under way: a doubled batch is two. `context`
    is the one that its pipeline has opened."""
    rule = family.guidance
    if not rule.doubled or context in rule.single_contexts:
        return 1
    return 2 if getattr(pipe, "do_classifier_free_guidance", pipe.guidance_scale > 1) else 1  # not all of them say it


def patch_of(transformer: nn.Module) -> tuple[int, int, int]:
    """Latent frames, height and width of a video token."""
    config: Any = transformer.config
    patch = config.patch_size
    return (config.get("patch_size_t") or 1, patch, patch) if isinstance(patch, int) else tuple(patch)


def latent_channels(transformer: nn.Module) -> int:
    """C of the latents that a transformer denoises; it may take more."""
    config: Any = transformer.config
    return config.out_channels or config.in_channels


def width(transformer: nn.Module) -> int:
    """D of a transformer's video tokens."""
    config: Any = transformer.config
    return config.num_attention_heads * config.attention_head_dim


def widths(config: Mapping[str, Any], kind: BlockList) -> dict[str, int]:
    """D of the tokens that a block gives, by their names, for a transformer of this config."""
    own = config["num_attention_heads"] * config["attention_head_dim"]
    return {
        name: math.prod(config[key] for key in kind.widths[name]) if name in kind.widths else own
        for name in kind.returns
    }
