"""Decoding in the memory that there is, by diffusers' own autoencoders:

    whole  whole in space, and in time as diffusers goes through it: HunyuanVideo in chunks of 16 frames that are
           blended, Wan and CogVideoX in chunks that hand on what their causal convolutions need (which changes no
           frame), HunyuanVideo-1.5 and LTX-Video at once
    once   in space and time in as few and large pieces as there can be, one where that fits: HunyuanVideo's chunks are
           else 5 latent frames of which 3 are new, so that up to 1.7 times less is computed
    tiled  in tiles, as few and large as memory allows, no smaller than diffusers' own, blended where they overlap; as
           many at least as there are devices that make the video, which share them
    auto   whole where that fits, else tiled; on a CPU, and where somebody has enabled tiling, the autoencoder is left
           as it is

What a way needs is read off a run of the same autoencoder on the meta device, where tensors have sizes alone. `auto`
and `once` keep below `LARGEST` on a CUDA device, which HunyuanVideo's 704 x 704 whole in space is above.
"""

import logging
import math
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from inspect import signature
from typing import Any, NamedTuple
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

ROOM = 1.5
"""Free memory over what a way needs, for it to be taken: convolutions have workspaces, and allocators round. On an H200
HunyuanVideo's 704 x 704 took 24.0 GiB beside the weights where 17.4 are traced (`once`), and 16.9 for 12.3 (`auto`)."""
IN_CHUNKS = {family.chunked_autoencoder for family in FAMILIES.values()} - {None}
"""Autoencoders that go through time in chunks, all of which take the same."""
LIKE_ALL = 8
"""Latent frames, or one more of an odd number (for CogVideoX's first chunk), in which every kind of chunk is, where an
autoencoder has no size of them to set."""
LARGEST = 2**31 - 1
"""Elements of a tensor that `auto` and `once` go up to on a CUDA device. Above, PyTorch's padding and upsampling have
raised; 2.11 on an H200 was 5 % slower at 2.4e9 elements, and at several times that did not end within a minute."""
UNITS = range(16, 3, -1)
"""Parts of a tile's side of which neighbours share one, the least share first: no side is below four latent pixels."""
FEW = 3
"""Ways in space, from whole on, of which `once` takes the one that computes least."""
SMALLER = "ask for fewer frames or a smaller height and width"

CHUNK, STRIDE = "tile_sample_min_num_frames", "tile_sample_stride_num_frames"
"""The attributes of diffusers' autoencoders that hold the frames of a chunk, and those from one to the next."""


class Need(NamedTuple):
    """What decoding takes."""

    bytes: int
    """Beside the weights."""
    largest: int
    """Elements of its largest tensor."""


class Traced(NamedTuple):
    """What one piece of a latent takes."""

    peak: int
    """Bytes alive at most, all frames among them."""
    frames: int
    """Bytes of the frames."""
    largest: int
    """Elements of the largest tensor."""


