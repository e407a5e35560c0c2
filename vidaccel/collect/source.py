"""Where clips and captions come from: a folder of the user's videos, or a world that renders them.

A source is a sequence: `source[i]` is (video float32 [3, T, H, W] in [-1, 1], record), where the record holds the
caption and what else there is to know about the clip. `EncodedSource` encodes them when asked, in place of a feature
folder.
"""

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from vidaccel.collect.encode import LATENT, encode_samples, encode_texts, first_frames
from vidaccel.config.checks import SIZE
from vidaccel.config.collect import CollectConfig
from vidaccel.data.buckets import Buckets, Size
from vidaccel.data.clips import ClipFolder
from vidaccel.data.order import index_at
from vidaccel.data.shards import Sample
from vidaccel.data.video import BadClip
from vidaccel.errors import UserError
from vidaccel.families.base import DiTFamily
from vidaccel.families.walk import denoisers_of, latent_channels
from vidaccel.models.calling import IMAGES_OF_CLIPS, check_image, check_sizes, latent_size
from vidaccel.models.loading import LoadedPipeline
from vidaccel.worlds import WORLDS, world

log = logging.getLogger(__name__)
Record = dict[str, Any]


class ClipSource(Protocol):
    """Clips of one rate, and of one size unless they are a folder's, with their captions."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> tuple[Tensor, Record]: ...

    def record(self, index: int) -> Record:
        """That of `self[index]`, without its video."""

    @property
    def fingerprint(self) -> Record:
        """Everything that decides what the clips are, as JSON can hold it."""


@dataclass(frozen=True)
class FolderClips:
    """The usable clips of a folder, in the order of its captions.jsonl."""

    clips: ClipFolder
    several: tuple[Size, ...] = ()
    """Sizes that clips are brought to, where there are several."""

    def __len__(self) -> int:
        return len(self.clips)

    def __getitem__(self, index: int) -> tuple[Tensor, Record]:
        try:
            return self.clips[index][0], self.record(index)
        except BadClip as error:  # it passed the check at the start
            raise UserError(str(error), "the file has changed since the run began: put it back") from error

    def record(self, index: int) -> Record:
        clips = self.clips
        return {"caption": clips.captions[index], "file": clips.files[index], "fps": clips.fps, "crop": "centre"}

    @property
    def fingerprint(self) -> Record:
        clips = self.clips
        sizes = [(clips.folder / file).stat().st_size for file in clips.files]
        listing = json.dumps([clips.files, clips.captions, sizes])
        return {
            "data": hashlib.sha256(listing.encode()).hexdigest(),
            **({"sizes": self.several} if self.several else {"size": [clips.num_frames, clips.height, clips.width]}),
            "fps": clips.fps,
        }


def sizes_of(source: ClipSource) -> Sequence[Size] | None:
    """The size of each clip's video, where they may have several."""
    return source.clips.sizes if isinstance(source, FolderClips) and source.several else None


@dataclass(frozen=True)
class Part:
    """Some clips of a source, all of one size."""

    source: ClipSource
    indices: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> tuple[Tensor, Record]:
        return self.source[self.indices[index]]

    def record(self, index: int) -> Record:
        return self.source.record(self.indices[index])

    @property
    def fingerprint(self) -> Record:
        return self.source.fingerprint | {"clips": self.indices}


class EncodedSource:
    """Samples of kind `encoded`, computed when asked for: to be read like a `ShardFolder` of them."""

    def __init__(self, loaded: LoadedPipeline, source: ClipSource, dtype: str = "float16"):
        """`dtype` is what tensors are rounded to, as they would be in a folder."""
        self.loaded, self.source, self.dtype = loaded, source, dtype
        sizes = sizes_of(source) or ()
        self.buckets = Buckets(sizes) if len(set(sizes)) > 1 else None
        """As of a `ShardFolder`."""

    def commonest(self) -> "EncodedSource":
        """As `ShardFolder.commonest`."""
        return self if self.buckets is None else self.part(self.buckets.commonest)

    def part(self, indices: Iterable[int]) -> "EncodedSource":
        """As `ShardFolder.part`."""
        return EncodedSource(self.loaded, Part(self.source, tuple(int(i) for i in indices)), self.dtype)

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Sample:
        return self.read([index])[0]

    def read(self, indices: Sequence[int]) -> list[Sample]:
        """As `ShardFolder.read`; they are encoded together, in the models' own dtypes even where training autocasts."""
        videos, records = zip(*(self.source[i] for i in indices), strict=True)
        with torch.autocast(self.loaded.pipe.device.type, enabled=False):
            return encode_samples(self.loaded, videos, records, self.dtype)

    def at(self, position: int, seed: int) -> int:
        """As `ShardFolder.at`."""
        return index_at(position, len(self), seed)


