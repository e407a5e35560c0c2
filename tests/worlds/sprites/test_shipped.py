"""The models inside the package: whole, small enough, and as good as their cards say they are."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from torch.utils.flop_counter import FlopCounterMode
from typer.testing import CliRunner

from vidaccel.artefacts import RUN_FILE, read_run, sha256_file, verify_files
from vidaccel.bench.models import Models
from vidaccel.bench.reports.plots import kind_of
from vidaccel.cache.attach import attach
from vidaccel.cache.schedule import read_schedules
from vidaccel.cli.main import app
from vidaccel.config.benchmark import BenchmarkConfig
from vidaccel.config.generate import GenerateConfig
from vidaccel.config.loader import load
from vidaccel.forecasters.learned import Predictor
from vidaccel.forecasters.multistep import Multistep
from vidaccel.models.decoder import decode_whole
from vidaccel.models.files import read_model
from vidaccel.models.loading import load_pipeline
from vidaccel.models.weight_hashes import student_hash
from vidaccel.sampling import generate, predicted_steps
from vidaccel.worlds.sprites import SHIPPED
from vidaccel.worlds.sprites.parse import parse
from vidaccel.worlds.sprites.score import score_clip

TEACHER = SHIPPED / "teacher"
RESULTS = Path(__file__).parents[3] / "studies" / "results" / "sprites.json"


@pytest.fixture(scope="module")
def loaded():
    return load_pipeline("sprites/teacher")


def test_all_shipped_weights_fit_and_all_but_what_is_small_are_half_precision():
    """A student's embeddings and its predictor are stored as they were trained."""
    assert sum(file.stat().st_size for file in SHIPPED.rglob("*") if file.is_file()) < 48e6
    for file in SHIPPED.rglob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            dtypes = {tensors.get_tensor(name).dtype for name in tensors.keys()}  # noqa: SIM118
        small = file.parent.name in ("conditioning", "predictor")
        assert dtypes <= ({torch.float32} if small else {torch.float16, torch.bfloat16})


def test_the_card_shows_the_measured_scores():
    card = (TEACHER / "README.md").read_text()
    for name, score in json.loads((TEACHER / "score.json").read_text()).items():
        interval = f"{score['low']:.1f} to {score['high']:.1f}"
        assert f"| {name.replace('_', ' ')} | {score['mean']:.1f} | {interval} |" in card


def test_the_pages_show_the_measured_scores():
    root = Path(__file__).parents[3]
    text = " ".join(" ".join(page.read_text().split()) for page in (root / "README.md", *root.glob("docs/*.md")))
    score = json.loads((TEACHER / "score.json").read_text())
    total = score["total"]
    prompts = re.search(r"score --prompts (\d+)`", (TEACHER / "README.md").read_text())[1]
    interval = f"{total['low']:.1f} to {total['high']:.1f}"
    assert f"{total['mean']:.1f} of 100 ({interval}, {prompts} held-out prompts)" in text
    assert f"{score['shape']['mean']:.0f} in 100 shapes are right" in text


@pytest.mark.parametrize("name", ["student", "predictor"])
def test_the_cards_quote_the_shipped_results(name):
    """Which are not theirs where studies/results says that they are of the weights before."""
    card = (SHIPPED / name / "README.md").read_text()
    if "of the weights that shipped before" in (RESULTS.parent / "README.md").read_text():
        assert "## How it scores" not in card
        return
    rows = [row for row in json.loads(RESULTS.read_text())["runs"] if row["total"] is not None]
    for row in rows:
        if kind_of(row).startswith("sampler" if name == "student" else "with a predictor"):
            (line,) = (line for line in card.splitlines() if line.startswith(f"| {row['method']} |"))
            assert f"| {row['total']:.1f} |" in line
    assert card.count("| cfg-50 |") == (name == "student")


def test_the_student_belongs_to_the_teacher_and_the_predictor_to_the_student():
    student, teacher = read_model("sprites/student"), read_model("sprites/teacher")
    own = {"transformer/diffusion_pytorch_model.safetensors", "conditioning/model.safetensors"}
    assert dict(student.hashes.items() ^ teacher.hashes.items()).keys() == own
    runs = {name: read_run(SHIPPED / name, "model/1") for name in ("teacher", "student")}
    for name, run in runs.items():
        verify_files(SHIPPED / name, run)
    assert runs["student"]["pipeline"] == "sprites/teacher"
    assert runs["student"]["parents"]["pipeline"] == sha256_file(TEACHER / RUN_FILE)
    predictor = Predictor.from_pretrained(SHIPPED / "predictor")
    assert predictor.config.student == student_hash(load_pipeline("sprites/student"))
    transformer = load_pipeline("sprites/student").pipe.transformer
    sizes = [sum(p.numel() for p in module.parameters()) for module in (predictor, transformer)]
    assert sizes[0] < 0.04 * sizes[1]


