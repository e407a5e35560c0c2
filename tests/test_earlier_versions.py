"""Models, predictors, schedules, features and latents that commit 9cb9f0f wrote are read as it read them.

What it read is in artefacts_9cb9f0f/expected.json and .safetensors; see README.md there.
"""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.testing import assert_close
from typer.testing import CliRunner

import vidaccel
from tests.tiny import HUNYUAN_CALL, SIZE
from vidaccel.artefacts import read_run, verify_files
from vidaccel.cache.schedule import Schedule, read_schedules, write_schedules
from vidaccel.cli.main import app
from vidaccel.collect.encode import encode_texts
from vidaccel.collect.features import open_features
from vidaccel.forecasters.base import Cached
from vidaccel.forecasters.learned import Predictor
from vidaccel.models.grid import Grid
from vidaccel.models.loading import LoadedPipeline, load_pipeline
from vidaccel.models.velocity import Velocity
from vidaccel.models.weight_hashes import student_hash

EARLIER = Path(__file__).parent / "artefacts_9cb9f0f"
EXPECTED = json.loads((EARLIER / "expected.json").read_text())
TENSORS = load_file(EARLIER / "expected.safetensors")
PROMPT = "a red circle moving right on black"
TINY_CALL = {**SIZE, **HUNYUAN_CALL, "max_sequence_length": 16}
SHIPPED_CALL = {
    "num_frames": 17,
    "height": 64,
    "width": 64,
    "prompt_template": {"template": "{}", "crop_start": 0},
    "max_sequence_length": 32,
}
TWO_PASS = {"true_cfg_scale": 3.0, "guidance_scale": 1.0, "negative_prompt": ""}
MODELS = ("teacher", "cfg", "student", "lora")


@pytest.fixture
def earlier(tmp_path, monkeypatch) -> Path:
    """A copy of the folders of then, in which to work: they name each other by relative paths."""
    folder = shutil.copytree(EARLIER, tmp_path / "earlier")
    monkeypatch.chdir(folder)
    return folder


def wave(*shape: int, step: float = 0.7) -> torch.Tensor:
    """sin(0, step, 2 step, ...): an input that needs no random numbers."""
    return torch.sin(step * torch.arange(math.prod(shape), dtype=torch.float64)).float().view(*shape)


@torch.no_grad()
def latents(loaded: LoadedPipeline, steps: int, call: dict, seed: int = 1) -> torch.Tensor:
    loaded.pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(seed)
    made = loaded.pipe(PROMPT, num_inference_steps=steps, generator=generator, output_type="latent", **call).frames
    return made.float()


