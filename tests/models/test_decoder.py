"""A distilled decoder in the place of an autoencoder's own: what it changes, and what it is refused for."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from tests.students import STARTED, save_teacher, student, vouch
from tests.tiny import tiny_pipeline
from vidaccel.artefacts import RUN_FILE, write_run
from vidaccel.collect.encode import decodable, encode_videos
from vidaccel.errors import UserError
from vidaccel.families.registry import FAMILIES
from vidaccel.models.decoder import (
    FORMAT,
    WEIGHTS_FILE,
    autoencoder_hash,
    decode_whole,
    decoding_state,
    read_decoder,
    write_decoder,
)
from vidaccel.models.files import read_model
from vidaccel.models.loading import load_pipeline
from vidaccel.models.weight_hashes import encoder_hashes, student_hash
from vidaccel.runtime.decode import Way, needed
from vidaccel.train.methods.decoder import DecoderTraining
from vidaccel.train.methods.decoder.method import student_of

Z = torch.randn(1, 4, 2, 4, 4, generator=torch.Generator().manual_seed(0))


def save_decoder(folder: Path, model: Path, width: float = 0.5) -> Path:
    """A slice of the model's decoder, as `vidaccel distill method=decoder` leaves one."""
    files = read_model(model)
    family = files.contents.family
    vae = load_pipeline(files).pipe.vae
    write_decoder(folder, student_of(vae, family, DecoderTraining(width=width)), torch.float16)
    of = {"family": family.name, "autoencoder": autoencoder_hash(files.hashes)}
    write_run(folder, format=FORMAT, command="test", config={}, seed=0, started=STARTED, **of)
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return save_teacher(tmp_path_factory.mktemp("model") / "teacher", "hunyuan_video")


@pytest.fixture(scope="module")
def made(model) -> Path:
    return save_decoder(model.parent / "narrow", model)


@pytest.fixture
def copied(made, tmp_path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "copied"))


def refusal(decoder: Path, model: Path) -> str:
    with pytest.raises(UserError) as error:
        load_pipeline(model, decoder=decoder)
    assert "\n" not in error.value.message and error.value.hint
    return error.value.message


def test_it_decodes_and_the_encoder_stays(model, made):
    own, narrow = load_pipeline(model).pipe.vae, load_pipeline(model, decoder=made).pipe.vae
    assert type(narrow) is type(own) and not narrow.training
    assert list(narrow.config.block_out_channels) == [4] * 4
    stored = load_file(made / WEIGHTS_FILE)
    assert stored.keys() == decoding_state(narrow).keys()
    assert all(torch.equal(tensor.float(), decoding_state(narrow)[name]) for name, tensor in stored.items())
    clip = torch.rand(1, 3, 5, 32, 32)
    assert torch.equal(*(encode_videos(vae, clip) for vae in (own, narrow)))
    with torch.no_grad():
        frames = narrow.decode(Z).sample
        assert frames.shape == own.decode(Z).sample.shape
        alone = student_of(own, FAMILIES["hunyuan_video"], DecoderTraining(width=0.5)).eval()
        torch.testing.assert_close(frames, decode_whole(alone, Z), atol=0.02, rtol=0)  # which was stored in halves


def test_all_that_asks_the_autoencoder_sees_what_decodes(model, made):
    own, narrow = load_pipeline(model).pipe.vae, load_pipeline(model, decoder=made).pipe.vae
    of_narrow, of_own = (needed(vae, tuple(Z.shape), Way(None)) for vae in (narrow, own))
    assert of_narrow.bytes < of_own.bytes and of_narrow.largest < of_own.largest
    assert narrow.config.scaling_factor == own.config.scaling_factor


def test_a_slice_of_full_width_changes_no_frame(model, tmp_path):
    whole = save_decoder(tmp_path / "whole", model, width=1.0)
    own = nn.Module.float(load_pipeline(model, dtype="float16").pipe.vae)
    with torch.no_grad():
        assert torch.equal(load_pipeline(model, decoder=whole).pipe.vae.decode(Z).sample, own.decode(Z).sample)


