"""Distillation from a teacher's folder to a student's, on tiny pipelines of every family."""

import json
import logging
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from tests.students import contents, save_teacher
from tests.tiny import FLOW
from tests.train.test_trainer import outcome
from tests.train.torchrun import program
from vidaccel.artefacts import sha256_file, write_run
from vidaccel.cli.main import app
from vidaccel.collect.encode import batch, encode_texts, rows
from vidaccel.config.distill import DistillConfig
from vidaccel.config.generate import GenerateConfig
from vidaccel.config.training import TrainConfig
from vidaccel.data.clips import write_clips
from vidaccel.data.shards import write_shards
from vidaccel.errors import TrainingFailed, UserError
from vidaccel.models.calling import video_size
from vidaccel.models.loading import LoadedPipeline, load_pipeline
from vidaccel.models.velocity import Velocity
from vidaccel.models.weight_hashes import encoder_hashes
from vidaccel.sampling import generate
from vidaccel.train import distill as module
from vidaccel.train.clips import open_data
from vidaccel.train.distill import distill, student_of, velocity_of
from vidaccel.train.methods.base import Distillation
from vidaccel.train.methods.cfg import cfg_loss
from vidaccel.train.methods.mean_velocity import derivative as derivative_module
from vidaccel.train.methods.mean_velocity.settings import MeanVelocityTraining

CAPTIONS = ["a red circle", "a blue square", "a green circle on white"]
TRAIN = {"steps": 2, "batch_size": 2, "learning_rate": 1e-3, "warmup": 0, "ema_decay": 0.0, "log_every": 1}


def write_features(
    folder: Path,
    loaded: LoadedPipeline,
    spoil: float = 1.0,
    per_shard: int = 256,
    size: tuple[int, int, int] = (2, 4, 4),
    said: dict | None = None,
) -> Path:
    """Three samples with random latents [C, *size], the first one's multiplied by `spoil`; `said` are the settings of
    the command."""
    generator = torch.Generator().manual_seed(0)
    channels = loaded.pipe.transformer.config.out_channels
    latents = torch.randn(3, channels, *size, generator=generator)
    latents[0] *= spoil
    samples = rows(loaded, encode_texts(loaded, CAPTIONS), [{"caption": c, "fps": 8} for c in CAPTIONS], "float32")
    for (tensors, _), latent in zip(samples, latents, strict=True):
        tensors["latent"] = latent
    settings = {"count": 3, "kind": "encoded", "settings": {}, "per_shard": per_shard}
    write_shards(folder, lambda indices: [samples[i] for i in indices], **settings)
    made_with = encoder_hashes(loaded)
    write_run(
        folder,
        format="features/1",
        command="test",
        config=said or {},
        seed=0,
        started=datetime.now(UTC),
        made_with=made_with,
        kind="encoded",
    )
    return folder


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """`world(family)`: folders of a teacher and of features made with it."""
    made: dict[str, tuple[Path, Path]] = {}

    def of(family: str) -> tuple[Path, Path]:
        if family not in made:
            folder = tmp_path_factory.mktemp(family)
            teacher = save_teacher(folder / "teacher", family)
            made[family] = teacher, write_features(folder / "features", load_pipeline(teacher))
        return made[family]

    return of


def settings(world, family: str, **changes) -> DistillConfig:
    teacher, features = world(family)
    train = TrainConfig(**TRAIN | changes.pop("train", {}))
    return DistillConfig(**{"teacher": str(teacher), "features": str(features), "train": train} | changes)


def derivative(**changes) -> dict:
    """A training on the MeanFlow identity."""
    return {"mean_velocity": MeanVelocityTraining(target="derivative", derivative="finite_difference", **changes)}