_traces: WeakKeyDictionary[nn.Module, dict[tuple, Traced]] = WeakKeyDictionary()
"""What `_traced` found of an autoencoder, by the latent and the type that it is in."""
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
        shares = {unit: _shared(extent, pieces, unit) for unit in UNITS}
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
    """Tiles of a latent of (height, width), from two on to as many as make them no larger than diffusers' own, or as
    small as tiles can be."""
    smallest = UNITS[-1]
    least = [max(smallest, side // pixels) for side in (vae.tile_sample_min_height, vae.tile_sample_min_width)]
    overlap = min(least) // 4
    pieces = [1, 1]
    while True:
        longer = 0 if extent[0] / pieces[0] >= extent[1] / pieces[1] else 1
        pieces[longer] += 1
        tiles = Tiles.of(extent, (pieces[0], pieces[1]), overlap, pixels)
        yield tiles
        ends = zip((tiles.height, tiles.width), extent, least, strict=True)
        if all(side <= end or whole <= smallest for side, whole, end in ends):
            return


class Way(NamedTuple):
    """How a latent is decoded."""

    tiles: Tiles | None
    """None is whole in space."""
    chunk: int | None = None
    """Frames of a chunk in time; None is what the autoencoder has."""

    def set(self, vae: Any, pixels: int) -> None:
        """Have the autoencoder go about it so."""
        vae.disable_tiling() if self.tiles is None else self.tiles.set(vae, pixels)
        if self.chunk is not None:
            vars(vae).update(_chunk(vae, self.chunk))


def _chunk(vae: Any, frames: int | None) -> dict[str, int]:
    """The attributes of chunks of so many frames, blended with their neighbours over as many as the autoencoder's own;
    those that it has for None, and none where it decodes in no chunks of a size."""
    if type(vae).__name__ not in IN_CHUNKS or not hasattr(vae, CHUNK):
        return {}
    own = {name: getattr(vae, name) for name in (CHUNK, STRIDE)}
    return own if frames is None else {CHUNK: frames, STRIDE: frames - own[CHUNK] + own[STRIDE]}


def needed(vae: Any, latent: tuple[int, ...], way: Way) -> Need:
    """What decoding a latent [B, C, T, H, W] takes.

    Bytes of several pieces are the largest one's and, twice, the frames: those of all pieces, and put together. That is
    somewhat too much, as a piece's peak has its own frames in it.
    """
    T, height, width = latent[2:]
    piece = (T, height, width)
    if way.tiles is not None:
        piece = (T, min(height, way.tiles.height), min(width, way.tiles.width))
    if (chunks := _chunk(vae, way.chunk)) and (per := chunks[CHUNK] // vae.temporal_compression_ratio) < T:
        piece = (min(T, per + 1), *piece[1:])
    of_piece = _traced(vae, (*latent[:2], *piece))
    if piece == (T, height, width):
        return Need(of_piece.peak, of_piece.largest)
    frames = of_piece.frames * _frames(vae, T) * height * width / (_frames(vae, piece[0]) * piece[1] * piece[2])
    return Need(of_piece.peak + round(2 * frames), of_piece.largest)


def _frames(vae: Any, latents: int) -> int:
    """Of so many latent frames."""
    ratio = getattr(vae, "temporal_compression_ratio", None)
    return latents if ratio is None else ratio * (latents - 1) + 1


def _traced(vae: Any, latent: tuple[int, ...]) -> Traced:
    """Of a piece, by a run on the meta device."""
    known, key = _traces.setdefault(vae, {}), (*latent, vae.dtype)
    if key not in known:
        T = some = latent[2]
        with torch.device("meta"):
            blank: Any = type(vae).from_config(vae.config)
            nn.Module.to(blank, vae.dtype)  # diffusers' own warns
            if _chunk(blank, None):
                setattr(blank, CHUNK, T * blank.temporal_compression_ratio)
            elif type(vae).__name__ in IN_CHUNKS:
                some = min(T, LIKE_ALL + T % 2)
            z, told = torch.empty(*latent[:2], some, *latent[3:], dtype=vae.dtype), {}
            if vae.config.get("timestep_conditioning"):
                told["temb"] = torch.empty(len(z), dtype=vae.dtype)
            with torch.no_grad(), LiveBytes() as live, FusedAttention(), Unwritten():
                frames = blank.decode(z, **told).sample
        whole = frames.nbytes * T // some
        known[key] = Traced(live.peak + 2 * (whole - frames.nbytes), whole, live.largest)
    return known[key]


def _computed(vae: Any, latent: tuple[int, ...], way: Way) -> int:
    """Frames times latent pixels that are decoded, those in several pieces as often."""
    T, height, width = latent[2:]
    area, frames = height * width, T
    if way.tiles is not None:
        sides = ((height, way.tiles.height), (width, way.tiles.width))
        area = math.prod(sum(_pieces(whole, side, side - side // way.tiles.unit)) for whole, side in sides)
    if chunks := _chunk(vae, way.chunk):
        ratio = vae.temporal_compression_ratio
        length, stride = (chunks[name] // ratio for name in (CHUNK, STRIDE))
        frames = sum(_frames(vae, each) for each in ([T] if length >= T else _pieces(T, length + 1, stride)))
    return area * frames


def _pieces(whole: int, length: int, stride: int) -> list[int]:
    return [min(length, whole - start) for start in range(0, whole, stride)]


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
    limit = LARGEST if device.type == "cuda" else math.inf
    extent = latent[-2], latent[-1]

    def fits(way: Way) -> bool:
        need = needed(vae, latent, way)
        return (need.bytes + brought) * ROOM <= free and need.largest <= limit

    tiled = _shareable(tilings(vae, extent, pixels), extent, loaded.devices.size() if loaded.devices else 1)
    if loaded.decode == "once":
        way = _least_computed(vae, latent, [None, *tiled], fits)
    else:
        ways = [Way(None)] if loaded.decode != "tiled" else []
        ways += [Way(tiles) for tiles in tiled] if loaded.decode != "whole" else []
        way = next(filter(fits, ways), ways[-1])
    need, named = needed(vae, latent, way), _named(vae, latent, way, pixels)
    if need.bytes + brought > free:
        other = f"set decode=tiled, or {SMALLER}" if loaded.decode in ("whole", "once") else SMALLER
        there = f"{_gib(free)} of {device.type} memory are free"
        raise UserError(f"decoding {named} needs {_gib(need.bytes + brought)}, and {there}", other)
    said = f"decoding {named}, which needs {_gib(need.bytes + brought)}"
    if _said.get(vae) != said:
        _said[vae] = said
        log.info("%s; %s of %s memory are free", said, _gib(free), device.type)
    way.set(vae, pixels)


def _least_computed(
    vae: Any, latent: tuple[int, ...], every: Sequence[Tiles | None], fits: Callable[[Way], bool]
) -> Way:
    """Of the first `FEW` ways in space that fit, with the longest chunks in time that do; if none fits, of the smallest
    tiles with the autoencoder's own chunks."""
    ways: list[Way] = []
    for tiles in every:
        chunks: Sequence[int | None] = [None]
        if own := _chunk(vae, None):
            least, most = own[CHUNK], vae.temporal_compression_ratio * latent[2]
            chunks = [*range(least, most, own[STRIDE]), max(least, most)]
        if longest := bisect_left(chunks, True, key=lambda chunk, tiles=tiles: not fits(Way(tiles, chunk))):
            ways.append(Way(tiles, chunks[longest - 1]))
        if len(ways) == FEW:
            break
    return min(ways, key=lambda way: _computed(vae, latent, way), default=Way(every[-1]))


def _shareable(ways: Iterable[Tiles], extent: tuple[int, int], devices: int) -> list[Tiles]:
    """Those of as many tiles as devices at least, or the one of most."""
    every = list(ways)
    return [tiles for tiles in every if math.prod(tiles.counts(extent)) >= devices] or every[-1:]


def _named(vae: Any, latent: tuple[int, ...], way: Way, pixels: int) -> str:
    T, *extent = latent[2:]
    chunks = "" if way.chunk is None else f" in chunks of {way.chunk + 1} frames"
    if way.tiles is None:
        if way.chunk is None:
            return "whole"
        return "at once" if way.chunk // vae.temporal_compression_ratio >= T else f"whole in space{chunks}"
    sides = (way.tiles.height, way.tiles.width)
    rows, columns = way.tiles.counts((extent[0], extent[1]))
    height, width = (min(whole, side) * pixels for whole, side in zip(extent, sides, strict=True))
    return f"in {rows} x {columns} tiles of {height} x {width}{chunks}"


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
