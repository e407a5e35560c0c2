"""One video in two processes over gloo: the frames of one process, for every family that can be split."""

import inspect
import json
from contextlib import nullcontext, redirect_stdout
from io import StringIO
from pathlib import Path
from unittest.mock import patch

import diffusers
import numpy as np
import pytest
import torch
from diffusers.models import attention_dispatch
from torch.distributed import _functional_collectives as collectives
from torch.distributed.device_mesh import DeviceMesh

import vidaccel
from studies.communication import exchanged
from tests.students import save_teacher
from tests.tiny import BUILDERS, called, guided, tiny_pipeline
from tests.train.torchrun import in_two
from vidaccel.cache.trunk import Mode, Trunk
from vidaccel.cli.generate import generate
from vidaccel.compat.torch import CPU_ATTENTION
from vidaccel.config.parallel import ParallelConfig
from vidaccel.errors import UserError
from vidaccel.families.registry import FAMILIES, family_of
from vidaccel.families.walk import blocks_of, denoisers_of, width
from vidaccel.forecasters.learned import new_predictor
from vidaccel.models.calling import compression_of
from vidaccel.models.loading import load_pipeline
from vidaccel.processes import rank
from vidaccel.runtime import context_parallel, decode
from vidaccel.runtime.context_parallel import check_split, check_tokens, joint_mask, neighbours, split
from vidaccel.runtime.decode import Tiles, Way, decoding, needed, tilings
from vidaccel.runtime.shared_tiles import sharing_tiles

PROMPT, STEPS = "a red circle", 3
FAMILIES_SPLIT = sorted(name for name in BUILDERS if FAMILIES[name].split)
TWO, CPU, CUDA = ParallelConfig(ulysses=2), torch.device("cpu"), torch.device("cuda")


MORE = {"ltx2": {"frame_rate": 30.0}}
"""Of a call: four tokens of sound, and not five, which two do not divide."""


def frames(pipe, steps=STEPS):
    more = called(pipe) | guided(pipe, 3.0, PROMPT) | MORE.get(family_of(pipe).name, {})
    draw = torch.Generator().manual_seed(0)
    return pipe(prompt=PROMPT, num_inference_steps=steps, generator=draw, output_type="np", **more).frames


def attached(pipe, predictor, steps=STEPS):
    return vidaccel.attach(pipe, predictor=predictor, steps=steps, full_steps=[0, 1])


def network(pipe, family):
    """A learned predictor whose weights are large enough to matter."""
    kept = []
    with Trunk(pipe.transformer, family) as trunk:
        trunk.choose = Mode
        pipe.transformer.register_forward_hook(lambda *_: kept.extend(map(trunk.memory, trunk.remembered.contexts)))
        frames(pipe, steps=1)
    tokens = kept[0][0].tokens
    predictor = new_predictor(pipe.transformer, family, tokens, tokens, blocks=1)
    for parameter in predictor.parameters():
        torch.nn.init.normal_(parameter, std=0.2, generator=torch.Generator().manual_seed(parameter.numel()))
    return predictor.eval()


def both_ways(folder: Path) -> None:
    """In each of the two processes: alone, then split; attached before and after."""
    for name in FAMILIES_SPLIT:
        pipe, family = tiny_pipeline(name), FAMILIES[name]
        steps = STEPS if len(family.denoisers) == 1 else 5  # the first of each is full
        predictors = {"taylor": "taylor"}
        if len(family.denoisers) == 1:  # which is what a network is for
            predictors["network"] = network(pipe, family)
        alone = {}
        for which, predictor in predictors.items():
            with attached(pipe, predictor, steps):
                alone[which] = frames(pipe, steps)
        last = list(predictors)[-1]
        assert last == "taylor" or np.abs(alone["network"] - alone["taylor"]).max() > 1e-3
        with attached(pipe, predictors[last], steps) as attachment:
            for transformer in denoisers_of(pipe, family):
                split(transformer, family, TWO)
            made = {f"{last}, split while attached": frames(pipe, steps)}
            assert attachment.full_passes and attachment.predicted_passes
        for which, predictor in predictors.items():
            with attached(pipe, predictor, steps):
                made[which] = frames(pipe, steps)
        if name == "wan":
            what_is_sent(pipe, predictors["network"])
        for which, got in made.items():
            assert np.abs(got - alone[which.partition(",")[0]]).max() < 1e-5, (name, which)
    tiles_are_shared()
    in_a_ring()
    from_the_command_line(folder)


