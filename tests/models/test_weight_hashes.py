"""What a model is known by: the same for its folder, its snapshot of the hub, and whichever way it was loaded."""

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline

import vidaccel
from tests.students import for_diffusers, student
from vidaccel import file_hashes
from vidaccel.errors import UserError
from vidaccel.forecasters.learned import Predictor, new_predictor
from vidaccel.models import files
from vidaccel.models.loading import LoadedPipeline, load_pipeline
from vidaccel.models.weight_hashes import encoder_hashes, student_hash, student_hashes

HUB = "someone/model"
ATTACHED = {"steps": 4, "full_steps": [0, 2]}


def predictor_of(loaded: LoadedPipeline, **made_for: object) -> Predictor:
    tokens = {"hidden_states": torch.randn(1, 8, 24)}
    return new_predictor(loaded.pipe.transformer, loaded.family, tokens, tokens, blocks=1, **made_for)


@pytest.fixture
def snapshot(saved, tmp_path, monkeypatch) -> Path:
    """The tiny Wan as the hub's cache holds it."""
    folder = shutil.copytree(saved("wan"), tmp_path / "models--someone--model" / "snapshots" / "abc")
    monkeypatch.setattr(files, "_download", lambda hub_id: {HUB: folder}[hub_id])
    return folder


def test_a_hub_id_and_a_folder_of_one_model_have_one_identity(saved, snapshot):
    hub, folder = load_pipeline(HUB), load_pipeline(saved("wan"))
    assert hub.source == HUB
    assert dict(hub.hashes) == dict(folder.hashes) and encoder_hashes(hub) == encoder_hashes(folder) != {}
    assert student_hash(hub) == student_hash(folder)


def test_what_was_made_for_a_hub_id_by_the_old_rule_is_still_for_it(saved, snapshot):
    """By which a hub id was hashed itself, and its files were not."""
    old = hashlib.sha256(json.dumps(HUB).encode()).hexdigest()
    hub, folder = load_pipeline(HUB), load_pipeline(saved("wan"))
    assert student_hashes(hub) == {student_hash(hub), old} and student_hashes(folder) == {student_hash(folder)}
    for made_for, fits_folder in ((old, False), (student_hash(folder), True)):
        predictor = predictor_of(hub, student=made_for)
        vidaccel.attach(hub, predictor=predictor, **ATTACHED).detach()
        if fits_folder:
            vidaccel.attach(folder, predictor=predictor, **ATTACHED).detach()
        else:
            with pytest.raises(UserError, match="trained for the student .*, and this is .*wan"):
                vidaccel.attach(folder, predictor=predictor, **ATTACHED)


def test_a_pipeline_that_diffusers_loaded_of_the_hub_is_known_by_its_snapshot(saved, snapshot):
    pipe = DiffusionPipeline.from_pretrained(snapshot)
    pipe.register_to_config(_name_or_path=HUB)  # as from_pretrained(HUB) leaves it
    folder = load_pipeline(saved("wan"))
    vidaccel.attach(pipe, predictor=predictor_of(folder, student=student_hash(folder)), **ATTACHED).detach()
    pipe.register_to_config(_name_or_path="someone/else")
    with pytest.raises(UserError, match="whose weight files are not known"):
        vidaccel.attach(pipe, predictor=predictor_of(folder, student=student_hash(folder)), **ATTACHED)


def test_weights_are_read_once_by_loading_attaching_and_distilling(tmp_path, monkeypatch):
    folder = for_diffusers(student(tmp_path, "wan"))
    loaded = load_pipeline(folder)
    predictor_of(loaded, student=student_hash(loaded)).save_pretrained(tmp_path / "predictor")
    settled = [path for path in tmp_path.rglob("*") if path.is_file()]
    monkeypatch.setattr(file_hashes, "SETTLED", -1.0)
    monkeypatch.setattr(file_hashes, "_known", {})
    read: list[Path] = []
    plain = file_hashes.hashlib.file_digest
    monkeypatch.setattr(
        file_hashes.hashlib, "file_digest", lambda file, name: read.append(Path(file.name)) or plain(file, name)
    )
    for _ in range(2):
        loaded = load_pipeline(folder)
        with vidaccel.attach(loaded, predictor=tmp_path / "predictor", **ATTACHED):
            pass
        pipe = DiffusionPipeline.from_pretrained(folder)
        with pytest.raises(UserError, match="without its conditioning"):
            vidaccel.attach(pipe, predictor=tmp_path / "predictor", **ATTACHED)
        assert {**loaded.hashes}.keys() >= {"transformer/diffusion_pytorch_model.safetensors"}
    weights = [path for path in read if path.suffix == ".safetensors"]
    assert len(weights) == len(set(weights)) >= 4 and all(path in settled for path in weights)


def test_a_plain_folder_is_read_for_what_is_asked_and_no_more(saved, monkeypatch):
    monkeypatch.setattr(file_hashes, "_known", {})
    read: list[str] = []
    plain = file_hashes.file_sha256
    monkeypatch.setattr(file_hashes, "file_sha256", lambda path: read.append(Path(path).parent.name) or plain(path))
    loaded = load_pipeline(saved("wan"))
    assert read == []
    student_hash(loaded)
    assert set(read) == {"transformer"}
    encoder_hashes(loaded)
    assert set(read) == {"transformer", "vae", "text_encoder"}
