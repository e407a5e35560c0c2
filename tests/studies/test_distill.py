"""The study of few-step students in miniature: a tiny teacher of 64 x 64 pixels, which the scorer of sprites takes."""

import json
import shlex
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
import typer
from typer.testing import CliRunner

from studies.distill import cost, models, results, study
from studies.distill.__main__ import app, settings_of
from studies.distill.table import markdown
from tests.students import save_teacher
from tests.train.test_distill import write_features
from vidaccel.errors import TrainingFailed, UserError
from vidaccel.models.calling import call_arguments, set_guidance
from vidaccel.models.loading import load_pipeline
from vidaccel.worlds.sprites import score_model

SMALL = ["train.batch_size=2", "train.warmup=0", "train.log_every=1", "sample_steps=2"]


@pytest.fixture(scope="module")
def places(tmp_path_factory) -> tuple[Path, Path]:
    """A teacher that makes 5 frames of 64 x 64 pixels, and features made with it."""
    folder = tmp_path_factory.mktemp("places")
    teacher = save_teacher(folder / "teacher", "hunyuan_video")
    run = json.loads((teacher / "run.json").read_text())
    run["call"] |= {"height": 64, "width": 64}
    (teacher / "run.json").write_text(json.dumps(run))
    return teacher, write_features(folder / "features", load_pipeline(teacher), size=(2, 8, 8))


def run(places, output: Path, *words: str, exit_code: int = 0, **changes: object) -> str:
    """The command with one training step a model and two prompts."""
    teacher, features = places
    options = {"teacher": teacher, "features": features, "output": output, "work": output.parent / "work"}
    options |= {"minutes": 0, "cfg-minutes": 0, "prompts": 2} | changes
    flat = [str(word) for name, value in options.items() for word in (f"--{name}", value)]
    done = CliRunner().invoke(app, [*flat, *words, *SMALL])
    assert done.exit_code == exit_code, done.output
    return done.output


