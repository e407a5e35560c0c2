"""Decoding in the memory that there is, by diffusers' own autoencoders:

    whole  whole in space, and in time as diffusers goes through it: HunyuanVideo in chunks of 16 frames that are
           blended, Wan and CogVideoX in chunks that hand on what their causal convolutions need (which changes no
           frame), HunyuanVideo-1.5 and LTX-Video at once
    once   whole in space and time: chunks of HunyuanVideo are 5 latent frames of which 3 are new, so that up to 1.7
           times less is computed; its mid-block then has an attention mask of all latent pixels by all
    tiled  in tiles, as few and large as memory allows, no smaller than diffusers' own, blended where they overlap; as
           many at least as there are devices that make the video, which share them
    auto   whole where that fits, else tiled; on a CPU, and where somebody has enabled tiling, the autoencoder is left
           as it is

What a way needs is read off a run of the same autoencoder on the meta device, where tensors have sizes alone.
"""

import logging
import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from inspect import signature
from typing import Any
from weakref import WeakKeyDictionary

import psutil
import torch
from torch import nn

from vidaccel.compat.diffusers import execution_device
from vidaccel.errors import UserError
from vidaccel.families.registry import FAMILIES
from vidaccel.models.calling import compression_of, latent_size
from vidaccel.models.decoder import latent_width
from vidaccel.models.live_bytes import FusedAttention, LiveBytes, Unwritten, weight_bytes
from vidaccel.models.loading import LoadedPipeline
from vidaccel.processes import exchanged
from vidaccel.runtime.shared_tiles import sharing_tiles

log = logging.getLogger(__name__)

ROOM = 1.4
"""Free memory over what a way needs, for it to be taken: convolutions have workspaces, and allocators round. On an H200
HunyuanVideo's 256 x 256 tiles took 4.5 GiB, weights included, where 3.6 are traced."""
IN_CHUNKS = {family.chunked_autoencoder for family in FAMILIES.values()} - {None}
"""Autoencoders that go through time in chunks, all of which take the same."""
LIKE_ALL = 8
"""Latent frames, or one more of an odd number (for CogVideoX's first chunk), in which every kind of chunk is."""
SMALLER = "ask for fewer frames or a smaller height and width"

CHUNK = "tile_sample_min_num_frames"
"""The attribute of diffusers' autoencoders that holds the frames of a chunk."""

_traces: WeakKeyDictionary[nn.Module, dict[tuple, tuple[int, int]]] = WeakKeyDictionary()
"""What `_traced` found of an autoencoder, by the latent, the frames of its chunks, and the type that it is in."""
_said: WeakKeyDictionary[nn.Module, str] = WeakKeyDictionary()
"""What was last said about an autoencoder."""


