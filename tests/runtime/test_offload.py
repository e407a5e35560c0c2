"""Offload with the CPU in the place of the accelerator: the same frames, and what moves is counted."""

import pytest
import torch
from diffusers.hooks.group_offloading import ModuleGroup
from typer.testing import CliRunner

import vidaccel
from tests.tiny import HUNYUAN_CALL, called, calls_of_a_step, guided, tiny_pipeline
from vidaccel.cli.main import app
from vidaccel.errors import UserError
from vidaccel.families.registry import FAMILIES
from vidaccel.families.walk import blocks_of
from vidaccel.runtime.offload import check_offload, offload, offload_trunk

CPU, STEPS = torch.device("cpu"), 4


def latents(pipe, prompt="a red circle"):
    draw = torch.Generator().manual_seed(0)
    more = called(pipe) | guided(pipe, 3.0, prompt)
    return pipe(prompt=prompt, num_inference_steps=STEPS, generator=draw, output_type="latent", **more).frames


@pytest.fixture
def moved(monkeypatch):
    """Bytes of each group that was brought to the device."""
    bytes, onload = [], ModuleGroup.onload_

    def counted(group):
        bytes.append(sum(p.nbytes for module in group.modules for p in module.parameters()))
        onload(group)

    monkeypatch.setattr(ModuleGroup, "onload_", counted)
    return bytes


@pytest.mark.parametrize("name", ["hunyuan_video", "ltx_video", "wan"])
def test_a_predicted_step_moves_no_weights_and_a_full_one_those_of_the_trunk(name, moved):
    pipe, family = tiny_pipeline(name), FAMILIES[name]
    settings = {"predictor": "taylor", "steps": STEPS, "full_steps": [0, 1]}
    with vidaccel.attach(pipe, **settings):
        expected = latents(pipe)
    offload_trunk(pipe.transformer, family, CPU)
    a_pass = [sum(p.nbytes for p in block.parameters()) for _, block in blocks_of(pipe.transformer, family)]
    by_step = []
    step = pipe.scheduler.step

    def count(*args, **kwargs):
        by_step.append(list(moved))
        moved.clear()
        return step(*args, **kwargs)

    pipe.scheduler.step = count
    with vidaccel.attach(pipe, **settings):
        assert torch.equal(latents(pipe), expected)
    full = a_pass * calls_of_a_step(pipe)
    assert by_step == [full, full, [], []]


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
    assert sum(moved) == sum(p.nbytes for part in (pipe.text_encoder, pipe.text_encoder_2) for p in part.parameters())
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
