"""Rows whose frames a distilled decoder makes: beside those of the autoencoder's own, in one benchmark."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tests.models.test_decoder import save_decoder
from tests.students import save_teacher, student
from vidaccel.artefacts import sha256_file
from vidaccel.bench.counterparts import own_run, own_runs
from vidaccel.bench.models import Models
from vidaccel.bench.own_model import resolved
from vidaccel.cli.main import app
from vidaccel.config.benchmark import BenchmarkConfig, MethodConfig
from vidaccel.config.generate import GenerateConfig
from vidaccel.errors import UserError
from vidaccel.sampling import generate

CONF = """
family: hunyuan_video
model: {folder}/teacher
student: {folder}/student
dtype: float32
sizes: [[5, 32, 32]]
prompts: [a red circle, a green circle on black]
rounds: 2
timed_seconds: 0
scored_prompts: 2
baseline: cfg
contrasts: {{decoded: [student]}}
methods:
  cfg: {{weights: teacher, steps: 3, two_pass: true}}
  student: {{steps: 4}}
  decoded: {{steps: 4, decoder: {folder}/narrow}}
  lost: {{steps: 4, decoder: {folder}/nowhere}}
  foreign: {{steps: 4, decoder: {folder}/foreign}}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    student(folder, "hunyuan_video")
    save_decoder(folder / "narrow", folder / "teacher")
    save_decoder(folder / "foreign", save_teacher(folder / "wan", "wan"))
    (folder / "conf.yaml").write_text(CONF.format(folder=folder))
    return folder


@pytest.fixture
def models(folder) -> Models:
    named = {"model": str(folder / "teacher"), "student": str(folder / "student")}
    return Models(BenchmarkConfig(**named, dtype="float32"), "cpu")


@pytest.fixture(scope="module")
def bench(folder, tmp_path_factory) -> dict:
    output = tmp_path_factory.mktemp("bench") / "out"
    words = ["benchmark", "--speedup", "--quality", "--conf", str(folder / "conf.yaml"), "-o", str(output)]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output
    return {
        "results": json.loads((output / "results.json").read_text()),
        "settings": json.loads((output / "settings.json").read_text()),
    }


def test_a_row_decodes_with_its_own_and_leaves_the_pipeline_as_it_was(models, folder):
    narrow, plain = (MethodConfig(steps=2, decoder=each) for each in (str(folder / "narrow"), None))
    loaded, own = models.pipeline(plain), models.pipeline(plain).pipe.vae
    videos = []
    for method in (plain, narrow, plain):
        with models.running(method, {}) as running:
            assert running is loaded and (running.pipe.vae is own) == (method is plain)
            videos.append(generate(running, ["a red circle"], GenerateConfig(steps=2), [0]))
        assert loaded.pipe.vae is own
    assert all((video.latents == videos[0].latents).all() for video in videos)
    assert (videos[0].frames != videos[1].frames).any() and (videos[0].frames == videos[2].frames).all()


def test_what_a_row_needs_in_memory_is_its_own_decoder(models, folder):
    narrow, plain = (MethodConfig(decoder=each) for each in (str(folder / "narrow"), None))
    loaded = models.pipeline(plain)
    own, swapped = (models.autoencoder(method, loaded) for method in (plain, narrow))
    assert own in models.modules(plain, loaded) and swapped not in models.modules(plain, loaded)
    assert swapped in models.modules(narrow, loaded) and own not in models.modules(narrow, loaded)
    assert models.autoencoder(narrow, loaded) is swapped and swapped.encoder is own.encoder


def test_rows_that_cannot_be_decoded_say_why(models, folder):
    rows = {name: MethodConfig(decoder=str(folder / name)) for name in ("narrow", "nowhere", "foreign")}
    _, lacking = resolved(rows, models)
    assert lacking.keys() == {"nowhere", "foreign"}
    assert lacking["nowhere"] == f"there is no decoder {folder / 'nowhere'}"
    assert "is of an AutoencoderKLWan" in lacking["foreign"]


def test_a_row_decodes_in_its_own_way(models, folder):
    narrow = MethodConfig(steps=2, decoder=str(folder / "narrow"), decode="once")
    loaded = models.pipeline(narrow)
    with models.running(narrow, {}) as running:
        assert running is loaded and loaded.decode == "once"
    assert loaded.decode == "auto"
    with models.running(MethodConfig(steps=2), {}):
        assert loaded.decode == "auto"
    with pytest.raises(UserError, match="decode"):
        MethodConfig(decode="halves")


def test_a_whole_runs_decoder_is_that_of_all_rows_but_the_baseline():
    methods = {"full": MethodConfig(), "fast": MethodConfig(steps=4), "mine": MethodConfig(steps=4, decoder="mine")}
    methods["plain"] = MethodConfig(steps=4, decoder="own")
    config = BenchmarkConfig(methods=methods, baseline="full", decoder="theirs")
    found = {name: row.decoder for name, row in config.wanted().items()}
    assert found == {"full": None, "fast": "theirs", "mine": "mine", "plain": None}


def test_an_own_full_run_is_decoded_as_its_row_is():
    row = MethodConfig(steps=4, budget=2, on_skipped="reuse", predictor="p", decoder="runs/narrow")
    assert own_run(row) == MethodConfig(steps=4, decoder="runs/narrow")
    assert own_runs({"row": row}) == {"student-4-narrow": MethodConfig(steps=4, decoder="runs/narrow")}
    assert list(own_runs({"row": replace(row, decode="once")})) == ["student-4-narrow-once"]


def test_results_say_what_decoded(bench, folder, schema):
    results = bench["results"]
    schema.validate(results)
    runs = {run["method"]: run for run in results["runs"]}
    assert runs["decoded"]["settings"]["decoder"] == str(folder / "narrow")
    assert runs["student"]["settings"]["decoder"] is None
    assert bench["settings"]["models"]["decoded.decoder"] == sha256_file(folder / "narrow" / "run.json")
    assert runs["decoded"]["decode_seconds"] is not None
    for name in ("lost", "foreign"):
        assert runs[name]["error"].startswith("not run: ")


def test_frames_are_held_against_those_of_the_own_decoder(bench):
    runs = {run["method"]: run for run in bench["results"]["runs"]}
    (contrast,) = (each for each in runs["decoded"]["contrasts"] if each["question"] == "named beforehand")
    assert contrast["with"] == "student"
    errors = [runs[name]["fidelity"] for name in ("student", "decoded")]
    assert errors[0]["latent_relative_l2"] == errors[1]["latent_relative_l2"]
    assert errors[0]["psnr_db"] != errors[1]["psnr_db"]
