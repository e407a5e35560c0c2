"""Decoding whole and in tiles: what each needs against what it takes, how far apart frames are, what is chosen."""

import itertools
import logging
import math
import random
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.tiny import TEXT_TO_VIDEO
from vidaccel.config.generate import GenerateConfig
from vidaccel.config.runtime import RuntimeConfig
from vidaccel.errors import UserError
from vidaccel.models.calling import compression_of
from vidaccel.models.decoder import decode_whole
from vidaccel.models.live_bytes import LiveBytes, weight_bytes
from vidaccel.models.loading import LoadedPipeline, load_pipeline
from vidaccel.runtime import decode
from vidaccel.runtime.decode import Tiles, Way, _shareable, decoding, needed, tilings
from vidaccel.runtime.prepare import prepare
from vidaccel.sampling import generate
from vidaccel.worlds.sprites.render import render
from vidaccel.worlds.sprites.world import random_scene

SEAMS = {(2, 1): 44, (2, 2): 31}
"""dB at least, by the number of tiles, of sprites (64 x 64) against the same decoded whole, in time the same way."""
GIB = 2**30


def decoded(loaded: LoadedPipeline, latent: torch.Tensor) -> torch.Tensor:
    vae = loaded.pipe.vae
    told = {"temb": torch.tensor([0.05])} if vae.config.get("timestep_conditioning") else {}
    with torch.no_grad():
        return vae.decode(latent, **told).sample


def psnr(frames: torch.Tensor, reference: torch.Tensor) -> float:
    """Of frames in [-1, 1]."""
    return 10 * math.log10(4 / float((frames - reference).square().mean()))


