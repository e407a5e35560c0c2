"""One video on several devices: its tokens are split along the sequence by diffusers' context parallelism.

    split(pipe.transformer, family, ParallelConfig(ulysses=2))      # in each of the processes, before or after `attach`

Embedders run whole on each device; from the trunk's first block to the output head a device has its own run of tokens,
in the cache as well, and only attention exchanges any. Ulysses gives a device all tokens of some heads; a ring passes
keys and values round.

Where text goes through the trunk beside the video (HunyuanVideo), it is split as well, for which diffusers has no plan.
The first block's is padded until it divides, and every block is given a mask of the order in which attention then sees
the tokens, [video of device 0; its text; video of device 1; ...], which leaves the padding out.

B batch, N video tokens of a device, L text tokens, P devices
"""

import math
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from diffusers import ContextParallelConfig
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from vidaccel.compat.diffusers import (
    ContextParallelInput,
    ContextParallelOutput,
    enable_context_parallel,
    process_attention,
    set_parallel,
)
from vidaccel.config.parallel import ParallelConfig
from vidaccel.errors import UserError
from vidaccel.families.base import BlockList, DiTFamily, SequenceSplit
from vidaccel.families.walk import blocks_of, named_arguments, patch_of
from vidaccel.processes import group_ends_with, world
from vidaccel.runtime.fuse import take_any_mask
from vidaccel.runtime.prepare import MASKED_ATTENTION

TEXT = "encoder_hidden_states"


def split(
    transformer: nn.Module,
    family: DiTFamily,
    parallel: ParallelConfig,
    backend: str | None = None,
    device: torch.device | None = None,
) -> None:
    """Split the tokens of the transformer's passes over `parallel.devices` neighbouring processes, from now on.

    Args:
        transformer: of `family`, as `prepare` left it; the same in each process, and called with the same.
        family: its record.
        parallel: degrees, whose product divides the number of processes.
        backend: its attention backend; None is that of the process.
        device: that it computes on, where its weights are elsewhere.

    Raises:
        UserError: it cannot be split so.
    """
    model: Any = transformer
    device = device or torch.device(model.device)
    check_split(family, parallel, device, backend or process_attention())
    how = cast("SequenceSplit", family.split)  # as `check_split` made sure
    config: Any = model.config
    for heads in (count for name, count in config.items() if name.endswith("num_attention_heads")):
        if heads % parallel.ulysses:
            raise UserError(
                f"the {heads} heads of this {family.title} do not divide among {parallel.ulysses}",
                f"set parallel.ulysses to one of {_divisors(heads)}",
            )
    shape = world() // parallel.devices, parallel.ring, parallel.ulysses
    mesh = init_device_mesh(device.type, shape, mesh_dim_names=("videos", "ring", "ulysses"))
    group_ends_with(mesh)
    if family.needs_mask:
        for _, block in blocks_of(transformer, family):
            take_any_mask(block, family)
    degrees = ContextParallelConfig(ring_degree=parallel.ring, ulysses_degree=parallel.ulysses, mesh=mesh)
    enable_context_parallel(model, degrees, _plan(how))
    for _, block in blocks_of(transformer, family):
        for name in how.local:
            attention: Any = block.get_submodule(name)
            set_parallel(attention.processor, None)
    transformer.register_forward_pre_hook(partial(_check_call, family, parallel), with_kwargs=True)
    if _splits_text(family):
        TextShards(transformer, family, distributed.get_rank() % parallel.devices, parallel.devices)


def neighbours(parallel: ParallelConfig, device: torch.device) -> DeviceMesh:
    """The processes that make this one's video, as a mesh of one dimension; every process is to call it."""
    shape = world() // parallel.devices, parallel.devices
    mesh = init_device_mesh(device.type, shape, mesh_dim_names=("videos", "devices"))
    own = mesh["devices"]
    for each in (mesh, own):
        group_ends_with(each)
    return own


def check_split(family: DiTFamily, parallel: ParallelConfig, device: torch.device, attention: str) -> None:
    """`UserError` for what is known to be impossible before weights are read."""
    if world() % parallel.devices:
        raise UserError(
            f"a video on {parallel.devices} devices takes as many processes, or a multiple, and there "
            f"{'is' if world() == 1 else 'are'} {world()}",
            f"torchrun --nproc-per-node={parallel.devices} -m vidaccel generate ...",
        )
    if family.split is None:
        raise UserError(
            f"a video of {family.title} cannot be split: there is no plan for its tokens",
            "leave parallel.ulysses and parallel.ring out: processes then make a video each",
        )
    masked = _splits_text(family)
    if masked and attention not in MASKED_ATTENTION:
        raise UserError(
            f"attention={attention} takes no mask, which the text of {family.title} needs where it is split",
            "set attention=native",
        )
    if parallel.ring == 1:
        return
    if device.type != "cuda":
        raise UserError(
            "parallel.ring needs CUDA devices: PyTorch's attention on a CPU gives no log-sum-exp to add parts up by",
            "set parallel.ulysses instead",
        )
    if masked:
        raise UserError(
            f"ring attention takes no mask, which the text of {family.title} needs where it is split",
            "set parallel.ulysses instead",
        )
    if attention == "native":
        raise UserError("attention=native gives no log-sum-exp, which a ring adds parts up by", "set attention=flash")


