"""`vidaccel benchmark --speedup --quality` on tiny pipelines: real files, caches and faults; nothing about time."""

import base64
import itertools
import json
import re
import shutil
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from tests.bench.test_vbench import stand_in
from tests.students import student
from vidaccel.bench import models as bench_models
from vidaccel.bench import runner
from vidaccel.bench.generation import timed_generation, writing_seconds
from vidaccel.bench.models import Models
from vidaccel.bench.rows import STAGES, Row
from vidaccel.bench.runner import Benchmark
from vidaccel.cache.attach import attach
from vidaccel.cache.schedule import every, write_schedules
from vidaccel.cli.main import app
from vidaccel.config.benchmark import CACHES, BenchmarkConfig, MethodConfig
from vidaccel.config.loader import load
from vidaccel.data.video import read_video
from vidaccel.errors import ProcessLost
from vidaccel.forecasters.learned import new_predictor
from vidaccel.models.loading import load_pipeline
from vidaccel.models.weight_hashes import student_hash
from vidaccel.numbers import holm
from vidaccel.worlds.sprites.scoring import SpritesScorer

COMMON = """
family: hunyuan_video
model: {folder}/teacher
student: {folder}/student
predictor: {folder}/predictor
dtype: float32
sizes: [[5, 32, 32]]
prompts: [a red circle, a green circle on black, blue]
rounds: 2
timed_seconds: 0
scored_prompts: 3
scored_seed: 50
equal_compute: true
batch_size: 2
baseline: cfg
"""
CONF = (
    COMMON
    + """
contrasts: {{searched: [reuse, equal compute], lost: [reuse]}}
methods:
  cfg: {{weights: teacher, steps: 6, two_pass: true}}
  distilled: {{weights: teacher, steps: 6}}
  student: {{steps: 4}}
  predictor: {{steps: 4, full_steps: [0, 2]}}
  searched: {{steps: 4, budget: 1}}
  reuse: {{steps: 4, full_steps: [0, 2], on_skipped: reuse}}
  linear: {{steps: 4, full_steps: [0, 2], on_skipped: linear}}
  linear-searched: {{steps: 4, budget: 1, on_skipped: linear, predictor: {folder}/predictor}}
  taylor: {{steps: 4, full_steps: [0, 1], on_skipped: taylor}}
  fora: {{weights: teacher, steps: 6, every: 3, on_skipped: branches, cache: fora, settings: {{every: 3}}}}
  first-block: {{weights: teacher, steps: 6, cache: first_block, settings: {{threshold: 9}}, sweep: {{threshold: [0]}}}}
  teacache: {{steps: 4, cache: teacache, settings: {{threshold: 1000.0}}}}
  magcache: {{steps: 4, cache: magcache, settings: {{threshold: 1000.0, retention_ratio: 0.0}}}}
  fastercache: {{steps: 4, cache: fastercache}}
  delta-dit: {{steps: 4, cache: delta_dit, settings: {{every: 2, share: 0.5}}}}
  pab-cfg: {{weights: teacher, steps: 6, two_pass: true, cache: pab}}
  seacache: {{steps: 4, cache: seacache, settings: {{threshold: 1000.0}}}}
  lost: {{steps: 4, model: {folder}/nowhere}}
"""
)
FEW = (
    COMMON
    + """
methods:
  cfg: {{weights: teacher, steps: 2, two_pass: true}}
  student: {{steps: 4}}
  predictor: {{steps: 4, full_steps: [0, 2]}}
  fora: {{weights: teacher, steps: 6, every: 3, on_skipped: branches, cache: fora, settings: {{every: 3}}}}
  first-block: {{weights: teacher, steps: 2, cache: first_block, settings: {{threshold: 9}}, sweep: {{threshold: [0]}}}}
  seacache: {{steps: 4, cache: seacache, settings: {{threshold: 1000.0}}}}
  lost: {{steps: 4, model: {folder}/nowhere}}
"""
)
"""Beside a quick baseline, for what is asked of any row."""
FAIL = {
    "pab-cfg": "keeps one state for both passes of guidance",
    "lost": "nowhere (check the path of the model)",
}
PASSES = {  # full, predicted, skipped; of two-pass rows both
    "cfg": (12, 0, 0),
    "distilled": (6, 0, 0),
    "student": (4, 0, 0),
    "predictor": (2, 2, 0),
    "searched": (1, 3, 0),
    "reuse": (2, 0, 2),
    "linear": (2, 0, 2),
    "linear-searched": (1, 0, 3),
    "taylor": (2, 0, 2),
    "fora": (2, 0, 4),
    "first-block": (1, 0, 5),
    "first-block threshold=0": (6, 0, 0),
    "teacache": (2, 0, 2),
    "magcache": (1, 0, 3),
    "delta-dit": (2, 0, 2),
    "seacache": (2, 0, 2),
    "student-3": (3, 0, 0),  # as much as the row `searched` costs
    "student-2": (2, 0, 0),  # and as linear-searched does
}


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    """A teacher, its student and a predictor for it."""
    folder = tmp_path_factory.mktemp("models")
    loaded = load_pipeline(student(folder, "hunyuan_video"))
    tokens = {name: torch.randn(1, 8, 24) for name in ("hidden_states", "encoder_hidden_states")}
    made_for = {"steps": 4, "shift": 2.0, "student": student_hash(loaded)}
    new_predictor(loaded.pipe.transformer, loaded.family, tokens, tokens, blocks=1, **made_for).save_pretrained(
        folder / "predictor"
    )
    write_schedules(folder / "predictor" / "schedule.json", [every(4, 4)])
    return folder