@dataclass(frozen=True)
class Prompts:
    """Captions that no clip goes with."""

    texts: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, index: int) -> tuple[Tensor, Record]:
        raise LookupError(f"prompt {index} has no video")

    def record(self, index: int) -> Record:
        return {"caption": self.texts[index]}

    @property
    def fingerprint(self) -> Record:
        return {"prompts": hashlib.sha256(json.dumps(self.texts).encode()).hexdigest()}


class EncodedPrompts(EncodedSource):
    """Samples of prompts alone: their texts, beside a latent that has the shape of a video's and no values."""

    def __init__(self, loaded: LoadedPipeline, prompts: Prompts, config: CollectConfig):
        """Raises `UserError` where videos begin with an image, or the model cannot make such as `config` names."""
        super().__init__(loaded, prompts)
        check_image(loaded.family, given=False, hint=IMAGES_OF_CLIPS)
        transformer = denoisers_of(loaded.pipe, loaded.family)[0]
        shape = (latent_channels(transformer), *latent_size(loaded, **size_of(loaded, config)))
        self._latent = torch.empty(shape, device="meta")

    def read(self, indices: Sequence[int]) -> list[Sample]:
        records = [self.source.record(i) for i in indices]
        texts = encode_texts(self.loaded, [record["caption"] for record in records])
        return [
            ({LATENT: self._latent} | {name: text[i].cpu() for name, text in texts.items()}, record)
            for i, record in enumerate(records)
        ]


def images_of(source: ClipSource, indices: Sequence[int], family: DiTFamily) -> list[np.ndarray] | None:
    """First frames of those clips, uint8 [H, W, 3] each, for a family that begins with an image; else None."""
    if not family.begins_with_image:
        return None
    return [first_frames(source[i][0][None])[0] for i in indices]


OR_PROMPTS = "; texts alone do too: prompts=FILE, one a line"


def open_source(loaded: LoadedPipeline, config: CollectConfig, instead: str = "") -> ClipSource:
    """The clips that `config` names, at the size and rate it names or else the model's own; `instead` goes on with the
    hint where it names none.

    Raises:
        UserError: the model cannot make videos of this size, the folder has too few usable clips, or there is no folder
            and the model does not understand rendered scenes.
    """
    size, fps = size_of(loaded, config), config.fps or loaded.default("fps")
    if config.sizes is not None:
        return _of_several_sizes(loaded, config, fps)
    if config.data is not None:
        return FolderClips(ClipFolder(config.data, **size, fps=fps, max_bad_share=config.max_bad_share, sizes=()))
    for name in WORLDS:
        if (source := world(name).clip_source(loaded, config.clips, config.seed, size, fps)) is not None:
            return source
    instead = "" if loaded.family.begins_with_image else instead
    raise UserError(
        f"there are no clips: {loaded.source} is no model of a world whose clips can be rendered ({', '.join(WORLDS)})",
        f"give a folder of videos with captions.jsonl: data=FOLDER{instead}",
    )


def _of_several_sizes(loaded: LoadedPipeline, config: CollectConfig, fps: float) -> FolderClips:
    several = tuple((frames, height, width) for frames, height, width in config.sizes or ())
    for frames, height, width in several:
        check_sizes(loaded, num_frames=frames, height=height, width=width)
    clips = ClipFolder(
        config.data or "",
        num_frames=several[0][0],
        height=several[0][1],
        width=several[0][2],
        fps=fps,
        max_bad_share=config.max_bad_share,
        sizes=several,
    )
    counts = Counter(clips.sizes)
    log.info("%s", "; ".join(f"{count} clips of {t} x {h} x {w}" for (t, h, w), count in counts.most_common()))
    return FolderClips(clips, several)


def size_of(loaded: LoadedPipeline, config: CollectConfig) -> dict[str, int]:
    """num_frames, height and width of the videos, as `config` names them or else the model; `UserError` if it cannot
    make such."""
    size = {name: loaded.default(name) if getattr(config, name) is None else getattr(config, name) for name in SIZE}
    check_sizes(loaded, **size)
    return size