@pytest.fixture(scope="module", autouse=True)
def few_steps():
    """Fewer sampler steps than the real study's, which are looked at once, and fewer draws for intervals of scores."""
    assert (study.REFERENCE_STEPS, study.FEW_STEPS) == (50, (20, 10, 8, 4))
    assert list(study.GRID) == [f"{target}-{R}" for target in ("derivative", "rollout") for R in (0.2, 0.4, 1.0)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(study, "REFERENCE_STEPS", 4)
        patch.setattr(study, "FEW_STEPS", (2, 1))
        patch.setattr(score_model, "summarise", partial(score_model.summarise, resamples=20))
        yield


@pytest.fixture(scope="module")
def finished(places, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("study") / "tiny.json"
    run(places, output, "--rows", "rollout-0.2", "--rows", "derivative-1.0")
    return output


@pytest.fixture
def copy(finished, tmp_path) -> Path:
    """A finished study to go on with."""
    shutil.copytree(finished.parent, tmp_path / "study")
    return tmp_path / "study" / finished.name


def rows_of(output: Path) -> dict[str, dict]:
    return {row["id"]: row for row in json.loads(output.read_text())["rows"]}


# what is measured


def test_every_row_is_there_in_order(finished):
    students = [f"{name}-seed0-{steps}" for name in ("rollout-0.2", "derivative-1.0") for steps in (2, 1)]
    rows = rows_of(finished)
    assert list(rows) == ["teacher-4", "cfg-4", "cfg-2", "cfg-1", *students]
    assert [row["passes"] for row in rows.values()] == [8, 4, 2, 1, 2, 1, 2, 1]
    for id, row in rows.items():
        assert row["error"] is None
        assert {"semantic", "quality", "total", "dynamic_degree"} <= row["scores"].keys()
        assert row["environment"]["versions"]["vidaccel"]
        if id != "teacher-4":
            assert row["trained"]["steps"] == 1 and row["trained"]["skipped"] == 0
            assert row["trained"]["expected_step_seconds"] > 0
            assert row["latent_error"]["low"] <= row["latent_error"]["mean"] <= row["latent_error"]["high"]
    trained = rows["derivative-1.0-seed0-2"]["settings"]["mean_velocity"]
    assert (trained["target"], trained["restrict"], trained["derivative"]) == ("derivative", 1.0, "exact")


def test_the_latent_error_is_that_of_the_pipelines_own_latents(finished, places):
    """Each prompt alone, from its own seed."""
    (work,) = (finished.parent / "work").iterdir()
    lines = (work / "samples" / "cfg-2" / "marks.jsonl").read_text().splitlines()
    prompts = [json.loads(line)["prompt"] for line in lines]

    def latents(model: Path, steps: int, two_pass: bool) -> list[torch.Tensor]:
        loaded = load_pipeline(model)
        arguments = call_arguments(loaded, steps=steps, two_pass=two_pass) | {"output_type": "latent"}
        set_guidance(loaded, two_pass=two_pass)
        seeds = [torch.Generator().manual_seed(seed) for seed in range(2)]
        return [loaded.pipe(p, generator=g, **arguments).frames for p, g in zip(prompts, seeds, strict=True)]

    reference = latents(places[0], 4, True)
    for name in ("cfg", "rollout-0.2-seed0"):
        pairs = zip(latents(work / name, 2, False), reference, strict=True)
        errors = [float((x - x_ref).norm() / x_ref.norm()) for x, x_ref in pairs]
        assert rows_of(finished)[f"{name}-2"]["latent_error"]["mean"] == pytest.approx(sum(errors) / 2, rel=1e-4)


def test_relative_errors():
    reference = torch.ones(2, 1, 1, 2, 2)
    latents = torch.stack([reference[0], torch.tensor([[[[1.0, 1.0], [1.0, 4.0]]]])])
    assert models.relative_errors(latents, reference) == [0.0, pytest.approx(3 / 2)]


@pytest.mark.parametrize(("minutes", "seconds", "steps"), [(4, 1.0, 240), (4, 0.9, 267), (0.001, 1.0, 1)])
def test_equal_time_is_so_many_steps(minutes, seconds, steps):
    assert models.steps_in(minutes, seconds) == steps


def test_a_step_is_timed_once_for_all_of_its_kind(tmp_path, monkeypatch):
    timed = iter([0.5, 0.25])
    monkeypatch.setattr(models, "median_step_seconds", lambda config: next(timed))
    file = tmp_path / "step_seconds.json"
    assert [models.step_seconds(file, kind, None) for kind in ("cfg", "rollout", "cfg")] == [0.5, 0.25, 0.5]


# what is written


def test_the_table_has_the_numbers_of_the_json(finished):
    rows, text = rows_of(finished), finished.with_suffix(".md").read_text()
    (line,) = (line for line in text.splitlines() if line.startswith("| rollout | 0.2 | 0 | 2 | 2 |"))
    total, error = (rows["rollout-0.2-seed0-2"][name] for name in ("scores", "latent_error"))
    total = total["total"]
    assert f"| {total['mean']:.1f} ({total['low']:.1f} to {total['high']:.1f}) |" in line
    assert f"| {total['mean'] - rows['teacher-4']['scores']['total']['mean']:+.1f} |" in line
    assert f"| {error['mean']:.3f} ({error['low']:.3f} to {error['high']:.3f}) |" in line
    assert text.count("\n| ") == 1 + len(rows)
    assert "--rows rollout-0.2 --rows derivative-1.0 --seeds 1 train.batch_size=2" in text


def test_no_place_of_this_machine_is_written(finished, places):
    for file in (finished, finished.with_suffix(".md")):
        assert str(finished.parent) not in file.read_text()
        assert str(places[0].parent) not in file.read_text()
    assert not list(finished.parent.glob("work/*/*/checkpoints"))


def test_the_command_that_is_written_down_is_one_that_there_is(finished):
    (command,) = json.loads(finished.read_text())["commands"]
    known = {option for parameter in typer.main.get_command(app).params for option in parameter.opts}
    given = {word for word in shlex.split(command) if word.startswith("--")}
    assert "--cfg-minutes" in given <= known


def row(model: str, steps: int, total: float, **fields: object) -> dict:
    estimate = {"mean": total, "low": total - 1, "high": total + 1}
    scores = dict.fromkeys(("semantic", "quality", "total", "dynamic_degree"), estimate)
    versions = {"torch": "2", "diffusers": "0", "vidaccel": "1"}
    machine = {"cpu": "abacus", "threads": 2, "versions": versions, "commit": "c0ffee"}
    common = {"restrict": None, "seed": None, "passes": steps, "trained": None, "latent_error": None, "error": None}
    return {"model": model, "steps": steps, "scores": scores, "environment": machine} | common | fields


def test_a_table_worked_out_by_hand():
    error = [{"mean": mean, "low": mean, "high": mean} for mean in (0.1, 0.3)]
    trained = {"steps": 240, "seconds": 246.0, "skipped": 3}
    rows = [
        row("rollout", 4, 80.0, restrict=0.2, seed=1, latent_error=error[1], trained=trained),
        row("derivative", 4, 0.0, restrict=1.0, seed=0, scores=None, error="ten in a row"),
        row("rollout", 4, 70.0, restrict=0.2, seed=0, latent_error=error[0], trained=trained),
        row("teacher", 50, 90.0),
    ]
    seconds = {name: {"median": s, "p25": s, "p75": s, "rounds": 5} for name, s in (("plain", 0.5), ("exact", 1.5))}
    ratio = {"exact": {"median": 3.0, "p25": 2.9, "p75": 3.1, "rounds": 5}}
    memory = {name: {"before": 10**8, "peak": peak} for name, peak in (("plain", 200_000_000), ("exact", 250_000_000))}
    measured = {"batch_size": 16, "seconds": seconds, "ratio_to_plain": ratio, "memory_bytes": memory}
    made_of = {"teacher": "a" * 64, "features": "b" * 64, "prompts": 64, "minutes": 4.0, "cfg_minutes": 20.0}
    document = {"commands": ["python -m x"], "made_of": made_of, "rows": rows}
    text = markdown(document | {"cost": measured | {"environment": rows[0]["environment"]}})
    first = "| rollout | 0.2 | 0 | 4 | 4 | 70.0 (69.0 to 71.0) | 70.0 (69.0 to 71.0) | 70.0 (69.0 to 71.0) | -20.0 |"
    lines = [line for line in text.splitlines() if line.startswith(("| teacher", "| deriv", "| roll", "| plain"))]
    assert lines[1].startswith("| derivative | 1.0 | 0 | 4 | 4 | failed: ten in a row |")
    assert lines[2] == f"{first} 70.0 (69.0 to 71.0) | 0.100 (0.100 to 0.100) | 240 | 4.1 | 3 |"
    assert lines[4] == "| rollout | 0.2 | 4 | 2 | 75.0 (70.0 to 80.0) | 0.200 (0.100 to 0.300) |"
    assert lines[5:] == [
        "| plain forward-backward | 0.5 (0.5 to 0.5) |  | 5 |",
        "| derivative, exact | 1.5 (1.5 to 1.5) | 3 (2.9 to 3.1) | 5 |",
        "| plain forward-backward | 100 | 200 | 1.00 | 100 | 1.00 |",
        "| derivative, exact | 100 | 250 | 1.25 | 150 | 1.50 |",
    ]
    assert text.count("abacus, 2 threads") == 1


# going on


def test_a_finished_row_is_never_measured_again(finished, places, monkeypatch):
    before = finished.read_bytes()
    for module, name in ((models, "distill"), (models, "score_model"), (study, "load_pipeline")):
        monkeypatch.setattr(module, name, None)
    run(places, finished, "--rows", "rollout-0.2", "--rows", "derivative-1.0")
    assert finished.read_bytes() == before


def test_a_killed_study_goes_on_where_it_was(places, tmp_path, monkeypatch):
    monkeypatch.setattr(models, "median_step_seconds", lambda config: 1.0)
    calls = {"distill": 0, "score_model": 0}

    def dies(name: str, at: int) -> None:
        original = getattr(models, name)

        def call(*arguments, **keywords):
            calls[name] += 1
            if calls[name] == at:
                raise KeyboardInterrupt
            return original(*arguments, **keywords)

        monkeypatch.setattr(models, name, call)

    dies("score_model", at=3)
    dies("distill", at=2)
    output, chosen = tmp_path / "study.json", ["--rows", "rollout-0.4"]
    run(places, output, *chosen, exit_code=130)
    first = rows_of(output)
    assert list(first) == ["teacher-4", "cfg-4"]
    run(places, output, *chosen, exit_code=130)
    assert list(rows_of(output)) == ["teacher-4", "cfg-4", "cfg-2", "cfg-1"]
    run(places, output, *chosen)
    rows = rows_of(output)
    assert list(rows)[4:] == ["rollout-0.4-seed0-2", "rollout-0.4-seed0-1"]
    assert {id: rows[id] for id in first} == first
    # Both models once and a death. Six rows and a death; the teacher's scores again, twice, from their file.
    assert calls == {"distill": 3, "score_model": 9}


def test_more_seeds_and_a_training_that_fails_add_rows(copy, places, monkeypatch):
    original = models.distill

    def fails(config, folder, device):
        if config.mean_velocity.target == "derivative":
            raise TrainingFailed(f"ten in a row; the last is kept in {folder / 'checkpoints'}")
        original(config, folder, device)

    monkeypatch.setattr(models, "distill", fails)
    before = rows_of(copy)
    run(places, copy, "--rows", "derivative-0.4", "--rows", "rollout-0.2", "--seeds", "2")
    rows, text = rows_of(copy), copy.with_suffix(".md").read_text()
    failed = [f"derivative-0.4-seed{seed}-{steps}" for seed in (0, 1) for steps in (2, 1)]
    assert list(rows) == [*before, *failed, "rollout-0.2-seed1-2", "rollout-0.2-seed1-1"]
    assert {id: rows[id] for id in before} == before
    assert rows[failed[3]]["error"] == "ten in a row; the last is kept in derivative-0.4-seed1/checkpoints"
    assert text.count("failed: ten in a row") == 4
    errors = [rows[f"rollout-0.2-seed{seed}-2"]["latent_error"]["mean"] for seed in (0, 1)]
    assert f"{sum(errors) / 2:.3f} ({min(errors):.3f} to {max(errors):.3f})" in text
    assert "--seeds 2" in json.loads(copy.read_text())["commands"][1]


# faults


def test_rows_of_another_study_are_refused(finished, places, tmp_path):
    before = finished.read_bytes()
    assert "prompts was 2, now 3" in run(places, finished, exit_code=2, prompts=3)
    assert "minutes was 0.0, now 4.0" in run(places, finished, exit_code=2, minutes=4)
    assert "student.train.learning_rate was" in run(places, finished, "train.learning_rate=0.5", exit_code=2)
    save_teacher(tmp_path / "other", "hunyuan_video", guidance_embeds=True)
    assert "teacher was" in run(places, finished, exit_code=2, teacher=tmp_path / "other")
    other = write_features(tmp_path / "features", load_pipeline(places[0]), spoil=2.0)
    assert "features was" in run(places, finished, exit_code=2, features=other)
    assert finished.read_bytes() == before


def test_a_model_that_was_lost_is_not_replaced_by_another(tmp_path):
    made_of = {"teacher": "a", "features": "b", "prompts": 1, "minutes": 1.0, "cfg_minutes": 1.0}
    first = results.Results(tmp_path / "study.json", made_of, "python -m x")
    first.bind("one")
    first.write()
    again = results.Results(tmp_path / "study.json", made_of, "python -m x")
    again.bind("one")
    with pytest.raises(UserError, match="rows of another CFG-distilled model"):
        again.bind("two")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--rows", "rollout-0.3"], 'no student "rollout-0.3"'),
        (["--conf", "sprites/cfg"], "of method cfg, not mean_velocity"),
        (["train.stepz=3"], 'did you mean "steps"'),
    ],
)
def test_what_the_command_refuses(places, tmp_path, words, said):
    assert said in run(places, tmp_path / "study.json", *words, exit_code=2)
    assert not list(tmp_path.iterdir())