@dataclass(frozen=True)
class Tiles:
    """Tiles of a latent, the neighbours of which share one part in `unit` of their sides."""

    height: int
    width: int
    """Of a tile in latent pixels, multiples of `unit`."""
    unit: int

    @classmethod
    def of(cls, extent: tuple[int, int], pieces: tuple[int, int], overlap: int, pixels: int) -> "Tiles":
        """The smallest that cover a latent of (height, width) `extent` in so many `pieces` each way.

        They share no less than `overlap` latent pixels, or a quarter of what a piece adds where that is less; `pixels`
        is the side of a latent pixel.
        """
        shares = {unit: _shared(extent, pieces, unit) for unit in range(16, 3, -1)}
        split = [i for i in (0, 1) if pieces[i] > 1]
        least = min(overlap, *(max(1, extent[i] // pieces[i] // 4) for i in split))
        fine = [
            unit
            for unit, share in shares.items()
            if all(_exact(each, unit, pixels) for each in share) and min(share[i] for i in split) >= least
        ]
        # Of two as small the first, which shares less.
        unit = min(fine, key=lambda unit: math.prod(map(min, extent, (unit * each for each in shares[unit]))))
        height, width = (unit * each for each in shares[unit])
        return cls(height, width, unit)

    def counts(self, extent: tuple[int, int]) -> tuple[int, int]:
        """Rows and columns of tiles in a latent of (height, width)."""
        sides = (self.height, self.width)
        rows, columns = (-(-whole // (side - side // self.unit)) for whole, side in zip(extent, sides, strict=True))
        return rows, columns

    def set(self, vae: Any, pixels: int) -> None:
        """Enable them; an autoencoder takes those of its class's words for a tile that it knows."""
        words: dict[str, float] = {"tile_overlap_factor": 1 / self.unit}
        for side, extent in (("height", self.height), ("width", self.width)):
            words[f"tile_sample_min_{side}"] = extent * pixels
            words[f"tile_sample_stride_{side}"] = (extent - extent // self.unit) * pixels
            words[f"tile_latent_min_{side}"] = extent
            words[f"tile_overlap_factor_{side}"] = 1 / self.unit
        vae.enable_tiling(**{word: words[word] for word in signature(vae.enable_tiling).parameters if word in words})


def _shared(extent: tuple[int, int], pieces: tuple[int, int], unit: int) -> tuple[int, int]:
    """What neighbours share each way, where a tile has `unit` times that and advances by all but it."""
    return -(-extent[0] // (pieces[0] * (unit - 1))), -(-extent[1] // (pieces[1] * (unit - 1)))


def _exact(shared: int, unit: int, pixels: int) -> bool:
    """Whether diffusers finds the same stride and overlap from the share, rounding down as it does."""
    side, share = shared * unit, 1 / unit
    return int(side * (1 - share)) == side - shared and int(side * pixels * share) == shared * pixels


def tilings(vae: Any, extent: tuple[int, int], pixels: int) -> Iterator[Tiles]:
    """Tiles of a latent of (height, width), from two on to as many as make them no larger than diffusers' own."""
    least = vae.tile_sample_min_height // pixels, vae.tile_sample_min_width // pixels
    overlap = min(least) // 4
    pieces = [1, 1]
    while True:
        longer = 0 if extent[0] / pieces[0] >= extent[1] / pieces[1] else 1
        pieces[longer] += 1
        tiles = Tiles.of(extent, (pieces[0], pieces[1]), overlap, pixels)
        yield tiles
        if tiles.height <= least[0] and tiles.width <= least[1]:
            return


def bytes_needed(vae: Any, latent: tuple[int, ...], tiles: Tiles | None) -> int:
    """What decoding a latent [B, C, T, H, W] takes beside the weights.

    Of tiles it is the largest tile's and, twice, the frames: those of all tiles, and put together. That is somewhat too
    much, as a tile's peak has its own frames in it.
    """
    height, width = latent[-2:]
    if tiles is None:
        return _traced(vae, latent)[0]
    tile = min(height, tiles.height), min(width, tiles.width)
    peak, frames = _traced(vae, (*latent[:-2], *tile))
    return peak + round(2 * frames * height * width / (tile[0] * tile[1]))


def _traced(vae: Any, latent: tuple[int, ...]) -> tuple[int, int]:
    """Bytes alive at most while such a latent is decoded whole, and of its frames, by a run on the meta device."""
    known, chunk = _traces.setdefault(vae, {}), getattr(vae, CHUNK, None)
    key = (*latent, chunk, vae.dtype)
    if key not in known:
        frames_of = latent[2]
        like_all = type(vae).__name__ in IN_CHUNKS and not _is_one_chunk(vae, frames_of)
        some = min(frames_of, LIKE_ALL + frames_of % 2) if like_all else frames_of
        with torch.device("meta"):
            blank: Any = type(vae).from_config(vae.config)
            nn.Module.to(blank, vae.dtype)  # diffusers' own warns
            if chunk is not None:
                setattr(blank, CHUNK, chunk)
            z, told = torch.empty(*latent[:2], some, *latent[3:], dtype=vae.dtype), {}
            if vae.config.get("timestep_conditioning"):
                told["temb"] = torch.empty(len(z), dtype=vae.dtype)
            with torch.no_grad(), LiveBytes() as live, FusedAttention(), Unwritten():
                frames = blank.decode(z, **told).sample
        whole = frames.nbytes * frames_of // some
        known[key] = live.peak + 2 * (whole - frames.nbytes), whole
    return known[key]


def _is_one_chunk(vae: Any, frames: int) -> bool:
    """Whether so many latent frames are decoded at once by an autoencoder that has a size of chunks."""
    return hasattr(vae, CHUNK) and frames <= getattr(vae, CHUNK) // vae.temporal_compression_ratio


@contextmanager
def decoding(loaded: LoadedPipeline, batch: int, *, num_frames: int, height: int, width: int) -> Iterator[None]:
    """The pipeline's autoencoder made to decode `batch` videos of this size as `loaded.decode` says, for the time of a
    `with` block.

    Raises:
        UserError: the memory that is free does not do, or the autoencoder knows no tiles and they were asked for; or
            memory runs out inside.
    """
    vae: Any = loaded.pipe.vae
    device = execution_device(loaded.pipe)
    before = {name: value for name, value in vars(vae).items() if name == "use_tiling" or name.startswith("tile_")}
    try:
        if loaded.decode != "auto" or device.type != "cpu" and _tileable(vae) and not vae.use_tiling:
            frames = latent_size(loaded, num_frames=num_frames, height=height, width=width)
            _choose(loaded, (batch, latent_width(vae.config), *frames), device)
        with sharing_tiles(vae, loaded.devices):
            yield
    except torch.OutOfMemoryError as error:
        text = " ".join(str(error).split())
        raise UserError(
            f"{device.type} is out of memory: {text}", f"{SMALLER}; `generate` takes decode=tiled and offload=group too"
        ) from error
    finally:
        for name, value in before.items():
            setattr(vae, name, value)


def _choose(loaded: LoadedPipeline, latent: tuple[int, ...], device: torch.device) -> None:
    """Set the largest tiles, or none, that fit, and say so."""
    vae: Any = loaded.pipe.vae
    if not _tileable(vae):
        raise UserError(f"{type(vae).__name__} decodes in no tiles of a given size", "set decode=auto")
    pixels = compression_of(loaded.pipe, loaded.family)[1]
    free = free_bytes(device)
    if loaded.devices:  # which decode alike, or would wait for each other
        free = min(exchanged(free, loaded.devices.get_group()))
    brought = weight_bytes([vae]) if vae.device.type != device.type else 0
    extent, ways = (latent[-2], latent[-1]), []
    if loaded.decode != "tiled":
        ways.append(None)
    if loaded.decode == "once" and hasattr(vae, CHUNK):
        setattr(vae, CHUNK, max(getattr(vae, CHUNK), latent[2] * vae.temporal_compression_ratio))
    if loaded.decode in ("auto", "tiled"):
        ways += _shareable(tilings(vae, extent, pixels), extent, loaded.devices.size() if loaded.devices else 1)
    tiles, needed = None, 0
    for tiles in ways:
        needed = bytes_needed(vae, latent, tiles) + brought
        if needed * ROOM <= free:
            break
    way = "at once" if loaded.decode == "once" else _named(tiles, extent, pixels)
    if needed > free:
        other = f"set decode=tiled, or {SMALLER}" if loaded.decode in ("whole", "once") else SMALLER
        there = f"{_gib(free)} of {device.type} memory are free"
        raise UserError(f"decoding {way} needs {_gib(needed)}, and {there}", other)
    said = f"decoding {way}, which needs {_gib(needed)}"
    if _said.get(vae) != said:
        _said[vae] = said
        log.info("%s; %s of %s memory are free", said, _gib(free), device.type)
    vae.disable_tiling() if tiles is None else tiles.set(vae, pixels)


def _shareable(ways: Iterable[Tiles], extent: tuple[int, int], devices: int) -> list[Tiles]:
    """Those of as many tiles as devices at least, or the one of most."""
    every = list(ways)
    return [tiles for tiles in every if math.prod(tiles.counts(extent)) >= devices] or every[-1:]


def _named(tiles: Tiles | None, extent: tuple[int, int], pixels: int) -> str:
    if tiles is None:
        return "whole"
    rows, columns = tiles.counts(extent)
    height, width = (min(whole, side) * pixels for whole, side in zip(extent, (tiles.height, tiles.width), strict=True))
    return f"in {rows} x {columns} tiles of {height} x {width}"


def free_bytes(device: torch.device) -> int:
    """Memory that a decode could take: on CUDA what torch's allocator holds and nobody uses as well."""
    if device.type != "cuda":
        return psutil.virtual_memory().available
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + unused


def _tileable(vae: nn.Module) -> bool:
    return hasattr(vae, "tile_sample_min_height")


def _gib(count: int) -> str:
    return f"{count / 2**30:.3g} GiB"
