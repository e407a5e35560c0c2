"""Random scenes as a bank to train on, rendered and encoded where the model is.

On a GPU thousands of clips a second: scenes are drawn in processes, and everything else happens on the device, in
batches.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from vidaccel.collect.bank import Bank, cut_texts
from vidaccel.collect.encode import LATENT, encode_texts, encode_videos, is_mask
from vidaccel.errors import UserError
from vidaccel.models.loading import LoadedPipeline
from vidaccel.progress import Progress
from vidaccel.worlds.sprites.drawing import Scenes
from vidaccel.worlds.sprites.render import render
from vidaccel.worlds.sprites.world import Scene

CLIPS_AT_ONCE = 128
CAPTIONS_AT_ONCE = 4096


def rendered_bank(
    loaded: LoadedPipeline, scenes: Scenes, clips: int, captions: int, processes: int | None = None
) -> Bank:
    """The first `clips` of the scenes with so many captions each: what `encode_samples` makes of them in float16, on
    the model's device, a caption that several clips share once.

    Args:
        processes: that draw scenes, one a core unless given.

    Raises:
        UserError: a number is not finite in half precision.
    """
    return bank_of(loaded, scenes.many(clips, captions, processes))


def bank_of(loaded: LoadedPipeline, told: Sequence[tuple[Scene, list[str]]]) -> Bank:
    """As `rendered_bank`, of scenes that are drawn already, each with as many captions as the others."""
    vae, rows = loaded.pipe.vae, {}

    def latents(scenes: Sequence[Scene]) -> Tensor:
        return encode_videos(vae, render(scenes, device=vae.device), len(scenes)).half()

    which = [[rows.setdefault(caption, len(rows)) for caption in captions] for _, captions in told]
    bank = Bank(
        in_batches(latents, [scene for scene, _ in told], CLIPS_AT_ONCE, "encoding clips"),
        cut_texts(_encoded_texts(loaded, list(rows)), loaded.family),
        torch.tensor(which, device=vae.device),
    )
    for name, tensor in {LATENT: bank.latents, **bank.texts}.items():
        if not torch.isfinite(tensor).all():
            raise UserError(f"the {name} of a scene is not finite in float16", "the model's weights are broken")
    return bank


def in_batches(compute: Callable[[Sequence], Tensor], items: Sequence, at_once: int, title: str) -> Tensor:
    """`compute` of all items [N, ...], of `at_once` at a time."""
    parts = []
    with Progress(title, total=len(items)) as bar:
        for first in range(0, len(items), at_once):
            part = items[first : first + at_once]
            parts.append(compute(part))
            bar.advance(len(part))
    return torch.cat(parts)


def _encoded_texts(loaded: LoadedPipeline, captions: list[str]) -> dict[str, Tensor]:
    """[M, ...] by stored name: masks bool, all else in half precision."""
    parts = []
    with Progress("encoding captions", total=len(captions)) as bar:
        for first in range(0, len(captions), CAPTIONS_AT_ONCE):
            part = captions[first : first + CAPTIONS_AT_ONCE]
            parts.append(encode_texts(loaded, part))
            bar.advance(len(part))
    dtypes = {text.stored: torch.bool if is_mask(text) else torch.float16 for text in loaded.family.text_tensors}
    return {name: torch.cat([part[name].to(dtype) for part in parts]) for name, dtype in dtypes.items()}