def what_is_sent(pipe, predictor) -> None:
    """Full passes send what their blocks do, predicted ones what the predictor's do, and each gathers the video once:
    the cache sends nothing."""
    sent, gathered = [], []
    exchange, gather = collectives.all_to_all_single, collectives.all_gather_tensor

    def exchanging(x, *args):
        sent.append(x.nbytes // 2)  # the half that is for the other
        return exchange(x, *args)

    def gathering(x, *args, **kwargs):
        gathered.append(x)
        return gather(x, *args, **kwargs)

    with (
        patch.object(collectives, "all_to_all_single", exchanging),
        patch.object(collectives, "all_gather_tensor", gathering),
        attached(pipe, predictor) as attachment,
    ):
        frames(pipe)
    full, predicted = (exchanged(8, width(pipe.transformer), blocks, devices=2, size=4) for blocks in (2, 1))
    assert sum(sent) == attachment.full_passes * full + attachment.predicted_passes * predicted
    assert len(gathered) == attachment.full_passes + attachment.predicted_passes


def tiles_are_shared() -> None:
    """Three tiles: the first process makes two of them, the second one, and both get the frames of one process."""
    devices = neighbours(TWO, CPU)
    for name in ("hunyuan_video", "hunyuan_video_15", "ltx2", "ltx_video", "wan"):
        pipe = tiny_pipeline(name)
        vae, pixels = pipe.vae, compression_of(pipe, FAMILIES[name])[1]
        Tiles.of((6, 12), (1, 3), 2, pixels).set(vae, pixels)
        channels = vae.config.get("latent_channels") or vae.config.z_dim
        latent = torch.randn(1, channels, 3, 6, 12, generator=torch.Generator().manual_seed(0))
        told = {"temb": torch.tensor([0.05])} if vae.config.get("timestep_conditioning") else {}
        with patch.object(vae.decoder, "forward", wraps=vae.decoder.forward) as calls:
            with torch.no_grad():
                alone = vae.decode(latent, **told).sample
            of_three = calls.call_count
            calls.reset_mock()
            with torch.no_grad(), sharing_tiles(vae, devices):
                shared = vae.decode(latent, **told).sample
        assert torch.equal(shared, alone), name
        assert 3 * calls.call_count == of_three * (2 - rank())
        assert not {"tiled_decode", "forward"} & {*vars(vae), *vars(vae.decoder)}
    full = patch.object(vae.decoder, "forward", side_effect=torch.OutOfMemoryError("full"))
    with (
        full if rank() == 1 else nullcontext(),
        pytest.raises(torch.OutOfMemoryError, match="full"),  # of the process that has room too, which does not wait
        sharing_tiles(vae, devices),
    ):
        vae.decode(latent)
    tiles_are_those_of_the_least_memory(devices)


def tiles_are_those_of_the_least_memory(devices: DeviceMesh) -> None:
    loaded = load_pipeline("sprites/teacher")
    loaded.decode, loaded.devices, vae = "tiled", devices, loaded.pipe.vae
    vae.tile_sample_min_height = vae.tile_sample_min_width = 32
    largest, *_, smallest = ways = list(tilings(vae, (8, 16), 8))
    takes = {tiles: needed(vae, (1, 16, 5, 8, 16), Way(tiles)).bytes for tiles in ways}
    free = int(1.5 * takes[largest if rank() == 0 else smallest])
    assert takes[largest] > 3 * takes[smallest]
    with (
        patch.object(decode, "free_bytes", lambda device: free),
        decoding(loaded, 1, num_frames=17, height=64, width=128),
    ):
        assert (vae.tile_sample_min_height, vae.tile_sample_min_width) == (8 * smallest.height, 8 * smallest.width)


def with_log_sum_exp(ctx, query, key, value, *args, **kwargs):
    """In the place of diffusers' native attention, which refuses to give what a ring adds parts up by."""
    heads_first = (x.transpose(1, 2) for x in (query, key, value))
    out, lse = CPU_ATTENTION(*heads_first)
    return out.transpose(1, 2), lse.transpose(1, 2)


def in_a_ring() -> None:
    """Rings are for CUDA; their arithmetic, and what is cached in one, are not."""
    for name in ("wan", "ltx_video", "ltx2"):
        pipe, family = tiny_pipeline(name), FAMILIES[name]
        with attached(pipe, "taylor"):
            alone = frames(pipe)
        with (
            patch.object(attention_dispatch, "_native_attention_forward_op", with_log_sum_exp),
            patch.object(context_parallel, "check_split"),
            attached(pipe, "taylor"),
        ):
            split(pipe.transformer, family, ParallelConfig(ring=2))
            made = frames(pipe)
        assert np.abs(made - alone).max() < 1e-5, name


def from_the_command_line(folder: Path) -> None:
    said, output = StringIO(), folder / f"{rank()}.mp4"
    with redirect_stdout(said):
        words = [f"model={folder / 'model'}", "steps=1", "parallel.ulysses=2", "decode=tiled"]
        generate([PROMPT, *words], output=output, as_json=True)
    assert output.exists() == (rank() == 0)
    if rank() == 0:
        assert json.loads(said.getvalue())["runtime"]["parallel"] == {"ulysses": 2, "ring": 1}
    split = {"model": str(folder / "model"), "parallel": {"ulysses": 2}}
    with pytest.raises(UserError, match="the 27 tokens of the video do not divide among 2"):
        vidaccel.generate(PROMPT, height=48, width=48, num_frames=9, **split)
    with pytest.raises(UserError, match="compile=true came with a video on several devices"):
        vidaccel.generate(PROMPT, compile=True, **split)


def test_two_processes_make_the_video_of_one(tmp_path):
    save_teacher(tmp_path / "model", "wan")
    in_two(both_ways, tmp_path)


@pytest.mark.parametrize(
    ("family", "parallel", "device", "attention", "said"),
    [
        ("wan", TWO, CPU, "native", "takes as many processes, or a multiple, and there is 1"),
        ("cogvideox", TWO, CPU, "native", "a video of CogVideoX cannot be split"),
        ("hunyuan_video", TWO, CUDA, "flash", "attention=flash takes no mask"),
        ("wan", ParallelConfig(ring=2), CPU, "native", "parallel.ring needs CUDA devices"),
        ("hunyuan_video", ParallelConfig(ring=2), CUDA, "native", "ring attention takes no mask"),
        ("wan", ParallelConfig(ring=2), CUDA, "native", "gives no log-sum-exp"),
    ],
)
def test_what_cannot_be_split_is_refused(monkeypatch, family, parallel, device, attention, said):
    if "takes as many" not in said:
        monkeypatch.setattr(context_parallel, "world", lambda: 2)
    with pytest.raises(UserError, match=said):
        check_split(FAMILIES[family], parallel, device, attention)


def test_tokens_and_heads_have_to_divide(monkeypatch):
    transformer = tiny_pipeline("wan").transformer  # patches of 1 x 2 x 2, two heads
    check_tokens(transformer, TWO, (2, 4, 4))
    with pytest.raises(UserError, match="the 9 tokens of the video do not divide among 2 devices") as error:
        check_tokens(transformer, TWO, (1, 6, 6))
    assert error.value.hint.startswith("they do among 1, 3, 9;")
    monkeypatch.setattr(context_parallel, "world", lambda: 4)
    with pytest.raises(UserError, match="the 2 heads of this Wan 2.1 do not divide among 4"):
        split(transformer, FAMILIES["wan"], ParallelConfig(ulysses=4))


def test_joint_mask_is_in_the_order_in_which_attention_sees_the_tokens():
    text = torch.zeros(1, 3, 8)
    masked = torch.tensor([[True, True, False]])
    expected = [True, True, True, True, True, True, False, False]  # two of video and two of text, twice
    assert joint_mask(masked, 2, text, count=2).tolist() == [[[expected]]]
    whole = torch.cat([torch.ones(1, 2, dtype=torch.bool), masked], dim=1)[:, None, None]
    assert joint_mask(whole, 2, text, count=2).tolist() == [[[expected]]]
    assert joint_mask(None, 2, text, count=2).flatten().tolist() == [*[True] * 7, False]
    assert joint_mask(None, 2, text, count=3) is None


@pytest.mark.parametrize("name", FAMILIES_SPLIT)
def test_a_record_names_what_a_split_needs(name):
    how, pipe = FAMILIES[name].split, tiny_pipeline(name)
    assert all(hasattr(pipe.transformer.get_submodule(path), "forward") for path in (*how.outputs, *how.gathered))
    assert how.outputs or type(pipe.transformer)._cp_plan
    for _, block in blocks_of(pipe.transformer, FAMILIES[name]):
        assert all(hasattr(block.get_submodule(attention), "processor") for attention in how.local)


def test_what_diffusers_cannot_split_still_cannot():
    """Once it can, the record may name how."""
    module = inspect.getmodule(diffusers.CogVideoXTransformer3DModel)
    assert "parallel_config" not in inspect.getsource(module)