@pytest.fixture(scope="module")
def conf(models) -> Path:
    file = models / "conf.yaml"
    file.write_text(CONF.format(folder=models))
    return file


@pytest.fixture(scope="module")
def few(models) -> Path:
    file = models / "few.yaml"
    file.write_text(FEW.format(folder=models))
    return file


def run(*words: object, report: bool = False):
    """The command, without the pages and pictures of its report unless they are looked at."""
    with nullcontext() if report else patch("vidaccel.bench.reports.html.write_report"):
        return CliRunner().invoke(app, ["benchmark", *map(str, words)])


def by_method(folder: Path) -> dict[str, dict]:
    return {run["method"]: run for run in json.loads((folder / "results.json").read_text())["runs"]}


@pytest.fixture(scope="module")
def bench(models, conf) -> Path:
    """A finished benchmark of everything."""
    folder = models / "bench"
    result = run("--speedup", "--quality", "--conf", conf, "-o", folder, report=True)
    assert result.exit_code == 0, result.output
    (models / "stdout").write_text(result.stdout)
    (models / "stderr").write_text(result.stderr)
    return folder


def test_results_have_their_form(bench, schema):
    results = json.loads((bench / "results.json").read_text())
    schema.validate(results)
    assert results["baseline"] == "cfg" and results["environment"]["device"] == "cpu"
    assert {run["method"] for run in results["runs"]} == PASSES.keys() | FAIL.keys() | {"fastercache"}
    assert json.loads((bench / "run.json").read_text())["parents"].keys() == {"model", "student"}


def test_a_forecast_over_time_knows_the_grid_that_it_is_made_on(conf, monkeypatch):
    made = []
    monkeypatch.setattr(bench_models, "attach", lambda *args, **kw: made.append(kw["predictor"]) or attach(*args, **kw))
    config = load("benchmark", BenchmarkConfig, str(conf))
    models, method = Models(config, "cpu"), config.methods["taylor"]
    with models.running(method, {}) as loaded:
        timed_generation(loaded, method, (5, 32, 32), ["blue"], [0], decode=False)
    (forecaster,) = made
    assert (forecaster.grid.shift, forecaster.grid.steps, forecaster.history) == (2.0, method.steps, 2)


def test_a_row_has_a_grid_and_a_scale_of_its_own(conf):
    """As a model whose grid and scale they are; the model's own are back for the next row."""
    config = load("benchmark", BenchmarkConfig, str(conf))
    models, others = (Models(replace(config, guidance=guidance), "cpu") for guidance in (3.0, 7.0))

    def latents(method: MethodConfig, models: Models = models) -> torch.Tensor:
        with models.running(method, {}) as loaded:
            return timed_generation(loaded, method, (5, 32, 32), ["blue"], [0], models.config, decode=False).latents

    plain = MethodConfig(steps=4)
    loaded, other = (each.pipeline(plain) for each in (models, others))
    own = loaded.pipe.scheduler
    other.pipe.scheduler = type(own).from_config(own.config, shift=5.0)
    before = latents(plain)
    taylor = {"full_steps": [0, 1], "on_skipped": "taylor"}
    ways = ({}, taylor, taylor | {"on_skipped": "linear"})
    for way in ways:
        row = latents(MethodConfig(steps=4, shift=5.0, guidance=7.0, **way))
        assert torch.equal(row, latents(MethodConfig(steps=4, **way), others)) and not torch.equal(row, before)
        assert loaded.pipe.scheduler is own
    assert torch.equal(latents(plain), before)


