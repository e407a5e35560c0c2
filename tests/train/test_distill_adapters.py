"""A teacher with LoRA files: its student starts as that model, and says what it was made of."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from tests.models.test_adapters import comfyui
from tests.students import save_teacher
from tests.train.test_distill import TRAIN, write_features
from vidaccel.artefacts import sha256_file
from vidaccel.bench.own_model import with_ancestors
from vidaccel.comparison import full_way
from vidaccel.config.benchmark import BenchmarkConfig
from vidaccel.config.distill import DistillConfig
from vidaccel.config.generate import GenerateConfig
from vidaccel.config.training import TrainConfig
from vidaccel.errors import UserError
from vidaccel.models.lineage import lora_of_root
from vidaccel.models.loading import load_pipeline
from vidaccel.train.distill import distill

STILL = TRAIN | {"steps": 1, "learning_rate": 1e-12}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A Wan folder, features of it, and a LoRA file."""
    folder = tmp_path_factory.mktemp("adapters")
    write_features(folder / "features", load_pipeline(save_teacher(folder / "wan", "wan")))
    save_file(comfyui(), folder / "lora.safetensors")
    return folder


def config(model, **changes) -> DistillConfig:
    own = {
        "teacher": str(model / "wan"),
        "features": str(model / "features"),
        "lora": [f"{model}/lora.safetensors:0.5"],
    }
    own |= {"lora": [f"{model}/lora.safetensors:0.5"], "train": TrainConfig(**STILL)}
    return DistillConfig(**own | changes)


def test_the_teacher_and_its_student_begin_with_the_files_in_their_weights(model, monkeypatch):
    asked, output = config(model), model / "cfg"
    distill(asked, output)
    teacher = load_pipeline(model / "wan", lora=asked.lora).pipe.transformer.state_dict()
    plain = load_pipeline(model / "wan").pipe.transformer.state_dict()
    made = load_pipeline(output).pipe.transformer.state_dict()
    changed = [name for name in teacher if not torch.equal(teacher[name], plain[name])]
    assert changed
    for name, weight in teacher.items():
        torch.testing.assert_close(made[name], weight, rtol=1e-3, atol=1e-3)
    run = json.loads((output / "run.json").read_text())
    assert run["config"]["lora"] == asked.lora
    assert run["parents"]["lora.0"] == sha256_file(model / "lora.safetensors")
    # What it is held against is the teacher with the file, and not the one without.
    full = full_way(GenerateConfig(model=str(output)))
    assert (full.model, full.lora) == (asked.teacher, asked.lora)
    held = with_ancestors(BenchmarkConfig(student=str(output)))
    assert (held.model, held.lora) == (asked.teacher, asked.lora)
    assert with_ancestors(BenchmarkConfig(student=str(output), model=asked.teacher)).lora == asked.lora
    for others in ({"lora": []}, {"student": "sprites/student"}):
        own = BenchmarkConfig(**{"student": str(output), "model": asked.teacher} | others)
        assert with_ancestors(own) == own
    with pytest.raises(UserError, match="teacher"):
        distill(replace(asked, lora=[f"{model}/lora.safetensors:0.25"], train=TrainConfig(**TRAIN)), output)


def test_of_two_transformers_the_files_of_both_distillations_belong_to_what_it_is_held_against(tmp_path):
    files = ["transformer:high.safetensors", "transformer_2:low.safetensors:0.8"]
    for name, teacher, lora in (("first", "root", files[:1]), ("both", "first", files[1:]), ("more", "both", None)):
        (tmp_path / name).mkdir()
        run = {"config": {"teacher": str(tmp_path / teacher), "lora": lora}, "parents": {}}
        (tmp_path / name / "run.json").write_text(json.dumps(run))
    more, *found = (str(tmp_path / name) for name in ("more", "both", "first", "root"))
    assert lora_of_root(more, found) == lora_of_root(found[0], found[1:]) == files
    assert lora_of_root(found[1], found[2:]) == files[:1] and lora_of_root(more, []) is None


def test_an_adapter_apart_would_lose_them(model, tmp_path):
    asked = config(model, merge_lora=False, train=TrainConfig(**STILL, lora_rank=2))
    with pytest.raises(UserError, match=r"without the files of lora=\nhint: leave merge_lora=true"):
        distill(asked, tmp_path / "out")


def test_of_two_transformers_only_the_one_that_is_distilled_takes_some(model, tmp_path):
    teacher = save_teacher(tmp_path / "two", "wan22")
    asked = config(
        model, teacher=str(teacher), lora=[f"transformer_2:{model}/lora.safetensors"], denoiser="transformer"
    )
    with pytest.raises(UserError, match=r"is not for the transformer that is distilled, and would be lost"):
        distill(asked, tmp_path / "out")
