"""Plans of trainings: against real checkpoints and features at toy size, against the published models by hand."""

import functools
import json
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.students import save_teacher
from tests.train.test_distill import CAPTIONS, write_features
from vidaccel.bench.plan import plan as plan_benchmark
from vidaccel.bench.plan_distill import plan_distillation
from vidaccel.bench.plan_predictor import plan_predictor
from vidaccel.bench.plan_training import TrainingPlan, asked_size
from vidaccel.config.benchmark import BenchmarkConfig
from vidaccel.config.distill import DistillConfig
from vidaccel.config.loader import SCHEMAS, load
from vidaccel.config.plan import GPUS, PlanConfig
from vidaccel.config.predictor import PredictorConfig
from vidaccel.errors import UserError
from vidaccel.models.loading import load_pipeline
from vidaccel.train.distill import distill

FULL_SIZE = [
    ("distill", "wan_14b/cfg"),
    ("distill", "hunyuan_video/published_mean_velocity"),
    ("distill", "hunyuan_video_15/restricted_meanflow"),
    ("train-predictor", "wan_1.3b"),
    ("train-predictor", "hunyuan_video/published"),
    ("train-predictor", "sprites"),
]


@functools.cache
def planned(command: str, conf: str, *words: str, **plan) -> TrainingPlan:
    config = load(command, SCHEMAS[command], conf, words)
    make = plan_distillation if command == "distill" else plan_predictor
    named = any(word.startswith(("teacher=", "student=")) for word in words)
    return make(config, PlanConfig(**plan), conf, named)


@pytest.fixture(scope="module")
def full() -> int:
    """FLOPs of a full pass of Wan 2.1 14B at 81 x 480 x 832, by `benchmark --plan`."""
    config = load("benchmark", BenchmarkConfig, "wan_14b", ["only=[cfg-50]", "sizes=[[81,480,832]]"])
    return sum(plan_benchmark(config)["runs"][0]["plan"]["full_pass"].values())


def flops(made: TrainingPlan, part: str) -> float:
    (found,) = [each.total for each in made.work if each.what.startswith(part)]
    return found


@pytest.mark.parametrize(("command", "conf"), FULL_SIZE)
def test_a_shipped_training_has_a_plan_at_once(command, conf):
    """Without a folder of the model."""
    started = time.process_time()
    made = planned(command, conf)
    assert time.process_time() - started < 5
    assert made.memory.on(1) > made.memory.on(8) > 0
    assert sum(part.total for part in made.work) > 0


def test_distillation_of_14b_by_hand(full):
    """A sample costs its student a pass, once more recomputed, and gradients through it; and the teacher two."""
    made = planned("distill", "wan_14b/cfg", "gate_samples=0")
    assert 5.6 < flops(made, "training") / 8000 / full < 6.1
    weights = 14_288_491_584
    assert made.memory.shared["teacher"] == 4 * weights
    assert made.memory.shared["moments"] == 8 * made.parameters["trained"]
    assert made.model.beside["text encoder"] == pytest.approx(11.36e9, rel=1e-3)
    whole = planned("distill", "wan_14b/cfg", "train.lora_rank=0", "gate_samples=0")
    assert sum(whole.memory.shared.values()) == pytest.approx(24 * weights, rel=3e-3)
    assert flops(whole, "training") > flops(made, "training")
    muon = planned("distill", "wan_14b/cfg", "train.lora_rank=0", "train.optimizer=muon")
    assert muon.memory.shared["moments"] < 0.6 * whole.memory.shared["moments"]
    kept = planned("distill", "wan_14b/cfg", "train.checkpointing=false", "gate_samples=0")
    assert kept.memory.own["activations"] > 10 * made.memory.own["activations"]
    assert flops(kept, "training") < flops(made, "training")


def test_targets_of_mean_velocities(full):
    def sample(*words: str) -> tuple[float, float]:
        made = planned("distill", "wan_14b/restricted_meanflow", "train.steps=1", "train.accumulate=1", *words)
        return made.work[0].flops / full, made.work[0].float32 / full

    one, two = sample("mean_velocity.substeps=1"), sample("mean_velocity.substeps=2")
    assert two[0] - one[0] == pytest.approx(2) and one[1] == two[1] == 0
    derivative = sample("mean_velocity.target=derivative", "mean_velocity.derivative=exact")
    assert one[0] - derivative[0] == pytest.approx(1)  # one pass of the teacher in place of two
    assert 2 < derivative[1] < 3
    difference = sample("mean_velocity.target=derivative", "mean_velocity.derivative=finite_difference")
    assert difference[1] == pytest.approx(2)


