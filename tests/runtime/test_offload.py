"""Offload with the CPU in the place of the accelerator: the same frames, and what moves is counted."""

import pytest
import torch
from diffusers.hooks.group_offloading import ModuleGroup
from torch.utils._pytree import tree_leaves
from typer.testing import CliRunner

import vidaccel
from tests.tiny import HUNYUAN_CALL, called, calls_of_a_step, guided, tiny_pipeline
from vidaccel.cli.main import app
from vidaccel.compat.torch import TorchDispatchMode, is_traceable_wrapper_subclass
from vidaccel.errors import UserError
from vidaccel.families.registry import FAMILIES
from vidaccel.families.walk import blocks_of
from vidaccel.models.live_bytes import weight_bytes
from vidaccel.runtime.offload import check_offload, offload, offload_trunk
from vidaccel.runtime.quantized import quantize_blocks

CPU, STEPS = torch.device("cpu"), 4
SETTINGS = {"predictor": "taylor", "steps": STEPS, "full_steps": [0, 1]}


def latents(pipe, prompt="a red circle"):
    draw = torch.Generator().manual_seed(0)
    more = called(pipe) | guided(pipe, 3.0, prompt)
    return pipe(prompt=prompt, num_inference_steps=STEPS, generator=draw, output_type="latent", **more).frames


def weights(group):
    """Parameters and buffers of a group."""
    own = [each for part in group.modules for each in (*part.parameters(), *part.buffers())]
    return [*own, *group.parameters, *group.buffers]


def held(group):
    """Bytes of a group: quantised weights are made of several."""
    return sum(part.nbytes for weight in weights(group) for part in parts(weight))


def parts(weight):
    if not is_traceable_wrapper_subclass(weight):
        return [weight]
    return [getattr(weight, name) for name in weight.__tensor_flatten__()[0]]


@pytest.fixture
def moved(monkeypatch):
    """Bytes of each group that was brought to the device."""
    bytes, onload = [], ModuleGroup.onload_

    def counted(group):
        bytes.append(held(group))
        onload(group)

    monkeypatch.setattr(ModuleGroup, "onload_", counted)
    return bytes


def a_step(pipe, moved):
    """Bytes of the groups that moved in each step, of steps that the pipeline makes from now on."""
    by_step, step = [], pipe.scheduler.step

    def count(*args, **kwargs):
        by_step.append(list(moved))
        moved.clear()
        return step(*args, **kwargs)

    pipe.scheduler.step = count
    return by_step


@pytest.mark.parametrize("name", ["hunyuan_video", "ltx_video", "wan"])
def test_a_predicted_step_moves_no_weights_and_a_full_one_those_of_the_trunk(name, moved):
    pipe, family = tiny_pipeline(name), FAMILIES[name]
    with vidaccel.attach(pipe, **SETTINGS):
        expected = latents(pipe)
    offload_trunk(pipe.transformer, family, CPU)
    a_pass = [sum(p.nbytes for p in block.parameters()) for _, block in blocks_of(pipe.transformer, family)]
    by_step = a_step(pipe, moved)
    with vidaccel.attach(pipe, **SETTINGS):
        assert torch.equal(latents(pipe), expected)
    full = a_pass * calls_of_a_step(pipe)
    assert by_step == [full, full, [], []]


@pytest.mark.parametrize("kind", ["fp8", "int8"])
def test_quantised_weights_move_as_they_are(kind, moved):
    if kind == "int8":
        pytest.importorskip("torchao", reason="the extra `quant` is not installed")
    pipe, family = tiny_pipeline("cogvideox"), FAMILIES["cogvideox"]
    blocks = [block for _, block in blocks_of(pipe.transformer, family)]
    plain = weight_bytes(blocks)
    quantize_blocks(pipe.transformer, family, kind)
    with vidaccel.attach(pipe, **SETTINGS):
        expected = latents(pipe)
    offload_trunk(pipe.transformer, family, CPU)
    by_step = a_step(pipe, moved)
    with vidaccel.attach(pipe, **SETTINGS):
        assert torch.equal(latents(pipe), expected)
    full = [weight_bytes([block]) for block in blocks] * calls_of_a_step(pipe)
    assert by_step == [full, full, [], []] and weight_bytes(blocks) < 0.6 * plain