@pytest.mark.parametrize("family", TEXT_TO_VIDEO)
def test_what_is_needed_is_what_it_takes(family, saved):
    loaded = load_pipeline(saved(family))
    vae, pixels = loaded.pipe.vae, compression_of(loaded.pipe, loaded.family)[1]
    channels = vae.config.get("latent_channels") or vae.config.z_dim
    latent = torch.randn(1, channels, 3, 8, 12, generator=torch.Generator().manual_seed(0))
    with LiveBytes() as whole:
        reference = decoded(loaded, latent)
    assert needed(vae, tuple(latent.shape), Way(None)).bytes == pytest.approx(whole.peak, rel=0.1)
    assert decode._computed(vae, tuple(latent.shape), Way(None)) == (9 if family == "hunyuan_video" else 3) * 8 * 12

    tiles, calls = Tiles.of((8, 12), (1, 2), 2, pixels), []
    tiles.set(vae, pixels)
    hook = vae.decoder.register_forward_pre_hook(lambda module, inputs: calls.append(inputs[0].shape[-2:]))
    with LiveBytes() as tiled:
        frames = decoded(loaded, latent)
    hook.remove()
    assert set(calls) == {(8, tiles.width), (8, 12 - tiles.width + tiles.width // tiles.unit)}
    assert tiled.peak <= needed(vae, tuple(latent.shape), Way(tiles)).bytes <= 1.5 * tiled.peak
    assert frames.shape == reference.shape
    assert not torch.equal(frames, reference)


def test_seams_of_sprites_are_small():
    loaded = load_pipeline("sprites/teacher")
    vae = loaded.pipe.vae
    video = render([random_scene(random.Random(0), "held_out")])
    with torch.no_grad():
        latent = vae.encode(video).latent_dist.mode()
    whole = decoded(loaded, latent)
    for pieces, least in SEAMS.items():
        Tiles.of((8, 8), pieces, 8, 8).set(vae, 8)
        assert least < psnr(decoded(loaded, latent).clamp(-1, 1), whole.clamp(-1, 1)) < 60


def test_devices_that_make_a_video_have_a_tile_each():
    vae = load_pipeline("sprites/teacher").pipe.vae
    vae.tile_sample_min_height = vae.tile_sample_min_width = 32
    every = list(tilings(vae, (8, 16), 8))
    assert _shareable(every, (8, 16), 1) == every
    counts = [math.prod(tiles.counts((8, 16))) for tiles in every]
    assert counts[:2] == [2, 4]
    assert _shareable(every, (8, 16), 3) == every[1:]
    assert _shareable(every, (8, 16), 64) == every[-1:]


@pytest.mark.parametrize("own", [8, 16, 24])
def test_tiles_end_at_four_latent_pixels_where_diffusers_own_are_smaller(own):
    vae = SimpleNamespace(tile_sample_min_height=own, tile_sample_min_width=64)
    for extent in ((1, 1), (4, 4), (8, 12), (40, 24)):
        *_, last = itertools.islice(tilings(vae, extent, 8), 1000)
        assert min(last.height, extent[0]) <= 4 and min(last.width, extent[1]) <= 8


def test_tiles_cover_the_latent_in_so_many_pieces():
    for extent in ((88, 88), (60, 104), (17, 9), (8, 8), (4, 4)):
        for pieces in ((1, 2), (2, 2), (3, 4)):
            tiles = Tiles.of(extent, pieces, 8, 8)
            for whole, count, side in zip(extent, pieces, (tiles.height, tiles.width), strict=True):
                stride = side - side // tiles.unit
                assert count * stride >= whole
                assert (side * 8 * (1 - 1 / tiles.unit)) == pytest.approx(stride * 8)


@pytest.fixture
def loaded(saved, monkeypatch):
    """A pipeline that is taken to be on CUDA, with as much free memory there as `loaded.free` says."""
    made = load_pipeline(saved("wan"))
    made.free = 64 * GIB
    monkeypatch.setattr(decode, "execution_device", lambda pipe: torch.device("cuda"))
    monkeypatch.setattr(decode, "free_bytes", lambda device: made.free)
    return made


VIDEO = {"num_frames": 9, "height": 512, "width": 320}


def chosen(loaded: LoadedPipeline) -> tuple[int, int] | None:
    """Pixels of the tiles that are in force within; None is whole."""
    vae = loaded.pipe.vae
    before = dict(vars(vae))
    with decoding(loaded, 1, **VIDEO):
        tiles = (vae.tile_sample_min_height, vae.tile_sample_min_width) if vae.use_tiling else None
    assert all(vars(vae)[name] is value for name, value in before.items())
    return tiles


def test_auto_is_whole_where_that_fits_and_else_the_largest_tiles_that_do(loaded, caplog):
    decode._said.clear()
    with caplog.at_level(logging.INFO, logger="vidaccel"):
        assert chosen(loaded) is None
        assert chosen(loaded) is None
        assert len(caplog.messages) == 1 and caplog.messages[0].startswith("decoding whole, which needs ")
        latent = (1, loaded.pipe.vae.config.z_dim, 3, *(VIDEO[side] // 8 for side in ("height", "width")))
        first = next(tilings(loaded.pipe.vae, latent[-2:], 8))
        weights = weight_bytes([loaded.pipe.vae])  # which are not there yet
        loaded.free = math.ceil(decode.ROOM * (needed(loaded.pipe.vae, latent, Way(first)).bytes + weights))
        tiles = chosen(loaded)
        assert tiles == (8 * first.height, 8 * first.width)
        assert f"in 2 x 1 tiles of {tiles[0]} x {VIDEO['width']}" in caplog.messages[-1]
        loaded.free = int(0.9 * loaded.free)
        smaller = chosen(loaded)
        assert smaller is not None and smaller[0] <= tiles[0] and smaller[1] < tiles[1]
    loaded.pipe.vae.enable_tiling()
    loaded.free = 0
    assert chosen(loaded) == (256, 256)  # somebody's own


def test_whole_and_tiled_are_what_they_say_or_refused(loaded):
    for how, free in (("whole", 64 * GIB), ("tiled", 64 * GIB)):
        loaded.decode, loaded.free = how, free
        assert (chosen(loaded) is None) == (how == "whole")
    loaded.free = 1
    for how, hint in (("whole", "decode=tiled"), ("tiled", "fewer frames"), ("auto", "fewer frames")):
        loaded.decode = how
        with pytest.raises(UserError, match=r"decoding .* needs .* GiB, and .* GiB of cuda memory are free") as refused:
            chosen(loaded)
        assert hint in refused.value.hint


def test_once_makes_no_chunks_in_time_and_says_what_that_needs(saved, caplog):
    loaded = load_pipeline(saved("hunyuan_video"))
    vae: Any = loaded.pipe.vae
    latent = torch.randn(1, vae.config.latent_channels, 7, 4, 4, generator=torch.Generator().manual_seed(0))
    frames, peaks = {}, {}
    with caplog.at_level(logging.INFO, logger="vidaccel"):
        for loaded.decode in ("whole", "once"):
            with decoding(loaded, 1, num_frames=25, height=32, width=32), LiveBytes() as live:
                frames[loaded.decode] = decoded(loaded, latent)
            peaks[loaded.decode] = live.peak
    assert not vae.tile_sample_min_num_frames > 16
    with torch.no_grad():
        assert torch.equal(frames["once"], decode_whole(vae, latent))
    assert frames["whole"].shape == frames["once"].shape and not torch.equal(frames["whole"], frames["once"])
    assert needed(vae, tuple(latent.shape), Way(None, 28)).bytes == pytest.approx(peaks["once"], rel=0.1)
    assert any(said.startswith("decoding at once, which needs ") for said in caplog.messages)


def test_auto_takes_tiles_where_a_tensor_would_be_too_large(loaded, monkeypatch):
    latent = (1, loaded.pipe.vae.config.z_dim, 3, *(VIDEO[side] // 8 for side in ("height", "width")))
    whole = needed(loaded.pipe.vae, latent, Way(None))
    monkeypatch.setattr(decode, "LARGEST", whole.largest - 1)
    tiles = chosen(loaded)
    assert tiles is not None and tiles[0] < VIDEO["height"]
    monkeypatch.setattr(decode, "LARGEST", whole.largest)
    assert chosen(loaded) is None
    monkeypatch.setattr(decode, "LARGEST", 1)
    loaded.decode = "whole"  # somebody's wish
    assert chosen(loaded) is None


def test_once_takes_the_longest_chunks_and_fewest_tiles_that_fit(saved, monkeypatch):
    loaded = load_pipeline(saved("hunyuan_video"))
    vae: Any = loaded.pipe.vae
    monkeypatch.setattr(decode, "execution_device", lambda pipe: torch.device("cuda"))
    monkeypatch.setattr(decode, "free_bytes", lambda device: 64 * GIB)
    latent = (1, vae.config.latent_channels, 13, 4, 4)
    loaded.decode = "once"
    for chunk in (40, 28, 16):  # of which one more would be above the limit
        monkeypatch.setattr(decode, "LARGEST", needed(vae, latent, Way(None, chunk)).largest)
        with decoding(loaded, 1, num_frames=49, height=32, width=32):
            assert (vae.tile_sample_min_num_frames, vae.tile_sample_stride_num_frames) == (chunk, chunk - 4)
            assert not vae.use_tiling
            calls: list[torch.Tensor] = []
            hook = vae.decoder.register_forward_pre_hook(lambda module, inputs, calls=calls: calls.append(inputs[0]))
            frames = decoded(loaded, torch.zeros(latent))
            hook.remove()
        lengths = [call.shape[2] for call in calls]
        assert frames.shape[2] == 49
        assert lengths[0] == chunk // 4 + 1 and sum(4 * each - 3 for each in lengths) * 16 == decode._computed(
            vae, latent, Way(None, chunk)
        )
    assert (vae.tile_sample_min_num_frames, vae.tile_sample_stride_num_frames) == (16, 12)


def test_memory_that_runs_out_is_one_line(loaded):
    with (
        pytest.raises(UserError, match="cuda is out of memory: Tried to allocate 2 GiB") as refused,
        decoding(loaded, 1, **VIDEO),
    ):
        raise torch.OutOfMemoryError("Tried to allocate\n 2 GiB")
    assert "\n" not in refused.value.message and "decode=tiled" in refused.value.hint


def test_on_a_cpu_auto_leaves_the_frames_as_they_are_and_tiles_blend(saved):
    loaded = load_pipeline(saved("wan"))
    frames = {}
    for how in ("auto", "whole", "once", "tiled"):
        assert prepare(loaded, RuntimeConfig(decode=how))["decode"] == how
        made = generate(loaded, ["a red circle"], GenerateConfig(steps=1, num_frames=5, height=64, width=96), [0])
        frames[how] = made.frames
    assert (frames["auto"] == frames["whole"]).all() and (frames["auto"] == frames["once"]).all()
    assert frames["tiled"].shape == frames["auto"].shape and (frames["tiled"] != frames["auto"]).any()