def test_gates_and_sheets_are_part_of_it(full):
    made = planned("distill", "wan_14b/cfg")
    assert flops(made, "gates") == pytest.approx(64 * 28 * full)
    assert flops(made, "sample sheets") == pytest.approx(2 * 4 * 50 * full)
    large = planned("distill", "wan_14b/restricted_meanflow")
    assert not any(part.what.startswith("gates") for part in large.work)  # more than a billion parameters
    asked = planned("distill", "wan_14b/restricted_meanflow", "gate_samples=64", "gate_runs=2")
    assert flops(asked, "gates") == pytest.approx(2 * 350 * full)
    never = planned("distill", "wan_14b/cfg", "train.sample_every=0", "gate_samples=0")
    assert flops(never, "sample sheets") == 0 and len(never.work) == 3


def test_minutes_are_as_many_steps_as_there_is_time_for():
    made = planned("distill", "wan_14b/cfg", "train.steps=null", "train.minutes=600", "gate_samples=0")
    training = made.work[0]
    assert PlanConfig().seconds(training.flops, training.float32) == pytest.approx(36_000, rel=0.01)


def test_predictor_of_14b_by_hand(full):
    made = planned("train-predictor", "wan_14b")
    assert 2.1 < flops(made, "first stage") / 4000 / full < 2.5
    assert 5 < flops(made, "adversarial stage") / 8000 / full < 7
    assert made.memory.shared["student"] == 2 * 14_288_491_584
    trajectories = planned("train-predictor", "wan_14b", "pairs=trajectory", "clips=64", "steps=20")
    assert flops(trajectories, "trajectories") == pytest.approx(64 * 20 * full)
    assert trajectories.disk["trajectories, 64"] == pytest.approx(64 * 168e6, rel=0.06)
    served = planned(
        "train-predictor",
        "wan_14b",
        *("pairs=served", "steps=8", "lists=[[0,2,4]]", "adversarial.steps=0", "mse.checkpointing=false"),
    )
    # 8 full steps of its own, two behind the first predicted one with gradients through them
    gradients = (flops(served, "served") / 4000 / full - 8) / 2
    assert 2.5 < gradients < 3.4  # and what the predicted steps cost


def test_served_runs_of_two_transformers_begin_each_with_a_full_step():
    words = ("pairs=served", "steps=8", "adversarial.steps=0", "mse.checkpointing=false")
    with pytest.raises(UserError, match="leaves out 6, the first step of the second transformer"):
        planned("train-predictor", "wan_14b", *words, "lists=[[0,2]]", "shift=12", size_of="wan22")
    made = planned("train-predictor", "wan_14b", *words, "lists=[[0,2,6]]", "shift=12", size_of="wan22")
    assert flops(made, "served") > 0


def test_a_forecaster_of_scalars(full):
    made = planned("train-predictor", "wan_14b", "forecaster=multistep", "full_steps=[0,1,4]", "steps=8")
    assert made.work[0].total == pytest.approx(2 * 80 * 11 * full)
    assert made.parameters["trained"] == 0
    once, twice = (
        planned("train-predictor", "wan_14b", "forecaster=reuse", "steps=8", *more) for more in (["guidance=1"], [])
    )
    assert twice.work[0].total == 2 * once.work[0].total


def test_a_real_training_at_toy_size(tmp_path):
    teacher = save_teacher(tmp_path / "teacher", "wan")
    loaded = load_pipeline(teacher)
    features = write_features(tmp_path / "features", loaded)
    words = [
        f"teacher={teacher}",
        f"features={features}",
        "train.steps=2",
        "train.batch_size=1",
        "train.sample_every=0",
    ]
    config = load("distill", SCHEMAS["distill"], "cfg", words)
    distill(config, tmp_path / "student")
    made = plan_distillation(config, PlanConfig(), "cfg", named=True)
    assert made.parameters["frozen"] == sum(p.numel() for p in loaded.pipe.transformer.parameters())
    (checkpoint, *_) = sorted((tmp_path / "student" / "checkpoints").glob("step-*"))
    held = {file.stem: tensor_bytes(file) for file in checkpoint.glob("*.safetensors")}
    assert made.memory.shared["averages"] == held["ema"]
    assert made.memory.shared["gradients"] == held["model"]
    assert made.memory.shared["moments"] == pytest.approx(held["optimizer"], rel=0.01)  # and a step count a tensor
    assert made.disk["a checkpoint"] == pytest.approx(sum(held.values()), rel=0.01)
    stored = sum(tensor_bytes(file) for file in (tmp_path / "student" / "transformer").glob("*.safetensors"))
    stored += sum(tensor_bytes(file) for file in (tmp_path / "student" / "conditioning").glob("*.safetensors"))
    assert made.disk["the student"] == pytest.approx(stored, rel=0.1)
    assert any(what.startswith(f"features of {len(CAPTIONS)} clips") for what in made.disk)