def test_passes_are_those_that_happened(bench):
    runs = by_method(bench)
    found = {name: tuple(runs[name]["passes"].values()) for name in PASSES}
    assert found == PASSES
    assert runs["predictor"]["full_steps"] == runs["reuse"]["full_steps"] == [0, 2]
    assert sum(runs["fastercache"]["passes"].values()) == 4


def test_a_row_of_settings_alone_runs(few, models, tmp_path):
    """One line of YAML, by which a cache that ships runs at other settings."""
    own = models / "own.yaml"
    own.write_text(few.read_text() + "  mine: {steps: 4, cache: delta_dit, settings: {every: 4}}\n")
    result = run("--speedup", "--conf", own, "-o", tmp_path, "only=[mine]")
    assert result.exit_code == 0, result.output
    mine = by_method(tmp_path)["mine"]
    assert (mine["full_steps"], tuple(mine["passes"].values())) == ([0], (1, 0, 3))


def test_a_cache_is_its_file_and_a_line_of_the_table(few, models, tmp_path, monkeypatch):
    monkeypatch.setitem(CACHES, "alternate", "tests.bench.baselines.alternate:Alternate")
    own = models / "alternate.yaml"
    own.write_text(few.read_text() + "  alternate: {steps: 4, cache: alternate, settings: {every: 2}}\n")
    words = ("--speedup", "--conf", own, "-o", tmp_path, "only=[alternate]")
    result = run(*words, "methods.alternate.settings.evry=2")
    assert result.exit_code == 2 and 'alternate has no setting "evry"' in result.stderr
    result = run(*words)
    assert result.exit_code == 0, result.output
    row = by_method(tmp_path)["alternate"]
    assert (row["full_steps"], tuple(row["passes"].values())) == ([0, 2], (2, 0, 2))


def test_speedups(bench):
    runs = by_method(bench)
    flops = {name: runs[name]["flops"] for name in PASSES}
    for name in PASSES:
        run = runs[name]
        assert run["speedup"]["ideal"] == flops["cfg"] / flops[name]
        for stage in ("text", "denoise", "decode", "write", "end_to_end"):
            seconds = run[f"{stage}_seconds"]
            assert 0 < seconds["p25"] <= seconds["median"] <= seconds["p75"] and seconds["rounds"] == 2
        known = json.loads(next((bench / "rows").glob(f"{name.replace(' ', '_')}_[st]*.json")).read_text())
        for each in known["rounds"]:  # nothing of a video is in no stage, or in two
            assert each["end_to_end"] == pytest.approx(sum(each[stage] for stage in STAGES))
        ratio = run["speedup"]["measured"] / run["speedup"]["ideal"]
        assert run["speedup"]["measured_over_ideal"] == pytest.approx(ratio)
    assert runs["cfg"]["speedup"] == {"measured": 1, "ideal": 1, "measured_over_ideal": 1, "end_to_end": 1}
    assert 1 < runs["student"]["speedup"]["end_to_end"] < runs["student"]["speedup"]["measured"]
    # the student embeds r and g besides: 256 frequencies -> 24 -> 24 each
    assert flops["student"] / 4 - flops["cfg"] / 12 == 2 * 2 * (256 * 24 + 24 * 24)


def test_short_rows_are_timed_longer(models, few, tmp_path, monkeypatch):
    """Videos of 0.5, 0.2 and 0.3 s are a round of 0.8 s: their mean counts, and the decoder runs once. Text takes 0.5 s
    beside them, decoding 1.5 and writing 0.25."""
    made, decoded, times = runner.timed_generation, [], itertools.cycle([0.5, 0.2, 0.3])

    def timed(loaded, method, size, prompts, seeds, guidance, decode=True, image=None):
        video = made(loaded, method, size, prompts, seeds, guidance, decode, image)
        if method.steps != 4 or not timing:  # another row, or one that nobody times
            return replace(video, text_seconds=0.0, denoise_seconds=1.0, seconds=1.0 + 5.0 * decode)
        decoded.append(decode)
        seconds = next(times)
        return replace(video, text_seconds=0.5, denoise_seconds=seconds, seconds=0.5 + seconds + 1.5 * decode)

    timing = []
    monkeypatch.setattr(runner, "timed_generation", timed)
    monkeypatch.setattr(runner, "writing_seconds", lambda frames, fps: 0.25)
    monkeypatch.setattr(runner.Benchmark, "_warm_up", lambda self, method, size: timing.append(True))
    result = run("--speedup", "--conf", few, "-o", tmp_path, "only=[student]", "timed_seconds=0.8")
    assert result.exit_code == 0, result.output
    assert decoded == [True, False, False] * 2
    student = by_method(tmp_path)["student"]
    assert student["denoise_seconds"]["median"] == pytest.approx(1 / 3)
    apart = {stage: student[f"{stage}_seconds"]["median"] for stage in STAGES}
    assert apart == pytest.approx({"text": 0.5, "denoise": 1 / 3, "decode": 1.5, "write": 0.25})
    assert student["end_to_end_seconds"]["median"] == pytest.approx(1 / 3 + 2.25)
    assert student["speedup"]["measured"] == pytest.approx(3)
    assert student["speedup"]["end_to_end"] == pytest.approx(6.25 / (1 / 3 + 2.25))