def test_it_is_no_part_of_what_the_model_is_known_by(model, made):
    plain, decoded = load_pipeline(model), load_pipeline(model, decoder=made)
    assert plain.decoder is None and decoded.decoder is not None and decoded.decoder.source == str(made)
    assert dict(plain.hashes) == dict(decoded.hashes)
    assert student_hash(plain) == student_hash(decoded) and encoder_hashes(plain) == encoder_hashes(decoded)
    assert set(decoded.decoder.hashes) == {"decoder/config.json", f"decoder/{WEIGHTS_FILE}"}


def test_one_that_lies_in_a_model_folder_is_named_by_either(tmp_path):
    own = student(tmp_path, "hunyuan_video")
    inside = save_decoder(own / "decoder", own)
    assert read_decoder(own).folder == read_decoder(inside).folder == inside
    assert load_pipeline(own).decoder is None  # unless it is asked for
    assert load_pipeline(own, decoder=own).decoder is not None


def test_a_decoder_of_another_family_is_refused(made, tmp_path):
    other = save_teacher(tmp_path / "wan", "wan")
    assert "is of an AutoencoderKLHunyuanVideo, and" in refusal(made, other)


def test_another_latent_width_or_scale_is_refused(made, tmp_path):
    pipe = tiny_pipeline("hunyuan_video")
    config = dict(pipe.vae.config)
    for name, value, said in (
        ("latent_channels", 8, "latents of 4 channels, and those of"),
        ("scaling_factor", 0.25, "and {model} has scaling_factor=0.25"),
    ):
        folder = tmp_path / name
        pipe.vae = type(pipe.vae).from_config(config, **{name: value})
        pipe.save_pretrained(folder)
        assert said.format(model=folder) in refusal(made, folder)


def test_another_autoencoder_of_the_class_is_refused(made, model, tmp_path):
    other = Path(shutil.copytree(model, tmp_path / "other"))
    weights = load_file(other / "vae" / WEIGHTS_FILE)
    save_file({name: tensor + 1 for name, tensor in weights.items()}, other / "vae" / WEIGHTS_FILE, {"format": "pt"})
    vouch(other)
    assert "distilled from another autoencoder" in refusal(made, other)


def test_a_folder_that_is_missing_or_something_else_is_refused(model, tmp_path):
    assert "there is no decoder" in refusal(tmp_path / "nowhere", model)
    assert "holds no decoder" in refusal(model, model)
    (tmp_path / "begun" / "checkpoints" / "step-00000001").mkdir(parents=True)
    assert "holds no decoder" in refusal(tmp_path / "begun", model)


def test_damage_is_refused(model, copied):
    weights = (copied / WEIGHTS_FILE).read_bytes()
    (copied / WEIGHTS_FILE).write_bytes(weights[:-1] + b"\0" + weights[-1:])
    assert WEIGHTS_FILE in refusal(copied, model)
    (copied / WEIGHTS_FILE).unlink()
    assert WEIGHTS_FILE in refusal(copied, model)


def test_weights_that_are_not_those_of_the_config_are_refused(model, copied):
    tensors = load_file(copied / WEIGHTS_FILE)
    tensors.pop("post_quant_conv.bias")
    save_file(tensors, copied / WEIGHTS_FILE, {"format": "pt"})
    vouch(copied)
    assert "do not fit its config.json: 1 differ, such as post_quant_conv.bias" in refusal(copied, model)
    config = json.loads((copied / "config.json").read_text())
    (copied / "config.json").write_text(json.dumps(config | {"block_out_channels": [3] * 4}))
    vouch(copied)
    assert "does not load" in refusal(copied, model)
    (copied / RUN_FILE).unlink()
    assert RUN_FILE in refusal(copied, model)


@pytest.mark.parametrize("family", ["hunyuan_video", "wan", "ltx_video", "hunyuan_video_15", "cogvideox"])
def test_what_encoding_did_to_latents_is_undone(family):
    vae = tiny_pipeline(family).vae.eval()
    clip = torch.rand(1, 3, 9, 32, 32) * 2 - 1
    with torch.no_grad():
        stored = vae.encode(clip).latent_dist.mode()
    torch.testing.assert_close(decodable(vae, encode_videos(vae, clip)), stored)
