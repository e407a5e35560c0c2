"""Students that are adapters: merged by hand, and refused by name when anything about them does not fit."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import UniPCMultistepScheduler
from peft import LoraConfig
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tests.students import refused, save, trained, vouch
from vidaccel.artefacts import RUN_FILE, read_run
from vidaccel.errors import UserError
from vidaccel.models import saving
from vidaccel.models.loading import LoadedPipeline, load_pipeline
from vidaccel.worlds import sprites

WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"
ADAPTER = "lora/pytorch_lora_weights.safetensors"
FIRST = "transformer_blocks.0.attn.to_q.lora_A.weight"


@pytest.fixture(scope="module")
def adapted(teachers, tmp_path_factory) -> dict:
    """A student that is an adapter: its folder, its transformer, and a plain copy of the teacher's weights."""
    teacher = load_pipeline(teachers["hunyuan_video"].source)
    weights = {name: tensor.clone() for name, tensor in teacher.pipe.transformer.state_dict().items()}
    torch.manual_seed(0)
    targets = ["to_q", "to_out.0", "proj_mlp"]
    teacher.pipe.transformer.add_adapter(LoraConfig(r=2, lora_alpha=6, target_modules=targets, init_lora_weights=False))
    folder = save(tmp_path_factory.mktemp("adapted") / "student", teacher, trained(teacher))
    return {"folder": folder, "transformer": teacher.pipe.transformer, "weights": weights}


def test_an_adapter_is_merged_into_its_teachers_weights(adapted):
    folder, weights = adapted["folder"], adapted["weights"]
    assert {path.name for path in folder.iterdir()} == {"lora", "conditioning", "scheduler", "README.md", RUN_FILE}
    loaded = load_pipeline(folder)
    merged, adapter = loaded.pipe.transformer.state_dict(), load_file(folder / ADAPTER)
    assert merged.keys() == weights.keys()
    touched = {name.removesuffix(".lora_A.weight") for name in adapter if name.endswith(".lora_A.weight")}
    assert len(touched) > 4
    for name, weight in weights.items():
        module = name.removesuffix(".weight")
        expected = weight.double()
        if module in touched:
            a, b = (adapter[f"{module}.lora_{part}.weight"].double() for part in "AB")
            expected = expected + 6 / 2 * b @ a
        torch.testing.assert_close(merged[name].double(), expected, atol=1e-6, rtol=1e-6)
    assert not any("lora" in name for name, _ in loaded.pipe.transformer.named_modules())
    assert ADAPTER in loaded.hashes and WEIGHTS in loaded.hashes
    assert (loaded.call["steps"], loaded.call["shift"], loaded.pipe.scheduler.shift) == (4, 2.0, 2.0)
    assert loaded.conditioning is not None


def test_the_pipeline_of_an_adapter_is_named_as_it_can_be_found(adapted, teachers, tmp_path, monkeypatch):
    teacher = Path(teachers["hunyuan_video"].source)
    assert read_run(adapted["folder"], "model/1")["pipeline"] == str(teacher)
    monkeypatch.setattr(sprites, "SHIPPED", teacher.parent)
    loaded = LoadedPipeline(None, None, str(teacher), {}, {})
    assert saving._write_adapter(tmp_path, loaded, adapted["transformer"]) == {"pipeline": "sprites/hunyuan_video"}
    loaded = LoadedPipeline(None, None, str(adapted["folder"]), {}, {})
    with pytest.raises(UserError, match="belongs to a pipeline folder"):
        saving._write_adapter(tmp_path, loaded, adapted["transformer"])


def edit_adapter(folder: Path, change: Callable[[dict[str, torch.Tensor]], object], described: bool = True) -> None:
    with safe_open(folder / ADAPTER, framework="pt") as file:
        metadata = file.metadata() if described else {"format": "pt"}
    weights = load_file(folder / ADAPTER)
    change(weights)
    save_file(weights, folder / ADAPTER, metadata=metadata)
    vouch(folder)


def adapter_missing(folder: Path) -> str:
    (folder / ADAPTER).unlink()
    return f"{ADAPTER} is missing"


def adapter_truncated(folder: Path) -> str:
    (folder / ADAPTER).write_bytes((folder / ADAPTER).read_bytes()[:-1])
    vouch(folder)
    return ADAPTER


def adapter_changed(folder: Path) -> str:
    weights = load_file(folder / ADAPTER)
    save_file({name: weight + 1 for name, weight in weights.items()}, folder / ADAPTER)
    return f"{ADAPTER} changed"


def adapter_lacks_a_weight(folder: Path) -> str:
    edit_adapter(folder, lambda weights: weights.pop(FIRST))
    return f"has 1 missing weights, such as {FIRST}"


def adapter_has_a_weight_more(folder: Path) -> str:
    edit_adapter(folder, lambda weights: weights.update({"other.lora_A.weight": torch.zeros(2, 2)}))
    return "has 1 unexpected weights, such as other.lora_A.weight"


def adapter_of_another_width(folder: Path) -> str:
    edit_adapter(folder, lambda weights: weights.update({FIRST: torch.zeros(2, 5)}))
    return ADAPTER


def adapter_not_finite(folder: Path) -> str:
    edit_adapter(folder, lambda weights: weights[FIRST].fill_(float("nan")))
    return ADAPTER


def adapter_of_unknown_scale(folder: Path) -> str:
    edit_adapter(folder, lambda weights: None, described=False)
    return "does not say its scale"


def pipeline_changed(folder: Path) -> str:
    run = json.loads((folder / RUN_FILE).read_text())
    run["parents"]["pipeline"] = "0" * 64
    (folder / RUN_FILE).write_text(json.dumps(run))
    return "is no longer the model"


def foreign_scheduler(folder: Path) -> str:
    UniPCMultistepScheduler().save_pretrained(folder / "scheduler")
    vouch(folder)
    return "scheduler_config.json belongs to a UniPCMultistepScheduler"


def no_pipeline_named(folder: Path) -> str:
    run = json.loads((folder / RUN_FILE).read_text())
    run.pop("pipeline")
    (folder / RUN_FILE).write_text(json.dumps(run))
    return "does not say which pipeline"


@pytest.mark.parametrize(
    "damage",
    [
        adapter_missing,
        adapter_truncated,
        adapter_changed,
        adapter_lacks_a_weight,
        adapter_has_a_weight_more,
        adapter_of_another_width,
        adapter_not_finite,
        adapter_of_unknown_scale,
        pipeline_changed,
        foreign_scheduler,
        no_pipeline_named,
    ],
    ids=lambda damage: damage.__name__,
)
def test_a_broken_adapter_is_refused_by_name(damage, adapted, tmp_path):
    folder = shutil.copytree(adapted["folder"], tmp_path / "student")
    assert damage(folder) in refused(folder).message


def test_an_adapter_without_peft(adapted, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    assert "vidaccel[train]" in refused(adapted["folder"]).hint