@pytest.mark.parametrize(
    ("conf", "model", "steps", "passes"),
    [("teacher", "teacher", 50, 100), ("cfg", "student", 50, 50), ("student", "student", 8, 8)],
)
def test_a_configuration_a_model(conf, model, steps, passes, monkeypatch):
    """How often the transformer is called; what it makes of that is tried below, and need not be computed here."""
    config = load("generate", GenerateConfig, conf)
    shipped = load_pipeline(config.model)
    assert Path(shipped.source) == SHIPPED / model
    nothing = lambda self, hidden_states, **given: (torch.zeros_like(hidden_states),)  # noqa: E731
    monkeypatch.setattr(type(shipped.pipe.transformer), "forward", nothing)
    made = generate(shipped, ["a red circle moving right on black"], config, [0])
    assert (made.steps, made.passes, made.predicted) == (steps, passes, 0)
    assert made.frames.shape == (1, 17, 64, 64, 3)


def test_the_default_is_the_student_with_its_predictor():
    config = load("generate", GenerateConfig, "default")
    shipped = load_pipeline(config.model)
    assert Path(shipped.source) == SHIPPED / "student"
    with predicted_steps(shipped, config) as attachment:
        made = generate(shipped, ["a red circle moving right on black"], config, [0], attachment)
    assert (made.passes, made.passes - made.predicted) == (8, config.budget)


def test_json_names_the_weights_of_student_and_predictor(tmp_path):
    command = ["generate", "a red circle moving right on black", "-o", str(tmp_path / "out.mp4"), "--json"]
    made = json.loads(CliRunner().invoke(app, command).stdout)
    for name, file in (
        ("conditioning/model.safetensors", "student/conditioning/model.safetensors"),
        ("predictor/model.safetensors", "predictor/model.safetensors"),
    ):
        assert made["hashes"][name] == sha256_file(SHIPPED / file)


def test_the_scalars_are_the_students_over_its_whole_range_of_guidance():
    folder, student = SHIPPED / "scalars", load_pipeline("sprites/student")
    verify_files(folder, read_run(folder, "multistep/1"))
    made = Multistep.from_pretrained(folder)
    made.check_fits(student.family.name, {student_hash(student)})
    assert made.config.guidance_range == student.conditioning.config.guidance_range and not made.config.two_pass
    known = {(each.steps, *each.full_steps): each for each in made.config.lists}
    schedules = read_schedules(folder / "schedule.json")
    assert {(each.steps, *each.full_steps) for each in schedules} == known.keys()
    assert {(8, budget) for budget in (2, 3, 4)} <= {(each.steps, each.budget) for each in schedules}
    compared = read_run(folder, "multistep/1")["compared"]
    assert {(each["steps"], *each["full_steps"]) for each in compared} == known.keys()
    card = (folder / "README.md").read_text()
    for each in compared:
        assert each["of_reuse"] < 1
        listed = f"| {' '.join(map(str, each['full_steps']))} of {each['steps']} |"
        assert f"{listed} {each['error']:.3f} | {each['of_reuse']:.2f} |" in card


def test_the_scalars_serve_the_student_on_the_command_line_and_no_other(tmp_path):
    words = ["generate", "a red circle moving right on black", "predictor=sprites/scalars", "steps=8", "--json"]
    words += ["-o", str(tmp_path / "out.mp4")]
    result = CliRunner().invoke(app, [*words, "budget=4"])
    assert result.exit_code == 0, result.output
    made = json.loads(result.stdout)
    assert made["passes"] == {"full": 4, "predicted": 4}
    assert made["hashes"]["predictor/config.json"] == sha256_file(SHIPPED / "scalars" / "config.json")
    refused = CliRunner().invoke(app, [*words, "budget=4", "model=sprites/teacher"])
    assert refused.exit_code == 2 and "fitted to the model sprites/student" in refused.stderr


def test_the_scalars_are_attached_as_a_row_of_the_benchmark_is():
    config, prompt = load("benchmark", BenchmarkConfig, "sprites"), "a red circle moving right on black"
    rows = {name: config.wanted()[name] for name in ("scalars-4-of-8", "scalars-3-of-8", "scalars-2-of-8")}
    models, student = Models(config, "cpu"), load_pipeline("sprites/student")
    whole = generate(student, [prompt], GenerateConfig(steps=8), [0]).frames
    for budget, row in zip((4, 3, 2), rows.values(), strict=True):
        with models.running(row, {}) as loaded:
            served = generate(loaded, [prompt], GenerateConfig(steps=8), [0]).frames
        with attach(student, predictor="sprites/scalars", steps=8, budget=budget) as attachment:
            attached = generate(student, [prompt], GenerateConfig(steps=8), [0], attachment)
        assert (attached.passes, attached.predicted) == (8, 8 - budget)
        assert (served == attached.frames).all() and (served != whole).any()


