"""The form of results.json, and the environment in it."""

import copy
import importlib.metadata
import subprocess

import pytest
import torch
from jsonschema import ValidationError

from vidaccel.bench.environment import commit, cpu_model, environment
from vidaccel.bench.results import _best_training_free, completed
from vidaccel.bench.rows import FIELDS, Row, speedups
from vidaccel.config.benchmark import MethodConfig

SECONDS = {"median": 24.6, "p25": 24.5, "p75": 24.9, "rounds": 5}
RUN = {
    "method": "predictor-8-of-20",
    "family": "hunyuan_video",
    "on": "student",
    "id": "predictor-8-of-20/student/17x64x64",
    "settings": {"steps": 20},
    "size": {"num_frames": 17, "height": 64, "width": 64},
    "prompts": 4,
    "seeds": [0, 1, 2, 3],
    "steps": 20,
    "full_steps": [0, 1, 2, 5, 9, 13, 17, 19],
    "passes": {"full": 8, "predicted": 12, "skipped": 0},
    "denoise_seconds": SECONDS,
    "end_to_end_seconds": SECONDS,
    "speedup": {"measured": 11.8, "ideal": 11.9, "measured_over_ideal": 0.99},
    "flops": 12345678,
    "peak_memory_bytes": 10**9,
    "cache_bytes": 57344,
    "parameters": 9371000,
    "semantic": 69.3,
    "quality": 81.1,
    "total": 78.8,
    "dimensions": {"subject_consistency": 91.0},
    "fidelity": {"latent_relative_l2": 0.12, "psnr_db": 31.0, "ssim": 0.9, "lpips": None, "dynamic_degree": 0.97},
    "intervals": {"total": [77.9, 79.6]},
    "error": None,
}


def results(**changes) -> dict:
    run = copy.deepcopy(RUN) | changes
    return {"schema": 1, "environment": environment("cpu"), "baseline": "cfg-50", "runs": [run]}


def test_a_measured_run_fits(schema):
    schema.validate(results())


def test_a_failed_run_fits(schema):
    unmeasured = dict.fromkeys(FIELDS)
    schema.validate(results(**unmeasured | {"error": "CUDA out of memory"}))


@pytest.mark.parametrize(
    "changes",
    [
        {"on": "pupil"},
        {"steps": 0},
        {"steps": "20"},
        {"full_steps": [0, 0]},
        {"passes": {"full": 8}},
        {"passes": {"full": 8, "predicted": -1, "skipped": 0}},
        {"denoise_seconds": SECONDS | {"rounds": 1}},
        {"denoise_seconds": 24.6},
        {"flops": -1},
        {"intervals": {"total": [1.0]}},
        {"speed": 11.8},
    ],
    ids=str,
)
def test_a_wrong_run_does_not_fit(schema, changes):
    with pytest.raises(ValidationError):
        schema.validate(results(**changes))


@pytest.mark.parametrize("name", RUN)
def test_every_field_of_a_run_is_needed(schema, name):
    wrong = results()
    del wrong["runs"][0][name]
    with pytest.raises(ValidationError, match=name):
        schema.validate(wrong)


def test_environment_of_this_process():
    found = environment("cpu")
    assert found["device"] == "cpu"
    assert found["threads"] == torch.get_num_threads()
    assert found["versions"]["torch"] == importlib.metadata.version("torch")
    assert found["cpu"]


def test_cpu_model_is_linuxs(tmp_path):
    file = tmp_path / "cpuinfo"
    file.write_text("processor\t: 0\nmodel name\t: A CPU @ 2 GHz\nprocessor\t: 1\nmodel name\t: A CPU @ 2 GHz\n")
    assert cpu_model(file) == "A CPU @ 2 GHz"
    file.write_text("processor\t: 0\n")
    assert cpu_model(file) == cpu_model(tmp_path / "nowhere") != ""


def test_commit_of_a_checkout(tmp_path):
    def git(*words):
        done = subprocess.run(["git", "-C", tmp_path, *words], check=True, capture_output=True, text=True)
        return done.stdout.strip()

    assert commit(tmp_path) is None
    git("init", "-q")
    (tmp_path / "file").write_text("a")
    git("add", "file")
    git("-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qm", "a")
    git("tag", "v1")
    assert commit(tmp_path) == git("rev-parse", "HEAD")
    (tmp_path / "file").write_text("b")
    assert commit(tmp_path) == git("rev-parse", "HEAD") + "-dirty"


def test_a_file_of_before_gets_its_speedup_end_to_end():
    """By the medians that it has: 30 s of the baseline, 12 s of the row. What a file says itself stays."""
    base = {"method": "cfg-50", "end_to_end_seconds": SECONDS | {"median": 30.0}}
    found = results(end_to_end_seconds=SECONDS | {"median": 12.0})
    found["runs"] += [RUN | base, RUN | {"method": "lost", "end_to_end_seconds": None}]
    assert [run["speedup"]["end_to_end"] for run in completed(found)["runs"]] == [2.5, 1.0, None]
    found["runs"][0]["speedup"] = speedups(11.8, 11.9, 4.4)
    assert completed(found)["runs"][0]["speedup"]["end_to_end"] == 4.4
    assert completed(found | {"baseline": "nowhere"})["runs"][1]["speedup"]["end_to_end"] is None


def test_without_a_scorer_the_best_is_nearest_to_the_models_own_full_run():
    """And not to the baseline, which may be another model."""
    size, every = (5, 32, 32), {"steps": 4, "full_steps": [0, 2]}
    rows = [
        Row("student", MethodConfig(steps=4), size),
        Row("network", MethodConfig(**every), size),
        Row("reuse", MethodConfig(**every, on_skipped="reuse"), size),
        Row("taylor", MethodConfig(**every, on_skipped="taylor"), size),
    ]
    errors = {"student": (0.5, None), "network": (0.5, 0.1), "reuse": (0.4, 0.3), "taylor": (0.6, 0.2)}
    runs = {id(row): {"total": None, "flops": 10, "full_pass_equivalents": {"flops": 2.0}} for row in rows}
    for row in rows:
        baseline, own = ({"latent_relative_l2": error} if error else None for error in errors[row.name])
        row.videos = [{"marks": None, "likeness": baseline, "own": {"student": own} if own else {}}]
    best = _best_training_free(rows[1], rows, runs, rows)
    assert best is not None and best.name == "taylor"
    best = _best_training_free(rows[1], rows[1:], runs, rows[1:])  # without that run
    assert best is not None and best.name == "reuse"