def test_a_video_that_cannot_be_written_has_no_such_seconds():
    assert writing_seconds(np.zeros((2, 16, 16, 3), dtype=np.uint8), 8) > 0
    assert writing_seconds(np.zeros((2, 15, 16, 3), dtype=np.uint8), 8) is None  # mp4s are of even sizes


def test_models_are_in_place_and_warm_before_a_row_is_timed(few, tmp_path, monkeypatch):
    """On a device that is played: `meta` is where the models of other rows wait."""
    events, where = [], {}

    def move(module: nn.Module, device: torch.device) -> bool:
        if where.get(module, "cpu") == device.type:
            return False
        where[module] = device.type
        events.append(f"to {device.type}")
        return True

    def generation(loaded, method, *rest, **options):
        assert not [part for part in loaded.pipe.components.values() if where.get(part, "cpu") != "cpu"]
        events.append(f"{method.steps} steps")
        return made(loaded, method, *rest, **options)

    def time_rows(benchmark):
        events.clear()
        stage(benchmark)

    def now(like: torch.Tensor) -> float:
        events.append("clock")
        return float(len(events))

    made, stage = runner.timed_generation, runner.Benchmark._time
    monkeypatch.setattr("vidaccel.bench.models.PARKED", torch.device("meta"))
    monkeypatch.setattr("vidaccel.bench.models._move", move)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: events.append("allocator emptied"))
    monkeypatch.setattr("vidaccel.bench.generation.Clock._now", staticmethod(now))
    monkeypatch.setattr(runner, "timed_generation", generation)
    monkeypatch.setattr(runner.Benchmark, "_time", time_rows)
    result = run("--speedup", "--conf", few, "-o", tmp_path, "only=[student, predictor]")
    assert result.exit_code == 0, result.output
    other_model, warm_up = ["to meta", "to cpu"], ["1 steps", "clock"]
    teacher = [*other_model, *warm_up, "2 steps", "clock"]
    student = [*other_model, *warm_up, "4 steps", "clock"]
    predictor = ["to cpu", *warm_up, "4 steps", "clock"]
    assert [event for event, _ in itertools.groupby(events)] == 2 * (teacher + student + predictor)


def test_how_models_are_run_is_a_setting(bench, conf, tmp_path):
    plain = by_method(bench)["student"]
    assert plain["settings"]["runtime"]["kernels"] == "reference"
    result = run("--speedup", "--conf", conf, "-o", tmp_path, "only=[student, predictor]", "trim_text=true")
    assert result.exit_code == 0, result.output
    trimmed = by_method(tmp_path)
    assert trimmed["student"]["settings"]["runtime"]["trim_text"]
    # "a red circle" is 5 tokens of 16: less is computed, and as much less of it all
    assert trimmed["student"]["flops"] < 0.9 * plain["flops"]
    assert trimmed["student"]["passes"] == plain["passes"]
    # the baseline's pass without the prompt has fewer tokens than the one with it, and is as full
    assert trimmed["cfg"]["passes"] == {"full": 12, "predicted": 0, "skipped": 0}
    assert trimmed["cfg"]["full_steps"] == list(range(6))
    assert trimmed["predictor"]["passes"] == {"full": 2, "predicted": 2, "skipped": 0}


def test_memory_and_parameters(bench):
    runs = by_method(bench)
    assert runs["student"]["cache_bytes"] == runs["cfg"]["cache_bytes"] == 0
    assert 0 < runs["reuse"]["cache_bytes"] == runs["predictor"]["cache_bytes"] < runs["fora"]["cache_bytes"]
    assert runs["cfg"]["parameters"] < runs["student"]["parameters"] < runs["predictor"]["parameters"]
    memory, cache = ({name: runs[name][key] for name in PASSES} for key in ("peak_memory_bytes", "cache_bytes"))
    assert all(memory[name] > 4 * runs[name]["parameters"] + cache[name] for name in PASSES)
    # whatever else has been loaded for the other rows
    assert memory["predictor"] - memory["student"] < 4 * runs["predictor"]["parameters"]