def close(made: torch.Tensor, expected: torch.Tensor) -> None:
    assert_close(made, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", MODELS)
def test_models(earlier, name):
    if name == "lora":
        pytest.importorskip("peft")
    loaded, expected = load_pipeline(name, dtype="float32"), EXPECTED["models"][name]
    run = read_run(name, "model/1")
    verify_files(name, run)
    assert loaded.call == expected["call"] and loaded.pipe.scheduler.config.shift == expected["shift"]
    assert dict(loaded.hashes) == expected["hashes"] and student_hash(loaded) == expected["student_hash"]
    assert run["parents"] == expected["parents"]
    if loaded.conditioning is None:
        assert expected["conditioning"] is None
    else:
        config = json.loads(json.dumps(vars(loaded.conditioning.config)))
        assert config.pop("times") == list(Grid.shifted(config["steps"], config["shift"]).times)
        assert config.pop("until") == 0  # there was one transformer alone, which takes all steps to the end
        assert config == expected["conditioning"]
    guidance = TWO_PASS if name == "teacher" else {}
    close(latents(loaded, expected["steps"], TINY_CALL | guidance), TENSORS[f"{name}.latents"])
    velocity = Velocity(loaded.pipe.transformer, loaded.family, loaded.conditioning)
    text = {key: tensor.float() for key, tensor in encode_texts(loaded, [PROMPT]).items()}
    g = torch.tensor([2.0]) if velocity.embeds("g") else None
    with torch.no_grad():
        made = velocity(wave(1, 4, 2, 4, 4), torch.tensor([0.7]), text, r=torch.tensor([0.4]), g=g)
    close(made, TENSORS[f"{name}.velocity"])


def test_a_predictor_and_its_schedules(earlier, tmp_path):
    """Whose grids were then known by steps and shift alone."""
    expected = EXPECTED["predictor"]
    loaded, predictor = load_pipeline("student", dtype="float32"), Predictor.from_pretrained("predictor")
    predictor.check_fits(loaded.pipe.transformer, loaded.family, student_hash(loaded))
    config = json.loads(json.dumps(vars(predictor.config)))
    assert "times" not in json.loads((earlier / "predictor" / "config.json").read_text())
    assert config.pop("times") == list(Grid.shifted(4, 2.0).times)
    assert config.pop("architecture") == "correction"  # the only one then
    assert config.pop("boundary") is None
    assert config == expected["config"]
    schedules = read_schedules("predictor/schedule.json")
    assert [schedule.grid for schedule in schedules] == [Grid.shifted(s.steps, s.shift) for s in schedules]
    described = [json.loads(json.dumps(vars(s))) | {"budget": s.budget} for s in schedules]
    assert all(entry.pop("boundary") is None for entry in described)  # each was for one transformer
    assert [{key: entry[key] for key in entry if key != "times"} for entry in described] == expected["schedules"]
    assert read_run("predictor", "predictor/1")["searched_on"] == expected["searched_on"]
    write_schedules(tmp_path / "again.json", schedules)
    assert read_schedules(tmp_path / "again.json") == schedules
    predictor.save_pretrained(tmp_path / "again")
    assert Predictor.from_pretrained(tmp_path / "again").config == predictor.config


@torch.no_grad()
def test_what_a_predictor_makes(earlier):
    loaded, predictor = load_pipeline("student", dtype="float32"), Predictor.from_pretrained("predictor")
    sizes = {"hidden_states": (1, 8, 12), "encoder_hidden_states": (1, 4, 12)}
    arguments = {name: wave(*size) for name, size in sizes.items()}
    arguments |= {"temb": wave(1, 12, step=0.3), "attention_mask": None}
    arguments |= {"freqs_cis": (torch.ones(8, 12), torch.zeros(8, 12))}
    memory = tuple(
        Cached({name: wave(*size, step=step) for name, size in sizes.items()}, torch.tensor(t))
        for step, t in ((0.5, 0.8), (0.4, 0.9))
    )
    names = loaded.family.block_lists[0].arguments
    tokens = predictor(dict(zip(names, arguments.values(), strict=False)), memory, torch.tensor(0.5))
    for name, made in tokens.items():
        close(made, TENSORS[f"predictor.tokens.{name}"])
    ways = {"budget-2-of-4": {"steps": 4, "budget": 2}, "listed-of-4": {"steps": 4, "full_steps": [0, 1]}}
    for key, way in ways.items():
        with vidaccel.attach(loaded, predictor="predictor", **way) as attachment:
            close(latents(loaded, 4, TINY_CALL), TENSORS[f"predictor.{key}"])
        passes = [attachment.full_passes, attachment.predicted_passes]
        assert passes == EXPECTED["predictor"]["attached"][key]["full_and_predicted"]


@pytest.mark.parametrize(
    ("key", "words"),
    [
        ("conf", ["--conf", "conf/generate.yaml"]),
        ("shift-3-budget-3-of-6", ["--conf", "conf/generate.yaml", "steps=6", "shift=3", "budget=3"]),
        ("lora", ["model=lora", "steps=3"]),
    ],
)
def test_generate(earlier, key, words):
    """Also on a grid that the predictor was not trained for, on which its schedule was searched."""
    if key == "lora":
        pytest.importorskip("peft")
    result = CliRunner().invoke(app, ["generate", PROMPT, *words, "-o", "frames", "--json"], catch_exceptions=False)
    report, expected = json.loads(result.stdout), EXPECTED["generate"][key]
    assert {name: report[name] for name in expected if name != "frames"} == {
        name: value for name, value in expected.items() if name != "frames"
    }


@pytest.mark.parametrize(
    ("name", "kind", "model"), [("features", "encoded", "teacher"), ("trajectories", "trajectory", "student")]
)
def test_features(earlier, name, kind, model):
    expected = EXPECTED["features"][name]
    folder = open_features(name, kind, load_pipeline(model).hashes)
    record = read_run(name, "features/1")
    assert (record["kind"], record["made_with"]) == (expected["kind"], expected["made_with"])
    assert len(folder) == len(expected["samples"])
    for (tensors, about), wanted in zip(folder, expected["samples"], strict=True):
        assert about == wanted["record"] and tensors.keys() == wanted["tensors"].keys()
        for key, tensor in tensors.items():
            assert [list(tensor.shape), str(tensor.dtype)] == [wanted["tensors"][key][n] for n in ("shape", "dtype")]
            assert float(tensor.double().norm()) == pytest.approx(wanted["tensors"][key]["norm"], rel=1e-6)


def test_a_collection_goes_on(earlier):
    words = ["--conf", "conf/collect-features.yaml", "-o", "features-interrupted", "per_shard=4"]
    assert CliRunner().invoke(app, ["collect-features", *words], catch_exceptions=False).exit_code == 0
    hashes = load_pipeline("teacher").hashes
    again, whole = (open_features(name, "encoded", hashes) for name in ("features-interrupted", "features"))
    for (made, _), (wanted, _) in zip(again, whole, strict=True):
        for key in wanted:
            assert_close(made[key], wanted[key], rtol=1e-3, atol=1e-4)


def made_by(model: str, steps: int, attached: dict | None, call: dict) -> Callable[[], torch.Tensor]:
    def make() -> torch.Tensor:
        loaded = load_pipeline(model, dtype="float32")
        if attached is None:
            return latents(loaded, steps, SHIPPED_CALL | call, seed=0)
        with vidaccel.attach(loaded, **attached):
            return latents(loaded, steps, SHIPPED_CALL | call, seed=0)

    return make


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("teacher", made_by("sprites/teacher", 6, None, TWO_PASS)),
        ("student", made_by("sprites/student", 8, None, {})),
        (
            "student+predictor",
            made_by("sprites/student", 8, {"predictor": "sprites/predictor", "steps": 8, "budget": 4}, {}),
        ),
    ],
)
def test_the_shipped_models_end_in_the_latents_of_then(name, make):
    """Not bit for bit: another batch or vector width already changes 3e-6."""
    kept = load_file(EARLIER / "latents" / "latents.safetensors")[name]
    made = make()
    assert float((made - kept).norm() / kept.norm()) < 1e-4
    assert_close(made, kept, rtol=1e-4, atol=1e-4)


def test_a_schedule_of_no_grid_is_written_as_one_of_none(tmp_path):
    write_schedules(tmp_path / "schedule.json", [Schedule(4, (0, 2))])
    assert json.loads((tmp_path / "schedule.json").read_text())["2-of-4"]["times"] is None
    assert read_schedules(tmp_path / "schedule.json") == [Schedule(4, (0, 2))]
