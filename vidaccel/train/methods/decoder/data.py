"""What a decoder learns from: latents, and the teacher's frames of them.

B batch, C channels, T frames, H and W latent pixels
"""

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from vidaccel.collect.encode import LATENT, decodable, encode_videos
from vidaccel.collect.source import ClipSource
from vidaccel.data.order import index_at
from vidaccel.data.shards import ShardFolder
from vidaccel.models.decoder import decode_whole
from vidaccel.train.methods.decoder import DecoderTraining

GIB = 2**30


class Latents(Protocol):
    """Latents by their index."""

    def __len__(self) -> int: ...

    def read(self, indices: Sequence[int]) -> Tensor:
        """[B, C, T, H, W] in the transformer's units."""
        ...

    def caption(self, index: int) -> str: ...


class StoredLatents:
    """Of a feature folder: those of encoded clips, or those in which a model's own runs ended."""

    def __init__(self, features: ShardFolder):
        self._features = features

    def __len__(self) -> int:
        return len(self._features)

    def read(self, indices: Sequence[int]) -> Tensor:
        return torch.stack([_latent(tensors) for tensors, _ in self._features.read(indices)])

    def caption(self, index: int) -> str:
        return self._features[index][1]["caption"]


def _latent(tensors: dict[str, Tensor]) -> Tensor:
    if LATENT in tensors:
        return tensors[LATENT].float()
    x, velocity, times = (tensors[name].float() for name in ("x", "velocity", "times"))
    return x[-1] - (times[-2] - times[-1]) * velocity[-1]


class EncodedLatents:
    """Of clips, encoded when they are asked for, in half precision as a folder would have them."""

    def __init__(self, vae: Any, source: ClipSource, batched: bool):
        self._vae, self._source, self._batched = vae, source, batched

    def __len__(self) -> int:
        return len(self._source)

    def read(self, indices: Sequence[int]) -> Tensor:
        clips = torch.stack([self._source[i][0] for i in indices])
        with torch.autocast(self._vae.device.type, enabled=False):
            return encode_videos(self._vae, clips, len(clips) if self._batched else 1).half().float()

    def caption(self, index: int) -> str:
        return self._source[index][1]["caption"]


class Lessons:
    """Latents as a decoder takes them and the teacher's frames, those of whole latents kept as far as memory is
    granted."""

    def __init__(self, latents: Latents, vae: Any, settings: DecoderTraining, seed: int):
        self.latents, self.vae, self.settings, self.seed = latents, vae, settings, seed
        self._kept: dict[int, Tensor] = {}
        """Latents, by their index, and in `_frames` the teacher's frames of them."""
        self._frames: dict[int, Tensor] = {}
        self._room = settings.kept * GIB

    def draw(self, index: int, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Latents [B, C, T, H, W] and frames [B, 3, T', H', W'] of forward pass `index`, on the teacher's device."""
        chosen = [index_at(index * count + i, len(self.latents), self.seed) for i in range(count)]
        if self.settings.noise == 0 and self.settings.crop is None:
            return self.of(chosen)
        z = self._latents_of(chosen)
        if self.settings.crop is not None:
            z = excerpt(z, self.settings.crop, generator)
        if self.settings.noise:
            noise = torch.randn(z.shape, generator=generator, device=generator.device).to(z)
            z = z + self.settings.noise * noise
        return self._pair(z)

    def of(self, chosen: Sequence[int]) -> tuple[Tensor, Tensor]:
        """The same of those latents, whole."""
        z, missing = self._latents_of(chosen), [place for place, i in enumerate(chosen) if i not in self._frames]
        made = dict(zip(missing, self._pair(z[missing])[1].half(), strict=True)) if missing else {}
        for place, frames in made.items():
            self._keep(self._frames, chosen[place], frames)
        frames = [made[place] if place in made else self._frames[i] for place, i in enumerate(chosen)]
        # In float32 before they are stacked: autocast to bfloat16 refuses float16.
        return z, torch.stack([each.float() for each in frames]).to(self.vae.device)

    def _latents_of(self, chosen: Sequence[int]) -> Tensor:
        missing = [i for i in chosen if i not in self._kept]
        read = dict(zip(missing, self.latents.read(missing), strict=True)) if missing else {}
        for i, latent in read.items():
            self._keep(self._kept, i, latent)
        return torch.stack([read[i] if i in read else self._kept[i] for i in chosen]).to(self.vae.device)

    def _keep(self, kept: dict[int, Tensor], index: int, tensor: Tensor) -> None:
        if tensor.nbytes <= self._room and index not in kept:
            self._room -= tensor.nbytes
            kept[index] = tensor.cpu()

    @torch.no_grad()
    def _pair(self, z: Tensor) -> tuple[Tensor, Tensor]:
        with torch.autocast(self.vae.device.type, enabled=False):
            return z, decode_whole(self.vae, decodable(self.vae, z).to(self.vae.dtype)).float()


def excerpt(z: Tensor, size: Sequence[int], generator: torch.Generator) -> Tensor:
    """A part [B, C, T', H', W'] of latents at a random place, the same of all; what is smaller stays whole."""
    for axis, wanted in zip((2, 3, 4), size, strict=True):
        room = z.shape[axis] - wanted
        if room > 0:
            first = int(torch.randint(room + 1, (), generator=generator, device=generator.device))
            z = z.narrow(axis, first, wanted)
    return z