def test_a_method_that_cannot_run_says_why(bench):
    runs = by_method(bench)
    for name, reason in FAIL.items():
        assert reason in runs[name]["error"]
        assert runs[name]["passes"] is None and runs[name]["denoise_seconds"] is None
    assert all(runs[name]["error"] is None for name in PASSES)


def test_calibrations_are_in_the_settings(bench):
    runs = by_method(bench)
    tea, mag = (runs[name]["settings"]["settings"] for name in ("teacache", "magcache"))
    assert len(tea["coefficients"]) == 3 and tea["threshold"] == 1000  # three changes between four steps
    assert len(mag["mag_ratios"]) == 4 and mag["mag_ratios"][0] == 1.0


def test_quality(bench, models):
    runs = by_method(bench)
    for name in PASSES:
        assert runs[name]["prompts"] == 3 and runs[name]["seeds"] == [50, 51, 52]
        assert runs[name]["total"] is None  # nothing scores this world
    assert runs["cfg"]["fidelity"] is None
    threshold = runs["first-block threshold=0"]["fidelity"], runs["distilled"]["fidelity"]
    assert threshold[0]["latent_relative_l2"] == pytest.approx(threshold[1]["latent_relative_l2"], rel=1e-4)
    latents = []
    for name, steps, two_pass in (("teacher", 6, True), ("student", 4, False)):
        loaded = load_pipeline(models / name)
        row = runner.MethodConfig(weights=name, steps=steps, two_pass=two_pass)
        latents.append(timed_generation(loaded, row, (5, 32, 32), ["a green circle on black"], [51]).latents)
    expected = ((latents[1] - latents[0]).norm() / latents[0].norm()).item()
    row = json.loads(next((bench / "rows").glob("student_*")).read_text())
    assert row["videos"][1]["likeness"]["latent_relative_l2"] == pytest.approx(expected, rel=1e-4)
    per_prompt = runs["student"]["per_prompt"]["fidelity"]["latent_relative_l2"]
    assert len(per_prompt) == 3 and per_prompt[1] == pytest.approx(expected, rel=1e-4)
    low, high = runs["student"]["intervals"]["fidelity.latent_relative_l2"]
    assert low <= runs["student"]["fidelity"]["latent_relative_l2"] <= high


def test_rows_are_compared_in_pairs_at_equal_compute(bench):
    runs = by_method(bench)
    for name in PASSES:
        found = runs[name]["full_pass_equivalents"]["flops"]
        assert found == (pytest.approx(sum(PASSES[name])) if PASSES[name][1:] == (0, 0) else pytest.approx(found))
    cost = runs["searched"]["full_pass_equivalents"]
    assert 1 < cost["flops"] < 3 and cost["timed"] > 0
    assert cost["flops"] == pytest.approx(runs["searched"]["flops"] / (runs["student"]["flops"] / 4))
    asked = {each["question"]: each for each in runs["searched"]["contrasts"]}
    assert asked["equal compute"]["with"] == "student-3" and asked["baseline"]["with"] == "cfg"
    assert runs[asked["best training-free"]["with"]]["flops"] <= 1.05 * runs["searched"]["flops"]
    named = [
        (name, each["with"], each["deltas"]["own_fidelity.latent_relative_l2"])
        for name, row in runs.items()
        for each in row["contrasts"] or ()
        if each["question"] == "named beforehand"
    ]
    assert [pair for *pair, _ in named] == [["searched", "reuse"], ["searched", "student-3"]]
    told = [each for *_, each in named]
    assert [each["p_holm"] for each in told] == pytest.approx(holm([each["p"] for each in told]))
    name, error = "own_fidelity.latent_relative_l2", "latent_relative_l2"
    ours, theirs = (runs[each]["per_prompt"]["own_fidelity"]["student"][error] for each in ("searched", "student-3"))
    delta = asked["equal compute"]["deltas"][name]
    assert delta["delta"] == pytest.approx(sum(ours) / 3 - sum(theirs) / 3, abs=1e-4)
    assert delta["low"] <= delta["delta"] <= delta["high"] and delta["verdict"] == "too few prompts to tell"  # of three
    assert runs["searched"]["own_fidelity"][error] == pytest.approx(sum(ours) / 3, abs=1e-4)
    assert runs["student"]["own_fidelity"] is None and runs["cfg"]["contrasts"] == []
    results = json.loads((bench / "results.json").read_text())
    assert results["prompts"] == results["meanings"] == ["a red circle", "a green circle on black", "blue"]


def test_it_says_beforehand_how_long_it_takes_and_what_it_can_see(bench, models):
    said = (models / "stderr").read_text()
    assert re.search(r"scoring 19 rows on 3 prompts of 3 meanings: \d+ min .* 1.6 standard deviations is seen", said)