def logged(folder: Path, key: str) -> list[float]:
    return [json.loads(line)[key] for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def distilled(world, tmp_path_factory):
    """`distilled(family)`: a CFG-distilled student."""
    made: dict[str, Path] = {}

    def of(family: str) -> Path:
        if family not in made:
            made[family] = tmp_path_factory.mktemp(family) / "cfg"
            distill(settings(world, family, sample_steps=3), made[family])
        return made[family]

    return of


# the mathematics


def test_guidance_is_distilled_by_the_two_pass_formula():
    """Toy velocities: the text's number with the prompt, 1 without; the student says 3 whatever g."""

    class Toy(Velocity):
        def __init__(self, answer):
            torch.nn.Module.__init__(self)
            self.answer = answer

        def forward(self, x, t, text, r=None, g=None):
            return self.answer(x, text, g)

    x, t, g = torch.zeros(2, 1, 1, 1, 1), torch.tensor([0.3, 0.6]), torch.tensor([1.0, 4.0])
    teacher = Toy(lambda x, text, g: x + text["number"].view(-1, 1, 1, 1, 1))
    text, empty = {"number": torch.tensor([2.0, 5.0])}, {"number": torch.tensor([1.0])}
    # v_g: 1 + 1 (2 - 1) = 2 and 1 + 4 (5 - 1) = 17
    loss = cfg_loss(Toy(lambda x, text, g: x + 3.0), teacher, x, t, g, text, empty)
    assert float(loss) == pytest.approx(((3 - 2) ** 2 + (3 - 17) ** 2) / 2)
    exact = Toy(lambda x, text, g: x + (1 + g * (text["number"] - 1)).view(-1, 1, 1, 1, 1))
    assert float(cfg_loss(exact, teacher, x, t, g, text, empty)) == 0


@pytest.mark.parametrize("family", FLOW)
@pytest.mark.parametrize("method", ["cfg", "mean_velocity"])
def test_a_student_starts_equal_to_its_teacher(world, distilled, family, method):
    config = settings(world, family, method=method)
    if method == "mean_velocity":
        config.teacher = str(distilled(family))
    loaded = load_pipeline(config.teacher, dtype="float32")
    student, teacher = velocity_of(student_of(loaded, config)), velocity_of(loaded)
    assert student.embeds("g") and student.embeds("r") == (method == "mean_velocity")
    assert student.transformer is not teacher.transformer
    text = batch([{name: t[0] for name, t in encode_texts(loaded, CAPTIONS[:1]).items()}], "cpu", torch.float32)
    x = torch.randn(1, loaded.pipe.transformer.config.out_channels, 2, 4, 4)
    t, r, g = torch.tensor([0.7]), torch.tensor([0.2]), torch.tensor([3.0])
    with torch.no_grad():
        expected = teacher(x, t, text, g=g if teacher.embeds("g") else None)
        assert torch.equal(student(x, t, text, r=r, g=g), expected)


def test_a_finished_one_says_so_before_a_model_is_loaded(world, distilled, monkeypatch, caplog):
    """And not of other settings, or of files that have changed since."""

    class LoadedAModel(Exception):
        pass

    def load(*args, **kwargs):
        raise LoadedAModel

    folder, same = distilled("hunyuan_video"), settings(world, "hunyuan_video", sample_steps=3)
    before, features = contents(folder), Path(same.features) / "run.json"
    monkeypatch.setattr(module, "load_pipeline", load)
    caplog.set_level(logging.INFO)
    assert distill(same, folder) and contents(folder) == before
    assert "already finished" in caplog.text
    for changes in ({"seed": 1}, {"guidance_range": [1.0, 8.0]}, {"data": "clips", "features": None}):
        with pytest.raises(LoadedAModel):
            distill(replace(same, **changes), folder)
    recorded = features.read_text()
    for file, text in ((features, recorded + " "), (folder / "README.md", "another card")):
        own = file.read_text()
        file.write_text(text)
        with pytest.raises(LoadedAModel):
            distill(same, folder)
        file.write_text(own)
    features.unlink()  # of which the training says more than that there is no such file
    with pytest.raises(LoadedAModel):
        distill(same, folder)
    features.write_text(recorded)


def test_a_few_step_teacher_keeps_its_r_when_guidance_is_distilled(world, tmp_path):
    distill(settings(world, "wan", method="mean_velocity"), tmp_path / "few")
    loaded = load_pipeline(tmp_path / "few", dtype="float32")
    teacher = velocity_of(loaded)
    student = velocity_of(student_of(loaded, settings(world, "wan", teacher=str(tmp_path / "few"))))
    assert student.conditioning.config.embeds == ("r", "g")
    text = batch([{name: t[0] for name, t in encode_texts(loaded, CAPTIONS[:1]).items()}], "cpu", torch.float32)
    x = torch.randn(1, loaded.pipe.transformer.config.out_channels, 2, 4, 4)
    t, r, g = torch.tensor([0.7]), torch.tensor([0.2]), torch.tensor([3.0])
    with torch.no_grad():
        assert torch.equal(student(x, t, text, r=r, g=g), teacher(x, t, text, r=r))
        assert not torch.equal(teacher(x, t, text, r=r), teacher(x, t, text))


# behaviour


@pytest.mark.parametrize("family", FLOW)
def test_a_cfg_student_generates_in_one_pass_with_any_scale(distilled, family):
    loaded = load_pipeline(distilled(family))
    made = [generate(loaded, ["a red circle"], GenerateConfig(guidance=g), [0]) for g in (None, 1.0, 7.0)]
    assert [m.guidance for m in made] == [3.0, 1.0, 7.0]
    assert [m.passes for m in made] == [3, 3, 3]
    assert (made[1].frames != made[2].frames).any()


def test_training_brings_a_student_towards_guidance(world, tmp_path):
    train = {"steps": 60, "log_every": 60, "evaluate_every": 59, "batch_size": 4, "learning_rate": 3e-3}
    distill(settings(world, "hunyuan_video", train=train), tmp_path / "student")
    lines = [json.loads(line) for line in (tmp_path / "student" / "metrics.jsonl").read_text().splitlines()]
    before, after = tmp_path / "one", lines[-1]
    distill(settings(world, "hunyuan_video", train=train | {"steps": 1, "evaluate_every": 1}), before)
    first = json.loads((before / "metrics.jsonl").read_text().splitlines()[0])
    assert lines[0]["evaluation"] < 0.8 * first["evaluation"], (first, after)


@pytest.mark.parametrize("family", FLOW)
def test_a_few_step_student_of_a_cfg_student(world, distilled, family, tmp_path):
    cfg = distilled(family)
    config = settings(world, family, method="mean_velocity", teacher=str(cfg), sample_steps=2)
    weights = sha256_file(cfg / "transformer" / "diffusion_pytorch_model.safetensors")
    distill(config, tmp_path / "student")
    loaded = load_pipeline(tmp_path / "student")
    assert loaded.conditioning.config.embeds == ("r", "g")
    assert (loaded.conditioning.config.steps, loaded.conditioning.config.restrict) == (2, 0.2)
    made = generate(loaded, ["a red circle"], GenerateConfig(), [0])
    assert (made.steps, made.passes, made.guidance) == (2, 2, 3.0)
    assert sha256_file(cfg / "transformer" / "diffusion_pytorch_model.safetensors") == weights
    run = json.loads((tmp_path / "student" / "run.json").read_text())
    assert run["parents"]["teacher"] == sha256_file(cfg / "run.json")
    assert (tmp_path / "student" / "samples" / "00000002.png").exists()


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("derivative", ["exact", "finite_difference"])
def test_training_on_the_derivative_says_first_what_it_trains_on(
    world, distilled, derivative, precision, tmp_path, caplog
):
    own = MeanVelocityTraining(target="derivative", derivative=derivative, tangent_warmup=1, restrict=None)
    teacher = str(distilled("hunyuan_video"))
    config = settings(world, "hunyuan_video", method="mean_velocity", teacher=teacher, mean_velocity=own)
    config.sample_steps, config.shift, config.train.precision = 10, 5.0, precision
    with caplog.at_level(logging.INFO, "vidaccel"):
        distill(config, tmp_path / "student")
    assert "10 steps, shift 5: widest interval 0.36; R starts at 0.36" in caplog.text
    assert "cosine of the two" in caplog.text
    assert load_pipeline(tmp_path / "student").conditioning.config.restrict == pytest.approx(5 / 14, abs=1e-6)


@pytest.mark.parametrize(
    ("changes", "shift"),
    [
        ({}, 3.0),
        ({"times": "uniform"}, 1.0),
        ({"train_shift": 2.0}, 2.0),
        ({"times": "uniform", "train_shift": 4.0}, 4.0),
    ],
)
def test_the_times_that_are_trained_on(changes, shift):
    nothing = dict.fromkeys(("teacher", "student", "data", "empty"))
    assert Distillation(DistillConfig(**changes), **nothing, shift=3.0).train_shift == shift


def test_a_training_goes_on_from_an_earlier_student(world, distilled, tmp_path):
    first = distilled("hunyuan_video")
    distill(settings(world, "hunyuan_video", start=str(first), train={"steps": 0}), tmp_path / "same", "cpu")
    for file in ("transformer/diffusion_pytorch_model.safetensors", "conditioning/model.safetensors"):
        assert sha256_file(tmp_path / "same" / file) == sha256_file(first / file)
    distill(settings(world, "hunyuan_video", start=str(first)), tmp_path / "further", "cpu")
    run = json.loads((tmp_path / "further" / "run.json").read_text())
    assert run["parents"]["start"] == sha256_file(first / "run.json")
    assert run["parents"]["features"] == sha256_file(world("hunyuan_video")[1] / "run.json")
    assert logged(tmp_path / "further", "loss") != logged(first, "loss")  # the same batches, another model
    with pytest.raises(UserError, match="other settings.*start"):
        distill(settings(world, "hunyuan_video"), tmp_path / "further", "cpu")


@pytest.mark.parametrize("family", FLOW)
def test_sheets_have_the_size_of_what_is_learnt_from(world, family, tmp_path, monkeypatch):
    """Not that of the model, which may not fit: one frame of 64 x 32 pixels, or what 8 x 4 latent ones decode to."""
    teacher, _ = world(family)
    loaded, sizes = load_pipeline(teacher), set()
    features = write_features(tmp_path / "features", loaded, size=(1, 8, 4))
    scale = getattr(loaded.pipe, loaded.family.compression_attributes[1])

    def look(videos, file, labels):
        assert (tmp_path / "student" / "checkpoints" / "step-00000002" / "state.json").exists()
        sizes.update(video.shape for video in videos)

    monkeypatch.setattr(module, "contact_sheet", look)
    distill(settings(world, family, features=str(features)), tmp_path / "student")
    assert sizes == {(1, 8 * scale, 4 * scale, 3)}


def test_a_sheet_that_fails_costs_a_warning(world, tmp_path, monkeypatch, caplog):
    def fail(*args, **kwargs):
        raise MemoryError("no room for a sheet")

    monkeypatch.setattr(module, "contact_sheet", fail)
    distill(settings(world, "wan", train={"sample_every": 1}), tmp_path / "student")
    assert "the samples of step 1 failed (failure 1); training goes on: no room for a sheet" in caplog.text
    assert "the samples of step 2 failed (failure 2)" in caplog.text
    assert load_pipeline(tmp_path / "student").family.name == "wan"


def test_clips_are_brought_to_the_size_that_is_asked_for(world, tmp_path):
    frames = np.random.default_rng(0).integers(0, 256, (2, 40, 48, 64, 3), dtype=np.uint8)
    write_clips(tmp_path / "clips", zip(frames, CAPTIONS, strict=False), fps=16)
    teacher, _ = world("wan")
    config = DistillConfig(teacher=str(teacher), data=str(tmp_path / "clips"), num_frames=9, height=16, width=32, fps=4)
    loaded = load_pipeline(teacher)
    data, provenance = open_data(loaded, config)
    assert data.source[0][0].shape == (3, 9, 16, 32)
    assert (provenance["size"], provenance["fps"]) == ([9, 16, 32], 4)
    assert video_size(loaded, data[0][0]["latent"].shape) == {"num_frames": 9, "height": 16, "width": 32}
    with pytest.raises(UserError, match="num_frames=9 is not possible") as caught:
        DistillConfig(features="there", num_frames=9)
    assert "goes without features" in caught.value.hint


def test_a_start_is_a_student_of_this_teacher_by_this_method(world, distilled, tmp_path):
    cfg = distilled("hunyuan_video")
    others = [
        settings(world, "hunyuan_video", start=str(world("hunyuan_video")[0])),  # the teacher itself
        settings(world, "wan", start=str(cfg)),
        settings(world, "hunyuan_video", method="mean_velocity", start=str(cfg)),
    ]
    for i, config in enumerate(others):
        with pytest.raises(UserError, match=f"{config.start} is no student of .* by method={config.method}"):
            distill(config, tmp_path / str(i), "cpu")


def test_a_second_run_trains_nothing_and_another_setting_is_refused(world, distilled, tmp_path):
    own = {"method": "mean_velocity", "teacher": str(distilled("wan"))}
    distill(settings(world, "wan", **own), tmp_path / "student")
    before = contents(tmp_path / "student")
    distill(settings(world, "wan", **own), tmp_path / "student")
    assert contents(tmp_path / "student") == before  # what was made of it knows it by its run.json
    changed = settings(world, "wan", **own, mean_velocity=MeanVelocityTraining(restrict=0.4))
    with pytest.raises(UserError, match="restrict was 0.2, now 0.4"):
        distill(changed, tmp_path / "student")


@pytest.mark.parametrize("target", ["rollout", "derivative"])
def test_a_killed_distillation_ends_as_one_that_was_not(world, distilled, target, tmp_path, monkeypatch):
    """Killed in the middle of a step, and once more when everything is trained and nothing saved."""
    own = MeanVelocityTraining(target=target, restrict=0.2, restrict_end=0.4, tangent_warmup=3)
    train = {"steps": 4, "save_every": 1, "ema_decay": 0.5}
    teacher = str(distilled("wan"))
    config = settings(world, "wan", method="mean_velocity", teacher=teacher, mean_velocity=own, train=train)
    distill(config, tmp_path / "straight")
    plain, drawn = Distillation.draw, []

    def stop(*args):
        raise KeyboardInterrupt

    def interrupted(task, index, generator):
        drawn.append(index)
        if index == 2:
            stop()
        return plain(task, index, generator)

    monkeypatch.setattr(Distillation, "draw", interrupted)
    with pytest.raises(KeyboardInterrupt):
        distill(config, tmp_path / "killed")
    monkeypatch.undo()
    monkeypatch.setattr(module, "_save", stop)
    with pytest.raises(KeyboardInterrupt):
        distill(config, tmp_path / "killed")
    assert drawn[-1] == 2 and not (tmp_path / "killed" / "run.json").exists()
    monkeypatch.undo()
    distill(config, tmp_path / "killed")
    assert outcome(tmp_path / "killed") == outcome(tmp_path / "straight")
    for name in ("transformer/diffusion_pytorch_model.safetensors", "conditioning/model.safetensors"):
        assert sha256_file(tmp_path / "killed" / name) == sha256_file(tmp_path / "straight" / name)


@pytest.mark.parametrize("merged", [True, False])
def test_low_rank_adapters(world, merged, tmp_path):
    config = settings(world, "hunyuan_video", train={"lora_rank": 2}, merge_lora=merged)
    distill(config, tmp_path / "student")
    assert (tmp_path / "student" / "lora").exists() != merged
    loaded = load_pipeline(tmp_path / "student")
    made = generate(loaded, ["a red circle"], GenerateConfig(steps=2), [0])
    plain = generate(load_pipeline(world("hunyuan_video")[0]), ["a red circle"], GenerateConfig(steps=2), [0])
    assert (made.passes, plain.passes) == (2, 4)


def test_from_the_command_line(world, tmp_path):
    teacher, features = world("wan")
    small = [f"teacher={teacher}", f"features={features}", *(f"train.{key}={value}" for key, value in TRAIN.items())]
    result = CliRunner().invoke(app, ["distill", "--conf", "sprites/cfg", "-o", str(tmp_path / "cfg"), *small])
    assert result.exit_code == 0, result.output
    assert f"vidaccel generate PROMPT model={tmp_path / 'cfg'}" in result.output
    loaded = load_pipeline(tmp_path / "cfg")
    assert loaded.default("steps") == 50 and loaded.conditioning.config.guidance_range == (1.0, 4.0)


def test_two_processes_train_what_one_does(world, distilled, tmp_path):
    """Sharded, with half of each batch: the same losses and gradients, and a student in one piece.

    The first step agrees to rounding. Adam then turns rounding errors of gradients near zero into whole steps.
    """
    own = {"method": "mean_velocity", "teacher": str(distilled("wan")), "times": "uniform"}
    train = TRAIN | {"steps": 5, "learning_rate": 1e-5}
    distill(settings(world, "wan", **own, train=train | {"accumulate": 2}), tmp_path / "one")
    words = [f"teacher={own['teacher']}", f"features={world('wan')[1]}", "train.optimizer=adamw"]
    words += ["guidance_range=[1,8]", "mean_velocity.restrict=0.2", "mean_velocity.substeps=2"]
    words += [f"train.{key}={value}" for key, value in train.items()]
    program("distill", "--conf", "sprites/restricted_meanflow", "-o", str(tmp_path / "two"), *words, count=2)
    for key in ("loss", "grad_norm"):
        one, two = (logged(tmp_path / name, key) for name in ("one", "two"))
        assert two[0] == pytest.approx(one[0], rel=1e-5)
        assert two == pytest.approx(one, rel=1e-3)
    one, two = (load_pipeline(tmp_path / name).pipe.transformer.state_dict() for name in ("one", "two"))
    for name, weight in one.items():
        torch.testing.assert_close(two[name], weight, rtol=1e-3, atol=1e-3)
    assert load_pipeline(tmp_path / "two").conditioning.config.embeds == ("r", "g")
    saved = json.loads((tmp_path / "two" / "transformer" / "config.json").read_text())
    assert saved["_class_name"] == "WanTransformer3DModel"


def test_a_derivative_and_adapters_in_two_processes(world, distilled, tmp_path):
    """Which take the difference unless told otherwise; the adapters alone are gathered and saved."""
    words = {"method": "mean_velocity", "teacher": str(distilled("wan")), "times": "uniform", "merge_lora": False}
    train = TRAIN | {"learning_rate": 1e-5, "lora_rank": 2}
    alone = settings(world, "wan", **words, **derivative(), train=train | {"accumulate": 2})
    distill(alone, tmp_path / "one")
    given = [f"{key}={value}" for key, value in words.items()] + [
        f"train.{key}={value}" for key, value in train.items()
    ]
    given += [f"features={alone.features}", "mean_velocity.target=derivative"]
    Path(tmp_path / "own.yaml").write_text("{}")
    own = str(tmp_path / "own.yaml")
    printed = program("distill", "--conf", own, "-o", str(tmp_path / "two"), *given, count=2)
    assert printed.count("the student; `vidaccel generate") == 1
    assert json.loads((tmp_path / "two" / "run.json").read_text())["config"]["mean_velocity"]["derivative"] == (
        "finite_difference"
    )
    one, two = (logged(tmp_path / name, "loss") for name in ("one", "two"))
    assert two == pytest.approx(one, rel=1e-3)
    one, two = (load_file(tmp_path / name / "lora" / "pytorch_lora_weights.safetensors") for name in ("one", "two"))
    torch.testing.assert_close(two, one, rtol=1e-2, atol=2e-5)
    assert generate(load_pipeline(tmp_path / "two"), ["a red circle"], GenerateConfig(steps=2), [0]).passes == 2


@pytest.mark.parametrize("target", ["rollout", "derivative"])
@pytest.mark.parametrize(
    ("family", "option", "added"),
    [("hunyuan_video", "guidance_embeds", ("r",)), ("hunyuan_video_15", "use_meanflow", None)],
)
def test_what_a_model_embeds_itself_is_not_added(tmp_path, family, option, added, target):
    """A student of a model that knows r, or g, is saved without an embedding of it, and told it all the same."""
    teacher = load_pipeline(save_teacher(tmp_path / "teacher", family, **{option: True}))
    features = write_features(tmp_path / "features", teacher)
    own = MeanVelocityTraining(target=target, derivative="finite_difference")
    places = {"teacher": teacher.source, "features": str(features), "train": TrainConfig(**TRAIN)}
    distill(DistillConfig(method="mean_velocity", mean_velocity=own, sample_steps=2, **places), tmp_path / "student")
    loaded = load_pipeline(tmp_path / "student")
    assert (loaded.conditioning.config.embeds if loaded.conditioning else None) == added
    assert generate(loaded, ["a red circle"], GenerateConfig(), [0]).passes == 2
    student = velocity_of(loaded)
    assert student.embeds("r")
    text = batch([{name: t[0] for name, t in encode_texts(loaded, CAPTIONS[:1]).items()}], "cpu", torch.float32)
    x, t = torch.randn(1, loaded.pipe.transformer.config.out_channels, 2, 4, 4), torch.tensor([0.7])
    with torch.no_grad():
        g = torch.tensor([3.0]) if student.embeds("g") else None
        far, near = (student(x, t, text, r=torch.tensor([r]), g=g) for r in (0.2, 0.6))
    assert not torch.equal(far, near)


# faults


def test_a_plain_teacher_is_warned_about(world, tmp_path, caplog):
    distill(settings(world, "wan", method="mean_velocity"), tmp_path / "student")
    assert "is not CFG-distilled: the student learns its velocities without guidance" in caplog.text
    assert load_pipeline(tmp_path / "student").conditioning.config.embeds == ("r",)


def test_guidance_is_not_distilled_twice(world, distilled, tmp_path):
    with pytest.raises(UserError, match="guidance distilled into one pass already"):
        distill(settings(world, "wan", teacher=str(distilled("wan"))), tmp_path / "student")


def test_a_run_does_not_go_on_with_another_teacher_of_the_hub(world, tmp_path, monkeypatch):
    """Of whose files there are no hashes here."""
    plain = module.load_pipeline
    monkeypatch.setattr(module, "_save", lambda *_: None)  # which would ask the hub

    def distil_from(name):
        def load(*args, **options):
            return replace(plain(*args, **options), source=name, hashes={})

        monkeypatch.setattr(module, "load_pipeline", load)
        distill(settings(world, "wan"), tmp_path / "student")

    distil_from("one/wan")
    distil_from("one/wan")
    with pytest.raises(UserError, match="settings.teacher was 'one/wan', now 'two/wan'"):
        distil_from("two/wan")
    monkeypatch.setattr(module, "load_pipeline", lambda *args, **kw: replace(plain(*args, **kw), source="one/wan"))
    distill(settings(world, "wan"), tmp_path / "student")  # begun when a hub id was known by itself


def test_features_of_another_model_are_refused(world, tmp_path):
    other = world("hunyuan_video")[1]
    with pytest.raises(UserError, match="made with another model"):
        distill(settings(world, "wan", features=str(other)), tmp_path / "student")


@pytest.mark.parametrize(("family", "other"), [("hunyuan_video", "wan"), ("wan", "hunyuan_video")])
def test_features_of_another_family_are_refused_where_no_hash_tells(world, family, other, monkeypatch, tmp_path):
    """As with models from the hub."""
    plain = load_pipeline
    monkeypatch.setattr(module, "load_pipeline", lambda *args, **kwargs: replace(plain(*args, **kwargs), hashes={}))
    with pytest.raises(UserError, match="another model: pooled, prompt_mask do not fit"):
        distill(settings(world, family, features=str(world(other)[1])), tmp_path / "student")
    assert not (tmp_path / "student" / "run.json").exists()


@pytest.mark.parametrize("restrict", [0.0, -0.2, 1.5, float("nan")])
def test_a_restrict_factor_outside_its_range(restrict):
    with pytest.raises(UserError, match="must be in"):
        MeanVelocityTraining(restrict=restrict)


def test_clips_that_none_can_be_read_of(world, tmp_path):
    (tmp_path / "clips").mkdir()
    (tmp_path / "clips" / "captions.jsonl").write_text('{"file": "gone.mp4", "caption": "a red circle"}\n')
    config = settings(world, "wan", features=None, data=str(tmp_path / "clips"))
    with pytest.raises(UserError, match="1 of 1 clips in .* cannot be used: .*gone.mp4"):
        distill(config, tmp_path / "student")
    assert not (tmp_path / "student" / "run.json").exists()


def test_an_exact_derivative_that_does_not_fit_is_refused(world, distilled, tmp_path, monkeypatch):
    monkeypatch.setattr(derivative_module.jvp, "missing_memory", lambda *_: (3 * 2**30, 2**30))
    own = {"method": "mean_velocity", "teacher": str(distilled("wan"))} | derivative()
    own["mean_velocity"].derivative = "exact"
    with pytest.raises(UserError, match="need 3.0 GiB for attention, and 1.0 GiB are free") as error:
        distill(settings(world, "wan", **own), tmp_path / "student")
    assert "mean_velocity.derivative=finite_difference" in error.value.hint


@pytest.mark.parametrize("velocity", ["teacher", "data"])
def test_the_velocity_and_the_share_of_the_derivative_that_are_trained_on(
    world, distilled, tmp_path, velocity, monkeypatch
):
    """Of the data it is eps - x_0, in the check before training as well; the share grows over the warm-up."""
    own = {"method": "mean_velocity", "teacher": str(distilled("wan"))}
    own |= derivative(velocity=velocity, tangent_warmup=4)
    plain, drawn, followed, shares = Distillation.draw, [], [], []

    def draw(task, index, generator):
        drawn.append(plain(task, index, generator))
        return drawn[-1]

    def target(student, v, x, t, r, config, warmup, span):
        followed.append(v)
        shares.append(warmup)
        return meanflow_target(student, v, x, t, r, config, warmup, span)

    def check(student, x, t, r, v, *rest):
        followed.append(v)

    meanflow_target = derivative_module.derivative_target
    monkeypatch.setattr(Distillation, "draw", draw)
    monkeypatch.setattr(derivative_module, "derivative_target", target)
    monkeypatch.setattr(derivative_module.jvp, "check_derivatives", check)
    distill(
        settings(world, "wan", **own, train={"steps": 3, "accumulate": 2, "evaluate_every": 100}), tmp_path / "student"
    )
    of_data = [torch.equal(v, eps - x_0) for v, (x_0, eps, *_) in zip(followed, drawn, strict=True)]
    assert of_data == [velocity == "data"] * len(drawn) and len(drawn) >= 7
    assert shares[:6] == [0.0, 0.125, 0.25, 0.375, 0.5, 0.625]


@pytest.mark.parametrize("on_damage", ["stop", "skip"])
def test_a_damaged_shard_stops_a_training_or_is_left_out(world, tmp_path, on_damage, caplog):
    teacher = load_pipeline(world("wan")[0])
    features = write_features(tmp_path / "features", teacher, per_shard=2)
    last = features / "shard-00001.tar"
    last.write_bytes(last.read_bytes()[:-1] + b"x")
    config = settings(world, "wan", features=str(features), on_damage=on_damage)
    if on_damage == "stop":
        with pytest.raises(UserError, match="damaged or missing: shard-00001.tar"):
            distill(config, tmp_path / "student")
        assert not (tmp_path / "student" / "run.json").exists()
    else:
        distill(config, tmp_path / "student")
        assert "shard-00001.tar, damaged or missing, with its 1 samples" in caplog.text
        assert load_pipeline(tmp_path / "student")


def test_data_that_is_not_finite_stops_after_ten_steps(world, tmp_path):
    """One sample of three is infinite: with three a batch, no step is finite."""
    teacher = load_pipeline(world("wan")[0])
    features = write_features(tmp_path / "features", teacher, spoil=float("inf"))
    config = settings(world, "wan", features=str(features), train={"steps": 20, "batch_size": 3})
    with pytest.raises(TrainingFailed, match="10 steps in a row"):
        distill(config, tmp_path / "student")
    assert not (tmp_path / "student" / "run.json").exists()


def test_now_and_then_a_bad_sample_is_skipped_and_counted(world, tmp_path):
    teacher = load_pipeline(world("wan")[0])
    features = write_features(tmp_path / "features", teacher, spoil=float("inf"))
    distill(settings(world, "wan", features=str(features), train={"steps": 6, "batch_size": 1}), tmp_path / "student")
    last = json.loads((tmp_path / "student" / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["skipped"] == 2
    assert load_pipeline(tmp_path / "student")