@pytest.mark.parametrize("name", ["reuse", "taylor", "linear"])
def test_a_forecaster_without_training_has_a_list_for_each_row_that_names_it(name):
    folder, config = SHIPPED / name, load("benchmark", BenchmarkConfig, "sprites")
    run = read_run(folder, "schedules/1")
    verify_files(folder, run)
    student = student_hash(load_pipeline("sprites/student"))
    assert (run["forecaster"], run["student"]) == (name, student)
    rows = [row for row in config.methods.values() if row.predictor == f"sprites/{name}"]
    assert {row.on_skipped for row in rows} == {name}
    wanted = {(20, 8), (20, 6), (20, 5), (20, 4), (20, 3), (8, 4), (8, 3), (8, 2), (6, 3), (6, 2)}
    assert wanted <= {(row.steps, row.budget) for row in rows}
    models = Models(config, "cpu")
    found = [models.searched(row) for row in rows]
    assert [(each.steps, each.budget) for each in found] == [(row.steps, row.budget) for row in rows]
    card = (folder / "README.md").read_text()
    for each in found:
        assert f"| {' '.join(map(str, each.full_steps))} of {each.steps} | {each.expected_error:.3f} |" in card


def test_the_decoder_is_for_the_shipped_models_and_comes_near_the_frames_of_their_own():
    folder = SHIPPED / "decoder"
    verify_files(folder, read_run(folder, "decoder/1"))
    own, fast = load_pipeline("sprites/student"), load_pipeline("sprites/student", decoder="sprites/decoder")
    flops = []
    for each in (own, fast):
        with torch.no_grad(), FlopCounterMode(display=False) as counted:
            decode_whole(each.pipe.vae, torch.zeros(2, 16, 5, 8, 8))  # of one clip oneDNN's are not counted
        flops.append(counted.get_total_flops())
    assert 1.8 * flops[1] < flops[0]
    measured = read_run(folder, "decoder/1")["measured"]
    assert f"{measured['psnr_db']:.1f} dB to those frames" in " ".join((folder / "README.md").read_text().split())
    prompts = ["a red circle moving right on black", "a blue square growing on white"]
    videos = [generate(each, prompts, GenerateConfig(steps=8), [0, 1]).frames / 127.5 for each in (own, fast)]
    psnr = 10 * np.log10(4 / np.square(videos[0] - videos[1]).mean())
    assert psnr > measured["psnr_db"] - 3


def test_the_decoder_is_named_on_the_command_line(tmp_path):
    words = ["generate", "a red circle moving right on black", "decoder=sprites/decoder", "decode=once", "--json"]
    result = CliRunner().invoke(app, [*words, "-o", str(tmp_path / "out.mp4")])
    assert result.exit_code == 0, result.output
    name = "decoder/diffusion_pytorch_model.safetensors"
    assert json.loads(result.stdout)["hashes"][name] == sha256_file(SHIPPED / name)


@pytest.mark.slow
def test_it_heeds_the_prompt(loaded):
    """The background of each of four prompts, which chance would get right once or twice."""
    prompts = [
        "a red circle moving right on black",
        "a blue square standing still on white",
        "a yellow square moving left on gray",
        "a green circle moving down on white",
    ]
    made = generate(loaded, prompts, GenerateConfig(steps=20), list(range(4)))
    scores = [score_clip(frames, parse(prompt)) for frames, prompt in zip(made.frames, prompts, strict=True)]
    assert [score["background"] for score in scores] == [1.0] * 4


def test_a_predictor_is_trained_for_the_shipped_student_without_any_settings(tmp_path, monkeypatch):
    """Through runs of it that start from captions of rendered scenes; here from two, for one step."""
    monkeypatch.chdir(tmp_path)
    small = ["clips=2", "search_prompts=1", "mse.steps=1", "mse.batch_size=2"]
    small += ["runs=5", "checked_prompts=2", "tried=1"]  # of the scalars on top
    result = CliRunner().invoke(app, ["train-predictor", *small])
    assert result.exit_code == 0, result.output
    assert "runs/predictor: the predictor and these schedules; `vidaccel generate PROMPT" in result.stdout
    made = Predictor.from_pretrained("runs/predictor")
    assert made.config.student == student_hash(load_pipeline("sprites/student")) and made.history == 1
    assert "as served at" in result.stderr and not Path("runs/predictor/trajectories").exists()