class Placed(TorchDispatchMode):
    """Refuses operations on weights that wait elsewhere, which an accelerator would."""

    def __init__(self, waiting: set[int]):
        super().__init__()
        self.waiting = waiting

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert self.waiting.isdisjoint(map(id, tree_leaves((args, kwargs)))), f"{func} of a weight that waits elsewhere"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ["ltx2", "hunyuan_video_15_i2v"])
def test_weights_are_there_whenever_they_are_used(name, monkeypatch, moved):
    """Also of what is not called but asked to decode (LTX-2's audio), of an attention that does not call its layers (of
    images), and of text encoders whose blocks lie deep, of which a layer is there at a time."""
    waiting: set[int] = set()

    def onload(group, load=ModuleGroup.onload_):
        waiting.difference_update(map(id, weights(group)))
        load(group)

    def put_away(group, put=ModuleGroup.offload_):
        put(group)
        waiting.update(map(id, weights(group)))

    monkeypatch.setattr(ModuleGroup, "onload_", onload)
    monkeypatch.setattr(ModuleGroup, "offload_", put_away)
    pipe = tiny_pipeline(name)
    offload(pipe, FAMILIES[name], "group", CPU)
    assert waiting
    with Placed(waiting):
        draw = torch.Generator().manual_seed(0)
        pipe(prompt="a red circle", num_inference_steps=2, generator=draw, **called(pipe))
    moved.clear()
    pipe.text_encoder(torch.ones(1, 4, dtype=torch.long))
    assert max(moved) < sum(moved) / 4


@pytest.mark.parametrize("how", ["group", "model"])
def test_the_video_is_the_same(how):
    pipe = tiny_pipeline("hunyuan_video")
    expected = latents(pipe)
    offload(pipe, FAMILIES["hunyuan_video"], how, CPU)
    assert torch.equal(latents(pipe), expected)


def test_layer_by_layer_is_left_to_the_pipeline(monkeypatch):
    """accelerate gets by with no CPU in the accelerator's place where weights may be tied, as in text encoders."""
    pipe, told = tiny_pipeline("hunyuan_video"), {}
    monkeypatch.setattr(type(pipe), "enable_sequential_cpu_offload", lambda self, **given: told.update(given))
    offload(pipe, FAMILIES["hunyuan_video"], "sequential", CPU)
    assert told == {"device": CPU}


def test_a_group_offloads_text_encoders_too_and_not_the_autoencoder(moved):
    pipe, family = tiny_pipeline("hunyuan_video"), FAMILIES["hunyuan_video"]
    offload(pipe, family, "group", CPU)
    pipe.encode_prompt("a red circle", **HUNYUAN_CALL)
    assert sum(moved) == weight_bytes([pipe.text_encoder, pipe.text_encoder_2])
    moved.clear()
    pipe.vae.decode(torch.zeros(1, 4, 1, 2, 2))
    assert not moved


def test_what_makes_no_sense_is_refused():
    check_offload("none", CPU, True)
    with pytest.raises(UserError, match="offload=model came with compile=true"):
        check_offload("model", torch.device("cuda"), True)
    result = CliRunner().invoke(
        app, ["generate", "a red circle", "model=./nowhere", "offload=group", "--device", "cpu"]
    )
    assert result.exit_code == 2
    assert "the model runs on the CPU" in result.stderr
    result = CliRunner().invoke(app, ["generate", "a red circle", "offload=disk"])
    assert result.exit_code == 2
    assert "offload is one of none, group, model, sequential" in result.stderr