def test_scored_videos_are_kept_for_another_judge(few, schema, tmp_path):
    """By the names that VBench gives a prompt's videos, and nothing that a file cannot be called; and judged by it."""
    long = "a cat " + 300 * "é"
    python = stand_in(tmp_path)
    dimensions = "vbench_dimensions=[imaging_quality,dynamic_degree]"
    words = ("--speedup", "--quality", "--conf", few, "-o", tmp_path, "only=[first-block]", "timed_seconds=0")
    refused = run(*words[:1], *words[2:], f"vbench={python}")
    assert refused.exit_code == 2 and "vbench judges the videos that --quality makes" in refused.stderr
    result = run(
        *words,
        f"vbench={python}",
        dimensions,
        "endpoints=[vbench.imaging_quality]",
        f"prompts=['a/b', 'a circle', '{long}', 'a circle']",
        "scored_prompts=4",
        "sweeps=false",
        report=True,
    )
    assert result.exit_code == 0, result.output
    for row in ("cfg_teacher_5x32x32", "first-block_teacher_5x32x32"):
        made = {file.name for file in (tmp_path / "videos" / row).iterdir()}
        assert made == {"a b-0.mp4", "a circle-0.mp4", "a circle-1.mp4", f"a cat {112 * 'é'}-0.mp4"}
    frames = read_video(
        tmp_path / "videos/first-block_teacher_5x32x32/a circle-1.mp4", fps=24, num_frames=5, height=32, width=32
    )
    assert frames.shape == (5, 32, 32, 3)
    found = by_method(tmp_path)
    assert set(found) == {"cfg", "first-block"}
    schema.validate(json.loads((tmp_path / "results.json").read_text()))
    # the stand-in says how long the prompt is, which the name of a file does not always hold
    assert found["first-block"]["per_prompt"]["vbench"]["imaging_quality"] == pytest.approx([3, 8, len(long), 8])
    assert found["first-block"]["vbench"]["imaging_quality"] == pytest.approx((19 + len(long)) / 4)
    assert found["first-block"]["per_prompt"]["vbench"]["dynamic_degree"] == [0, 100, 100, 100]
    delta = found["first-block"]["contrasts"][0]["deltas"]["vbench.imaging_quality"]
    assert (delta["delta"], delta["verdict"]) == (0, "too few prompts to tell")
    assert "imaging quality by VBench" in (tmp_path / "report.html").read_text()