def test_the_size_is_that_of_the_features(tmp_path):
    (tmp_path / "run.json").write_text(json.dumps({"config": {"num_frames": 5, "height": 32, "width": None}}))
    asked = asked_size(DistillConfig(features=str(tmp_path)))
    assert asked == {"num_frames": 5, "height": 32, "width": None}


@pytest.mark.parametrize("schema", [DistillConfig, PredictorConfig])
def test_of_features_of_several_sizes_it_is_the_largest(schema, tmp_path):
    (tmp_path / "run.json").write_text(json.dumps({"config": {"sizes": [[5, 32, 32], [5, 48, 32], [9, 16, 16]]}}))
    assert asked_size(schema(features=str(tmp_path))) == {"num_frames": 5, "height": 48, "width": 32}


def tensor_bytes(file: Path) -> int:
    return sum(tensor.nbytes for tensor in load_file(file).values())


def test_a_model_that_is_not_there_yet(tmp_path):
    assert planned("distill", "wan_14b/restricted_meanflow").model.size == (81, 480, 832)
    with pytest.raises(UserError) as error:
        planned("distill", "few_steps", f"teacher={tmp_path / 'cfg'}")
    assert "there is no folder" in error.value.message and "size_of=wan_14b" in error.value.hint
    made = planned("distill", "few_steps", f"teacher={tmp_path / 'cfg'}", "num_frames=49", size_of="wan_1.3b")
    assert made.model.size == (49, 480, 832)
    assert made.parameters["frozen"] == pytest.approx(1.419e9, rel=1e-3)


def test_a_hub_model_offline_is_refused_as_elsewhere(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="neither a folder here nor a model that the hub gave us"):
        planned("distill", "cfg", "teacher=somebody/some-video-model")


def test_the_size_of_an_adapter_is_that_of_its_pipeline(tmp_path):
    teacher = save_teacher(tmp_path / "teacher", "wan")
    (tmp_path / "student" / "lora").mkdir(parents=True)
    (tmp_path / "student" / "run.json").write_text(json.dumps({"pipeline": str(teacher), "call": {"steps": 8}}))
    made = planned("distill", "few_steps", f"teacher={tmp_path / 'student'}")
    assert made.model.config.family == "wan"


def test_hours_and_cards():
    plan = PlanConfig(gpu="a100", mfu=0.5)
    assert plan.seconds(312e12 / 2, 19.5e12 / 2) == pytest.approx(2)
    assert PlanConfig(memory="24 GB").room == 24e9 and PlanConfig(memory="2GiB").room == 2 * 2**30
    assert PlanConfig(gpu="h200").room == 141e9
    assert all(card.bfloat16 > card.float32 > 1e12 and card.memory >= 24e9 for card in GPUS.values())


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"gpu": "h9000"}, "a100, a100-40gb, b200, h100, h200"),
        ({"price": -1.0}, "0 or more"),
        ({"price": float("nan")}, "finite"),
        ({"price": float("inf")}, "finite"),
        ({"memory": "24"}, "such as 24GB"),
        ({"memory": "lots"}, "such as 24GB"),
        ({"memory": "-24GB"}, "such as 24GB"),
        ({"memory": "0GB"}, "above 0"),
        ({"mfu": 0.0}, "share of the peak"),
        ({"mfu": float("nan")}, "share of the peak"),
        ({"gpus": []}, "rises"),
        ({"gpus": [8, 1]}, "rises"),
        ({"gpus": [0]}, "rises"),
    ],
    ids=str,
)
def test_settings_of_a_plan(settings, said):
    with pytest.raises(UserError, match="is not possible") as error:
        PlanConfig(**settings)
    assert said in error.value.hint


def test_names_are_of_a_plan_or_of_a_command():
    own = set(PlanConfig.__dataclass_fields__)
    for command in ("distill", "train-predictor", "benchmark"):
        assert own.isdisjoint(SCHEMAS[command].__dataclass_fields__)