def test_features_that_are_none_are_refused(places, tmp_path):
    assert "there is no folder" in run(places, tmp_path / "study.json", exit_code=2, features=tmp_path / "gone")


# what a step costs


def test_calls_are_timed_in_turn():
    seen = []
    calls = {name: lambda index, name=name: seen.append((name, index)) for name in "ab"}
    seconds = cost.interleaved(calls, 3)
    assert seen == [(name, index) for index in range(cost.WARM_UP + 3) for name in "ab"]
    assert {name: len(each) for name, each in seconds.items()} == {"a": 3, "b": 3}


def test_a_step_trains_and_a_plain_pass_does_not(places):
    config = settings_of("sprites/restricted_meanflow", "mean_velocity", [*SMALL, "train.learning_rate=0.1"])
    config.teacher, config.features = map(str, places)
    setting = cost.task_of(config)
    step, weight = cost.Step(setting), next(setting.student.parameters())
    before = weight.detach().clone()
    step.passes(cost.loss_of(setting, cost.PLAIN), 0)
    assert torch.equal(weight, before) and weight.grad is None
    for target in cost.TARGETS:
        step(cost.loss_of(setting, target), 0)
        assert not torch.equal(weight, before)
        before = weight.detach().clone()


def test_cost_stands_beside_the_rows(places, tmp_path):
    output = tmp_path / "study.json"
    run(places, output, "--cost", "--repeats", "2")
    document = json.loads(output.read_text())
    measured = document["cost"]
    assert measured["seconds"].keys() == {"plain", "rollout", "finite_difference", "exact"}
    assert all(seconds["rounds"] == 2 and seconds["median"] > 0 for seconds in measured["seconds"].values())
    assert all(memory["peak"] >= memory["before"] > 0 for memory in measured["memory_bytes"].values())
    assert document["rows"] == [] and measured["environment"]["cpu"]
    assert "| derivative, exact |" in output.with_suffix(".md").read_text()
    before = output.read_bytes()
    run(places, output, "--cost", "--repeats", "3")
    assert output.read_bytes() == before