def test_report_is_one_file(bench):
    page = (bench / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 5  # two pictures, light and dark, and the frames
    assert not re.search(r"(src|srcset|href)=['\"](?!data:)|url\(|@import|fetch\(", page)
    assert FAIL["pab-cfg"] in page and "first-block threshold=0" in page
    assert "<h2>hunyuan_video, 5 frames of 32 x 32</h2>" in page and ">cache of memory</button>" in page
    clips = re.findall(r"src='data:video/mp4;base64,(.*?)'", page)
    assert len(clips) == len(PASSES) + 1
    assert base64.b64decode(clips[0])[4:8] == b"ftyp"
    assert "student, 4 steps, 2 in full, else a learned network</span> <code>predictor</code>" in page
    for heading in re.findall(r"<table>.*?</table>", page, re.DOTALL):  # no column is empty
        lines = [re.findall(r"<td>(.*?)</td>", line) for line in heading.split("<tr>")[2:]]
        assert all(any(column) for column in zip(*lines, strict=True))
    for name in ("pareto.png", "frontier.png", "sheet.png"):
        assert (bench / name).read_bytes().startswith(b"\x89PNG")
    assert not (bench / "reference").exists()


def test_table(bench, models):
    printed = (models / "stdout").read_text()
    line = next(line for line in printed.splitlines() if line.startswith(" predictor "))
    assert "2 + 2" in line
    assert "could not run: pab-cfg (PyramidAttentionBroadcastConfig keeps" in " ".join(printed.split())


def test_a_finished_benchmark_is_not_run_again(bench, conf, monkeypatch):
    monkeypatch.setattr(runner, "timed_generation", None)
    before = (bench / "results.json").read_text()
    again = run("--speedup", "--quality", "--conf", conf, "-o", bench, "--json")
    assert again.exit_code == 0, again.output
    assert json.loads(again.stdout) == json.loads(before) and "info: already finished" in again.stderr


def test_another_benchmarks_folder_is_refused(bench, conf):
    result = run("--speedup", "--quality", "--conf", conf, "-o", bench, "rounds=5", "methods.student.steps=3")
    assert result.exit_code == 2
    message, hint = result.stderr.splitlines()[-2:]
    assert "holds another benchmark: " in message
    assert "config.rounds was 2, now 5" in message and "config.methods.student.steps was 4, now 3" in message
    assert hint.startswith("hint: choose another folder")


class Stop(BaseException):
    """As a kill."""


def test_a_killed_run_goes_on(models, few, tmp_path, monkeypatch, schema):
    words = ("--speedup", "--quality", "--conf", few, "-o", tmp_path, "only=[student,fora,lost]", "rounds=3")
    calls, made, stop_at = [], runner.timed_generation, 12

    def counted(loaded, method, *rest, **more):
        calls.append(method)
        if len(calls) == stop_at:
            raise Stop
        return made(loaded, method, *rest, **more)

    monkeypatch.setattr(runner, "timed_generation", counted)
    # 3 counts and the decoder, then rounds of 3: the twelfth call is in the middle of the third round
    with pytest.raises(Stop):
        run(*words)
    schema.validate(json.loads((tmp_path / "results.json").read_text()))
    runs = by_method(tmp_path)
    assert runs["student"]["denoise_seconds"]["rounds"] == 2 and not (tmp_path / "run.json").exists()
    stop_at = 21
    # the decoder again, the round from its start, each row after a warm-up (6), then the baseline's videos: 2, and the
    # other is cut off
    with pytest.raises(Stop):
        run(*words)
    assert [len(row["videos"]) for row in _rows(tmp_path, "cfg_", "student_")] == [2, 0]
    stop_at = 0
    result = run(*words)
    assert result.exit_code == 0, result.output
    # the baseline's third, then 2 calls each for the others
    assert len(calls) == 21 + 1 + 4
    assert by_method(tmp_path)["student"]["denoise_seconds"]["rounds"] == 3


def test_batches_that_processes_share_are_those_of_one(bench, conf, tmp_path, monkeypatch):
    """Each batch's videos come back in order, and what a row raises in one process is its error."""
    waves = []

    def gathered(items, of):
        waves.append([list(each) for each in items])
        return [of(each) for each in items]

    monkeypatch.setattr(runner, "world", lambda: 2)
    monkeypatch.setattr(runner, "gathered", gathered)
    result = run("--speedup", "--quality", "--conf", conf, "-o", tmp_path, "only=[student,fora,lost]")
    assert result.exit_code == 0, result.output
    assert [[0, 1], [2]] in waves  # a batch each
    for shared, alone in zip(*(_rows(each, "cfg_", "student_", "fora_") for each in (tmp_path, bench)), strict=True):
        assert [video["likeness"] for video in shared["videos"]] == [video["likeness"] for video in alone["videos"]]
        assert len(shared["videos"]) == 3


def test_the_loss_of_a_process_is_no_error_of_a_row(monkeypatch):
    """It would be left out when the benchmark goes on."""
    row, saved = Row("student", MethodConfig(), (17, 64, 64)), []

    def lose():
        raise ProcessLost("Connection closed by peer")

    monkeypatch.setattr(Benchmark, "_save", lambda self, row: saved.append((row.attempts, row.error)))
    with pytest.raises(ProcessLost):
        Benchmark.__new__(Benchmark)._attempt(row, lose, written=False)
    assert saved == [(1, None), (0, None)]


def test_a_row_scored_anew_is_compared_with_what_it_was(bench, conf, tmp_path):
    """The videos that it is compared with are gone with the end of a benchmark."""
    shutil.copytree(bench, tmp_path, dirs_exist_ok=True)
    assert not (tmp_path / "reference").exists()
    (tmp_path / "run.json").unlink()
    file = next((tmp_path / "rows").glob("reuse_*"))
    before = json.loads(file.read_text())
    file.write_text(json.dumps(before | {"videos": []}))
    result = run("--speedup", "--quality", "--conf", conf, "-o", tmp_path)
    assert result.exit_code == 0, result.output
    (after,) = _rows(tmp_path, "reuse_")
    assert after["videos"] == before["videos"] and set(after["videos"][0]["own"]) == {"student"}
    assert all(video["likeness"] for video in after["videos"])
    assert not (tmp_path / "reference").exists()


def _rows(folder: Path, *names: str) -> list[dict]:
    return [json.loads(next((folder / "rows").glob(f"{name}*")).read_text()) for name in names]


@pytest.mark.parametrize("stage", ["counting", "timing", "scoring"])
def test_a_row_that_takes_the_process_with_it_twice_is_left_out(models, few, tmp_path, monkeypatch, stage):
    words = ("--speedup", "--quality", "--conf", few, "-o", tmp_path, "only=[student]")
    made = runner.timed_generation

    def deadly(loaded, method, size, prompts, seeds, guidance, decode=True, image=None):
        at = "scoring" if len(prompts) > 1 else "timing" if decode else "counting"
        if method.steps == 4 and at == stage:
            raise Stop
        return made(loaded, method, size, prompts, seeds, guidance, decode, image)

    monkeypatch.setattr(runner, "timed_generation", deadly)
    for _ in range(2):
        with pytest.raises(Stop):
            run(*words)
    result = run(*words)
    assert result.exit_code == 0, result.output
    runs = by_method(tmp_path)
    assert runs["student"]["error"] == "the process ended 2 times while it ran"
    assert runs["cfg"]["denoise_seconds"]["rounds"] == 2


def test_an_interruption_is_not_held_against_a_row(models, few, tmp_path, monkeypatch):
    words = ("--speedup", "--conf", few, "-o", tmp_path, "only=[student]")

    def interrupted(*_):
        raise KeyboardInterrupt

    for _ in range(runner.ATTEMPTS + 1):
        with monkeypatch.context() as patch:
            patch.setattr(runner, "timed_generation", interrupted)
            assert run(*words).exit_code == 130
    assert run(*words).exit_code == 0
    assert by_method(tmp_path)["student"]["error"] is None


@pytest.mark.parametrize("stage", ["counting", "timing"])
def test_out_of_memory_is_a_rows_error(models, few, tmp_path, monkeypatch, stage):
    made, calls = runner.timed_generation, []

    def greedy(loaded, method, *rest, **more):
        calls.append(method.steps)
        if method.steps == 4 and calls.count(4) > (stage == "timing"):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB")
        return made(loaded, method, *rest, **more)

    monkeypatch.setattr(runner, "timed_generation", greedy)
    result = run("--speedup", "--conf", few, "-o", tmp_path, "only=[student,fora]")
    assert result.exit_code == 0, result.output
    runs = by_method(tmp_path)
    assert runs["student"]["error"].startswith("OutOfMemoryError: CUDA out of memory")
    assert "warning: student: OutOfMemoryError" in result.stderr
    assert runs["fora"]["speedup"]["measured"] is not None and runs["student"]["speedup"]["measured"] is None


@pytest.mark.parametrize(
    ("words", "message", "hint"),
    [
        ([], "nothing was asked for", "give one of --plan, --speedup, --speedup --quality, --random-weights"),
        (["--plan", "--speedup"], "--plan and --speedup were asked for together", "give one of"),
        (["--quality"], "--quality was asked for without --speedup", "add --speedup"),
        (["--quality", "--plan"], "--quality was asked for without --speedup", "add --speedup"),
        (["--speedup", "timed_seconds=-1"], "timed_seconds=-1.0 is not possible", "0 or more"),
        (["--speedup", "rounds=1"], "rounds=1 is not possible", "at least 2"),
        (["--speedup", "only=[zzz]"], 'there is no method "zzz"', "choose from"),
        (["--speedup", "baseline=cgf"], 'there is no method "cgf"', 'did you mean "cfg"?'),
        (["--speedup", "prompts=[]"], "there are 0 prompts, and 1 are asked for", "list more"),
        (["--speedup", "model=null"], "student does not say what it was distilled from", "name it: model=FOLDER"),
        (["--speedup", "sizes=[[5, 32, 40]]"], "width=40 does not fit", "nearest valid"),
        (["--speedup", "methods.fora.settings.evry=3"], 'fora: fora has no setting "evry"', 'did you mean "every"?'),
        (["--speedup", "methods.fora.settings.every=0"], "fora: FORA every 0 steps", "mend its settings"),
        (["--speedup", "methods.seacache.settings.threshold=-1"], "seacache: `threshold` must be non-neg", "mend"),
        (["--speedup", "methods.student.cache=magic"], "cache='magic' is not possible", "is one of pab"),
        (["--speedup", "methods.student.settings={a: 1}"], "settings={'a': 1} is not possible", "those of a cache"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_refusals(few, tmp_path, words, message, hint):
    result = run("--conf", few, "-o", tmp_path / "out", *words)
    assert result.exit_code == 2, result.output
    first, second = result.stderr.splitlines()[-2:]
    assert first.startswith("error: ") and message in first
    assert second.startswith("hint: ") and hint in second
    assert result.stdout == "" and not (tmp_path / "out").exists()


def test_prompts_that_cannot_be_scored_are_refused_before_anything_runs(few, tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "scorer_of", lambda config: SpritesScorer())
    result = run("--speedup", "--quality", "--conf", few, "-o", tmp_path / "out")
    assert result.exit_code == 2 and 'the caption "a red circle" cannot be scored' in result.stderr
    assert not (tmp_path / "out").exists()
