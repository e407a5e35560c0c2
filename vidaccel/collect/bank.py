"""Encoded clips and their texts in a device's memory, from which a batch is gathered without waiting for anything.

Reading a feature folder, or encoding clips when they are asked for, takes longer than a small model's step on a GPU.
So what is trained on lies on the device, as it is stored in a folder: in half precision, masks as bool.

N clips, k captions a clip, M texts, B batch, L text tokens
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from vidaccel.collect.encode import IMAGE, LATENT
from vidaccel.collect.source import EncodedSource
from vidaccel.data.order import index_at
from vidaccel.data.shards import ShardFolder
from vidaccel.families.base import DiTFamily
from vidaccel.models.loading import LoadedPipeline
from vidaccel.models.velocity import Text, lengthened
from vidaccel.progress import Progress
from vidaccel.worlds import WORLDS, Split, world

ROUNDED_TO = 8
"""Texts are cut to a multiple of so many tokens, which matrix products on a GPU want."""


@dataclass(frozen=True)
class Bank:
    """Samples of kind `encoded`: sample `clip * k + caption` is that clip with that one of its captions."""

    latents: Tensor
    """[N, C, T, H, W] in the transformer's units."""
    texts: Text
    """By stored name [M, ...]; conditions as well, in banks of one caption a clip."""
    which: Tensor
    """[N, k] rows of `texts`."""

    def __len__(self) -> int:
        """Clips."""
        return len(self.which)

    @property
    def captions(self) -> int:
        """k, captions a clip."""
        return self.which.shape[1]

    def at(self, position: int, seed: int) -> int:
        """The sample drawn at `position`, counted from 0 over all epochs: clips in the order of `ShardFolder.at`, each
        with its next caption from epoch to epoch."""
        clip = index_at(position, len(self), seed)
        return clip * self.captions + (clip + position // len(self)) % self.captions

    def batch(self, indices: Sequence[int], dtype: torch.dtype) -> dict[str, Tensor]:
        """As `collect.encode.batch` of these samples: `latent` and texts [B, ...], masks too, in `dtype`.

        On the bank's device; nothing waits for it.
        """
        index = sent(indices, self.latents.device)
        row = self.which.flatten().index_select(0, index)
        clips = self.latents.index_select(0, index // self.captions).to(dtype)
        return {LATENT: clips} | {name: text.index_select(0, row).to(dtype) for name, text in self.texts.items()}

    def split(self, count: int) -> tuple["Bank", "Bank"]:
        """The bank without its last `count` clips, and those; both share their texts.

        Raises:
            ValueError: that leaves one of the two without clips.
        """
        if not 0 < count < len(self):
            raise ValueError(f"{count} of {len(self)} clips cannot be split off")
        first = len(self) - count
        return (
            replace(self, latents=self.latents[:first], which=self.which[:first]),
            replace(self, latents=self.latents[first:], which=self.which[first:]),
        )

    def cut(self, text: Text) -> Text:
        """Another text [B, ...] as `encode_texts` gives it, such as the unconditional one, cut to the bank's lengths.

        Raises:
            ValueError: it is longer than they are.
        """
        for name, kept in self.texts.items():
            if kept.dtype == torch.bool and text[name][:, kept.shape[1] :].any():
                raise ValueError(f"a text is longer than the {kept.shape[1]} tokens of the bank's {name}")
        return {name: tensor[:, : self.texts[name].shape[1]] for name, tensor in text.items()}

    @classmethod
    def of(
        cls,
        features: ShardFolder | EncodedSource,
        device: torch.device,
        family: DiTFamily,
        beside: Text | None = None,
    ) -> "Bank":
        """All samples of a feature folder of kind `encoded`, one caption a clip, in the folder's order.

        Texts are cut to the longest mask of their family (`cut_texts`), and of texts `beside` them, which are to be cut
        alike. The folder passes through the host's memory whole.
        """
        held = {
            name: torch.empty(len(features), *t.shape, dtype=t.dtype, device="cpu")
            for name, t in features[0][0].items()
            if name != IMAGE
        }
        with Progress("loading clips", total=len(features)) as bar:
            for index in range(len(features)):
                sample, _ = features[index]
                for name, tensors in held.items():
                    tensors[index] = sample[name]
                bar.advance()
        latents = held.pop(LATENT).to(device)
        texts = {name: text.to(device) for name, text in cut_texts(held, family, beside).items()}
        return cls(latents, texts, torch.arange(len(features), device=device).view(-1, 1))


def world_bank(loaded: LoadedPipeline, clips: int, captions: int, seed: int, split: Split = "train") -> Bank | None:
    """A bank of that many new clips with so many captions each, by the world whose words the model knows, on the
    model's device; None where it is no model of a world. The clips of `held_out` are of things that training never
    sees."""
    banks = (world(name).bank(loaded, clips, captions, seed, split) for name in WORLDS)
    return next((bank for bank in banks if bank is not None), None)


def cut_texts(
    texts: Mapping[str, Tensor], family: DiTFamily, beside: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """Texts [M, ...] by stored name without the tokens that every mask leaves out, those of texts `beside` them too.

    But for rounding up to a multiple of `ROUNDED_TO` and for tokens that the family needs. Those that are shorter than
    texts beside them are padded. Where padding is not masked (Wan) nothing is cut.
    """
    cut, stored = dict(texts), {text.argument: text.stored for text in family.text_tensors}
    for text in family.text_tensors:
        if text.mask is None:
            continue
        mask = stored[text.mask]
        masks = [each[mask] for each in (texts, beside) if each is not None]
        longest = max(text.least, *map(_used, masks))
        length = min(-(-longest // ROUNDED_TO) * ROUNDED_TO, max(each.shape[1] for each in masks))
        for name in (text.stored, mask):
            cut[name] = lengthened(texts[name][:, :length], length).contiguous()
    return cut


def _used(mask: Tensor) -> int:
    """How many columns of a mask [M, L] there are up to the last that any row uses."""
    used = mask.bool().any(0).nonzero()
    return int(used.max()) + 1 if len(used) else 0


def sent(indices: Sequence[int], device: torch.device) -> Tensor:
    """[B] int64 on the device: through pinned memory, since a copy from other memory waits for all work before it."""
    index = torch.tensor(indices, dtype=torch.int64, device="cpu")
    return index if device.type == "cpu" else index.pin_memory().to(device, non_blocking=True)
