"""A decoder with fewer channels that starts as a slice of a wider one of its class.

Of an axis of W channels that becomes one of w, the slice takes channels floor(i W / w), i < w: w evenly spaced ones.
That depends on the two numbers alone. So whatever shares an axis (a residual stream, a norm and the convolution behind
it) takes the same channels of it, without a word about the network; of a group norm of as many groups each group keeps
its share of the channels that it had; and where an axis is k copies of W channels one behind the other, such as the
input of an upsampling that spreads channels over pixels, each copy keeps the same ones. A slice of full width is the
teacher. Blocks that the narrower decoder lacks are left out.

What a layer sums over fewer channels is not scaled up: norms undo most of it, and training does the rest.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from vidaccel.compat.diffusers import built_with
from vidaccel.errors import UserError
from vidaccel.families.base import DecoderConfig, DiTFamily
from vidaccel.train.methods.decoder import DecoderTraining


def narrower(vae: Any, family: DiTFamily, settings: DecoderTraining) -> dict[str, Any]:
    """The config of the class of `vae` with the decoder that the settings ask for.

    Raises:
        UserError: its decoder is not sized by its config, or not so.
    """
    keys, config = family.decoder, built_with(vae.config)
    if keys is None or keys.widths not in config:
        raise UserError(
            f"nobody has told how the decoder of an {type(vae).__name__} becomes narrower",
            "its family's record has no decoder=: see docs/extending.md",
        )
    if config.get("timestep_conditioning"):
        raise UserError(
            f"this {type(vae).__name__} takes the last step of denoising itself (timestep_conditioning)",
            "only decoders that are told nothing but the latent are distilled",
        )
    own = _widths(config, keys)
    depth = config[keys.depth]
    if settings.layers_per_block is not None:
        most = max(depth) if isinstance(depth, list | tuple) else depth
        if settings.layers_per_block > most:
            raise UserError(
                f"decoder.layers_per_block={settings.layers_per_block}, and the teacher has {most}", "take fewer"
            )
        few = settings.layers_per_block
        depth = [min(few, each) for each in depth] if isinstance(depth, list | tuple) else few
    return config | {keys.widths: _narrowed(own, config, settings), keys.depth: depth}


def _widths(config: Mapping[str, Any], keys: DecoderConfig) -> Any:
    own = config[keys.widths]
    return config[keys.base] if own is None and keys.base else own


def _narrowed(own: Any, config: Mapping[str, Any], settings: DecoderTraining) -> Any:
    unit = config.get("norm_num_groups") or 1
    listed = list(own) if isinstance(own, list | tuple) else [own]
    if settings.widths is None:
        made = [min(each, max(unit, unit * round(settings.width * each / unit))) for each in listed]
    elif len(settings.widths) != len(listed):
        what = (
            f"{len(listed)} levels" if isinstance(own, list | tuple) else "one number, of which levels have multiples"
        )
        raise UserError(
            f"decoder.widths={settings.widths}, and the autoencoder's widths are {what}: {listed}", "give as many"
        )
    else:
        made = list(settings.widths)
    for narrow, wide in zip(made, listed, strict=True):
        if narrow > wide or narrow % unit:
            of_groups = f", in multiples of {unit} (the groups of its norms)" if unit > 1 else ""
            raise UserError(
                f"decoder.widths={made}, and the teacher has {listed}", f"take no more than it has{of_groups}"
            )
    return made if isinstance(own, list | tuple) else made[0]


def channels(wide: int, narrow: int) -> Tensor:
    """[w] the channels of an axis of W that a slice of w takes, in their order."""
    return torch.arange(narrow) * wide // narrow


@torch.no_grad()
def slice_into(narrow: Mapping[str, Tensor], wide: Mapping[str, Tensor]) -> None:
    """Fill the weights of a narrower decoder with slices of a wider one's of the same names.

    Raises:
        UserError: the wider one has no weight of a name, or fewer channels.
    """
    for name, own in narrow.items():
        theirs = wide.get(name)
        if (
            theirs is None
            or theirs.ndim != own.ndim
            or any(a > b for a, b in zip(own.shape, theirs.shape, strict=True))
        ):
            raise UserError(
                f"the teacher's decoder has no weights to start {name} from",
                "take no more blocks and channels than it has, and keep levels as wide as each other that are so there",
            )
        for axis, (few, many) in enumerate(zip(own.shape, theirs.shape, strict=True)):
            if few != many:
                theirs = theirs.index_select(axis, channels(many, few).to(theirs.device))
        own.copy_(theirs)