def check_tokens(transformer: nn.Module, parallel: ParallelConfig, size: tuple[int, int, int]) -> None:
    """`UserError` unless the tokens of latents of that size (T, H, W) divide among the devices."""
    tokens = math.prod(side // patch for side, patch in zip(size, patch_of(transformer), strict=True))
    _check_divides(tokens, parallel)


def _check_call(family: DiTFamily, parallel: ParallelConfig, transformer: nn.Module, args: tuple, kwargs: dict) -> None:
    """A forward pre-hook."""
    x = args[0] if args else kwargs["hidden_states"]
    if family.latents == "tokens":
        _check_divides(x.shape[1], parallel)
    else:
        check_tokens(transformer, parallel, x.shape[2:])
    for name in family.split.beside if family.split else ():
        _check_divides(kwargs[name].shape[1], parallel, name)


def _check_divides(tokens: int, parallel: ParallelConfig, of: str = "the video") -> None:
    if tokens % parallel.devices:
        raise UserError(
            f"the {tokens} tokens of {of} do not divide among {parallel.devices} devices",
            f"they do among {_divisors(tokens)}; or make a video of another size",
        )


def _divisors(number: int, most: int = 64) -> str:
    return ", ".join(str(each) for each in range(1, min(number, most) + 1) if number % each == 0)


def _splits_text(family: DiTFamily) -> bool:
    """Whether text goes through the trunk, and not only into it."""
    return any(TEXT in kind.returns for kind in family.block_lists)


def _plan(how: SequenceSplit) -> dict[str, Any] | None:
    """In the terms of diffusers."""
    if not how.outputs:
        return None
    outputs = {
        path: {i: ContextParallelInput(dim, split_output=True) for i, dim in enumerate(dims)}
        for path, dims in how.outputs.items()
    }
    return outputs | {path: ContextParallelOutput(1, expected_dims=3) for path in how.gathered}


class TextShards:
    """Text and masks of a trunk whose blocks are given `shard` of `count` of the video's tokens.

    Its hooks are PyTorch's own, which run before those of diffusers' kind on the same block, whichever came first.
    """

    def __init__(self, transformer: nn.Module, family: DiTFamily, shard: int, count: int):
        self._shard, self._count = shard, count
        self._mask: Tensor | None = None
        """Of the pass that is under way."""
        for index, (kind, block) in enumerate(blocks_of(transformer, family)):
            block.register_forward_pre_hook(partial(self._enter, kind, index == 0), with_kwargs=True)

    def _enter(self, kind: BlockList, first: bool, block: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        """A forward pre-hook: the first block's text, and every block's mask."""
        masked = str(kind.mask)
        changed: dict[str, Any] = {}
        if first:
            given = named_arguments(kind, args, kwargs)
            text, mask = given[TEXT], given[masked]
            self._mask = joint_mask(mask, given["hidden_states"].shape[1], text, self._count)
            padded = F.pad(text, (0, 0, 0, -text.shape[1] % self._count))
            changed[TEXT] = padded.chunk(self._count, dim=1)[self._shard]
        changed[masked] = self._mask
        args = tuple(changed.get(name, value) for name, value in zip(kind.arguments, args, strict=False)) + tuple(
            args[len(kind.arguments) :]
        )
        return args, kwargs | {name: value for name, value in changed.items() if name in kwargs}


def joint_mask(mask: Tensor | None, video: int, text: Tensor, count: int) -> Tensor | None:
    """The mask [B, 1, 1, P (N + L')] of tokens in the order [video 0; text 0; video 1; ...], or None for none.

    Args:
        mask: what the stock block would be given, [B, L] or [B, 1, 1, video and text], whose last L are the text's.
        video: N.
        text: [B, L, D]; L' is L padded until it divides, by device.
        count: P.
    """
    batch, length = text.shape[:2]
    padding = -length % count
    if mask is None:
        if not padding:
            return None
        taking_part = torch.ones(batch, length, dtype=torch.bool, device=text.device)
    else:
        taking_part = mask.bool().flatten(1)[:, -length:]
    of_text = F.pad(taking_part, (0, padding), value=False).unflatten(1, (count, -1))
    of_video = of_text.new_ones(batch, count, video)
    return torch.cat([of_video, of_text], dim=2).flatten(1)[:, None, None]
