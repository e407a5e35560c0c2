"""Scalars fitted as served: closed forms of linear equations, what is tried and kept, and the command's folder."""

import json
import shutil
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from typer.testing import CliRunner

from tests.students import student
from tests.train.test_distill import CAPTIONS, write_features
from vidaccel.cache.attach import attach
from vidaccel.cache.schedule import candidates, read_schedules
from vidaccel.cli.main import app
from vidaccel.config.predictor import PredictorConfig
from vidaccel.errors import UserError
from vidaccel.forecasters.multistep import Multistep, multistep_velocity
from vidaccel.models.calling import call_arguments
from vidaccel.models.grid import Grid
from vidaccel.models.loading import load_pipeline
from vidaccel.train.predictor.multistep import runs_of as sampled_runs
from vidaccel.train.predictor.multistep import told_apart, train_multistep
from vidaccel.train.predictor.runs import Runs
from vidaccel.train.predictor.scalars import (
    compared,
    estimated_costs,
    fit_lists,
    measured_growth,
    newest_alone,
    relative_error,
    served_final,
)

STEPS = 5
GRID = Grid.shifted(STEPS, 2.0)


def runs_of(velocity, count=12, seed=0) -> Runs:
    """Runs of u = velocity(x, t), from noise [count, 2, 1, 2, 3]."""
    x = torch.randn(count, 2, 1, 2, 3, generator=torch.Generator().manual_seed(seed))
    states, velocities, times = [x], [], GRID.tensor
    for t, r in zip(times[:-1], times[1:], strict=True):
        velocities.append(velocity(states[-1], t))
        states.append(states[-1] - (t - r) * velocities[-1])
    sampler = SimpleNamespace(
        grid=GRID,
        guided=lambda x, t, text, r, g: velocity(x, t[0]),
        device=torch.device("cpu"),
    )
    return Runs(sampler, states, velocities, {}, None, batch_size=5)


def two_modes(x, t):
    """u = A x with two eigenvalues, one for each channel: what x and u span is all there is."""
    return x * torch.tensor([1.5, -0.5]).view(1, 2, 1, 1, 1)


def wavy(x, t):
    """Nothing linear about it."""
    return torch.sin(2 * x) + t * x.square() / 4


ALL_LISTS = [(0, *rest) for count in range(STEPS) for rest in combinations(range(1, STEPS), count)]


def test_of_a_linear_equation_with_two_modes_one_full_step_is_enough():
    runs = runs_of(two_modes)
    for made, final in fit_lists(runs, ALL_LISTS, fitted=8, ridge=1e-10):
        assert made.error == pytest.approx(0, abs=2e-4), made.full_steps
        torch.testing.assert_close(final, runs.states[-1][8:], rtol=1e-3, atol=1e-3)


def test_lists_are_fitted_step_after_step_on_the_states_that_they_lead_to():
    """Against the loop written out, in float64 least squares with the same ridge."""
    runs, full = runs_of(wavy), (0, 1, 3)
    ((made, final),) = fit_lists(runs, [full], fitted=9, ridge=1e-3)
    times, x, us, xs = GRID.tensor, runs.states[0], [], []
    for i in range(STEPS):
        dt = times[i] - times[i + 1]
        if i in full:
            u = wavy(x, times[i])
            us, xs = [u, *us], [x, *xs]
        else:
            A = torch.stack([term[:9].flatten() for term in (*us, x, *xs)], 1).double()
            gram = A.mT @ A
            wanted = ((x - runs.states[i + 1]) / dt)[:9].flatten().double()
            c = torch.linalg.solve(gram + 1e-3 * torch.diag(gram.diagonal()), A.mT @ wanted)
            torch.testing.assert_close(torch.tensor(made.coefficients[i]).double(), c, rtol=1e-3, atol=1e-4)
            u = multistep_velocity(c, us, xs, x)
        x = x - dt * u
    torch.testing.assert_close(final, x[9:], rtol=1e-4, atol=1e-4)
    apart = (x - runs.states[-1])[9:].flatten(1).square().sum(1) / runs.states[-1][9:].flatten(1).square().sum(1)
    assert made.error == pytest.approx(float(apart.mean().sqrt()), rel=1e-3)


def test_all_steps_full_are_the_own_runs_and_lists_do_not_depend_on_their_company():
    runs = runs_of(wavy)
    together = {made.full_steps: (made, final) for made, final in fit_lists(runs, ALL_LISTS, fitted=9)}
    made, final = together[0, 1, 2, 3, 4]
    assert made.error == 0 and torch.equal(final, runs.states[-1][9:])
    for full in ((0, 2), (0, 1, 4)):
        ((made, final),) = fit_lists(runs, [full], fitted=9)
        assert made == together[full][0] and torch.equal(final, together[full][1])


def test_scalars_come_nearer_than_reuse():
    runs = runs_of(wavy, count=40)
    for full in ((0, 2), (0, 1, 3)):
        ((made, _),) = fit_lists(runs, [full], fitted=32)
        x = u = runs.states[0]
        for i in range(STEPS):
            u = runs.velocity(i, x) if i in full else u
            x = runs.after(i, x, u)
        reuse = relative_error(x[32:], runs.states[-1][32:])
        (said,) = compared(runs.part(slice(32, None)), [made])
        assert said == {
            "steps": STEPS,
            "full_steps": list(full),
            "error": made.error,
            "of_reuse": pytest.approx(made.error / reuse),
        }
        assert said["of_reuse"] < 1


def test_the_share_of_reuse_is_0_for_exact_scalars_and_none_where_reuse_errs_in_nothing():
    runs = runs_of(two_modes)
    made = [each for each, _ in fit_lists(runs, [(0, 2), (0, 1, 2, 3, 4)], fitted=9, ridge=1e-10)]
    shares = {tuple(said["full_steps"]): said["of_reuse"] for said in compared(runs.part(slice(9, None)), made)}
    assert shares == {(0, 2): pytest.approx(0, abs=1e-3), (0, 1, 2, 3, 4): None}


class Network:
    """In a network's place beneath: its answer is some function of the state and the time."""

    def __init__(self, answer):
        self._answer = answer

    def full(self, runs, step, x, before):
        return runs.velocity(step, x), ((step, *before),)

    def answer(self, runs, step, x, left):
        ((newest, *_),) = left
        assert newest < step
        return self._answer(x, runs.times[step])


def test_on_top_of_an_exact_network_there_is_no_error_and_it_is_all_that_counts():
    runs = runs_of(wavy, count=40)
    for made, _ in fit_lists(runs, [(0, 2), (0, 1, 3)], fitted=32, ridge=1e-10, beneath=Network(wavy)):
        assert made.network and made.error == pytest.approx(0, abs=1e-3)
        for row in made.coefficients.values():
            assert row[0] == pytest.approx(1, abs=1e-2) and max(map(abs, row[1:])) < 1e-2


def test_scalars_on_top_are_never_worse_than_each_alone_on_the_runs_that_they_are_fitted_to():
    """Where one step is predicted, the last; with more of them each is fitted to its own state."""
    runs, full = runs_of(wavy, count=24), (0, 1, 2, 3)
    off = Network(lambda x, t: wavy(x, t) + torch.sin(5 * x) / 9)
    part, own = runs.part(slice(16)), runs.states[-1][:16]
    ((both, _),) = fit_lists(runs, [full], fitted=16, ridge=1e-6, beneath=off)
    ((alone, _),) = fit_lists(runs, [full], fitted=16, ridge=1e-6)
    squared = lambda made, beneath=None: float((served_final(part, made, beneath) - own).square().sum())  # noqa: E731
    joint, network = squared(both, off), squared(newest_alone(both, network=True), off)
    assert 0 < joint < 0.9 * min(squared(alone), network)
    assert squared(newest_alone(alone)) > squared(alone)


def test_what_is_served_is_what_was_fitted():
    runs, off = runs_of(wavy, count=24), Network(lambda x, t: wavy(x, t) + 0.1)
    for beneath in (None, off):
        for made, final in fit_lists(runs, [(0, 2), (0, 1, 3)], fitted=16, beneath=beneath):
            served = served_final(runs.part(slice(16, None)), made, beneath)
            torch.testing.assert_close(served, final, rtol=1e-4, atol=1e-5)


def test_estimates_are_exact_where_only_the_last_stretch_is_predicted():
    """Full steps up to there are those of the own run, and the final latent is what is fitted to."""
    runs = runs_of(wavy, count=16)
    costs = estimated_costs(runs, [1.0] * (STEPS + 1))
    for i in range(1, STEPS - 1):
        known = torch.stack(
            [t.flatten(1) for t in (runs.states[i], runs.velocities[i], runs.states[i - 1], runs.velocities[i - 1])], 1
        )
        whole = runs.states[-1].flatten(1).norm(dim=1).view(-1, 1, 1)
        A = (known / whole).transpose(1, 2).flatten(0, 1).double()
        wanted = (runs.states[-1].flatten(1) / whole[:, 0]).flatten().double()
        left = wanted - A @ torch.linalg.lstsq(A, wanted[:, None], rcond=1e-5, driver="gelsd").solution[:, 0]
        assert costs[i - 1][i][STEPS] == pytest.approx(float(left.square().sum()) / len(runs), rel=1e-2, abs=1e-6)
        assert costs[i - 1][i][i + 1] == 0
    ((_, best), *_) = candidates(costs, 1)[STEPS]
    assert best == tuple(range(STEPS))


def test_growth_is_that_of_a_linear_equation():
    runs = runs_of(lambda x, t: x * (1 + t))
    growth, times = measured_growth(runs, 3), GRID.tensor
    for j in range(2, STEPS):
        factor = 1.0
        for i in range(j, STEPS):
            factor *= 1 - float(times[i] - times[i + 1]) * (1 + float(times[i]))
        assert growth[j] == pytest.approx(factor**2, rel=2e-2)  # of small errors, in float32


def test_captions_to_fit_to_and_to_try_on_are_told_apart():
    assert told_apart(["a", "b", "c", "d"], 3, 1) == ["a", "b", "c", "d"]
    found = told_apart(["a", "b", "c"], 4, 2)
    assert found == ["a", "b", "a", "b", "c", "c"]
    with pytest.raises(UserError, match="no two"):
        told_apart(["a"], 4, 2)


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """A folder with a student, its teacher, features, and scalars of it."""
    folder = tmp_path_factory.mktemp("world")
    loaded = load_pipeline(student(folder, "hunyuan_video"))
    write_features(folder / "features", loaded)
    result = run(folder, "-o", str(folder / "scalars"))
    assert result.exit_code == 0, result.output
    return folder


def run(world: Path, *words: str):
    small = {"runs": 8, "checked_prompts": 2, "tried": 2, "search_prompts": 2, "mse.batch_size": 3}
    given = {word.partition("=")[0] for word in words}
    settings = [f"{key}={value}" for key, value in small.items() if key not in given]
    settings += [] if "student" in given else [f"student={world / 'student'}"]
    settings += ["forecaster=multistep", "--features", str(world / "features"), "--device", "cpu"]
    return CliRunner().invoke(app, ["train-predictor", "--conf", "sprites", *settings, *words])


def test_the_command_writes_scalars_that_serve(world):
    schedules = read_schedules(world / "scalars" / "schedule.json")
    assert [schedule.budget for schedule in schedules] == [1, 2]
    made = Multistep.from_pretrained(world / "scalars").config
    assert made.guidance_range == (4.0, 4.0) and not made.two_pass
    assert [each.error for each in made.lists] == [schedule.expected_error for schedule in schedules]
    record = json.loads((world / "scalars" / "run.json").read_text())
    assert record["searched_on"][0]["runs"] == 8
    said = [(each["steps"], tuple(each["full_steps"]), each["error"]) for each in record["compared"]]
    assert said == [(4, each.full_steps, each.error) for each in made.lists]
    words = ["a red circle", f"model={world / 'student'}", f"predictor={world / 'scalars'}", "budget=2", "--json"]
    result = CliRunner().invoke(app, ["generate", *words, "-o", str(world / "out.mp4")])
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["passes"] == {"full": 2, "predicted": 2} and report["full_steps"] == list(schedules[1].full_steps)
    assert "predictor/config.json" in report["hashes"]


def test_what_it_says_and_that_it_comes_out_the_same_again(world, tmp_path):
    result = run(world, "-o", str(tmp_path / "again"))
    assert result.exit_code == 0, result.output
    for name in ("config.json", "schedule.json"):
        assert (tmp_path / "again" / name).read_bytes() == (world / "scalars" / name).read_bytes()
    schedules = read_schedules(world / "scalars" / "schedule.json")
    lines = result.stdout.splitlines()
    assert lines[0].startswith(f"1 of 4 steps full, expected error {schedules[0].expected_error:.3f}: 0")
    use = f"vidaccel generate PROMPT model={world / 'student'} predictor={tmp_path / 'again'} budget=1 steps=4"
    assert lines[-1] == f"{tmp_path / 'again'}: the scalars and these schedules; `{use}` runs it"
    done = run(world, "-o", str(tmp_path / "again"))
    assert done.exit_code == 0 and "already finished" in done.stderr and done.stdout == result.stdout


def test_the_error_is_that_of_the_pipeline_as_it_serves(world):
    """On the prompts that it was tried on, from their noise, beside the pipeline's full run."""
    loaded = load_pipeline(world / "student")
    made = Multistep.from_pretrained(world / "scalars").config.lists[1]

    def latents(seed):
        generator = torch.Generator().manual_seed(seed)
        loaded.pipe.set_progress_bar_config(disable=True)
        return loaded.pipe(CAPTIONS[-1], output_type="latent", generator=generator, **call_arguments(loaded)).frames

    loaded.hook.guidance = 4.0
    seeds = (8, 9)
    own = torch.cat([latents(seed) for seed in seeds])
    with attach(loaded, predictor=world / "scalars", budget=2):
        served = torch.cat([latents(seed) for seed in seeds])
    assert made.error == pytest.approx(relative_error(served, own), rel=1e-2)


def test_other_grids_stay_and_the_same_is_replaced(world, tmp_path):
    folder = tmp_path / "scalars"
    shutil.copytree(world / "scalars", folder)
    result = run(world, "-o", str(folder), "steps=5", "budgets=[2]")
    assert result.exit_code == 0, result.output
    assert [(s.budget, s.steps) for s in read_schedules(folder / "schedule.json")] == [(1, 4), (2, 4), (2, 5)]
    assert {each.steps for each in Multistep.from_pretrained(folder).config.lists} == {4, 5}
    record = json.loads((folder / "run.json").read_text())
    assert [(each["steps"], len(each["full_steps"])) for each in record["compared"]] == [(4, 1), (4, 2), (5, 2)]
    result = run(world, "-o", str(folder), "full_steps=[0,3]")
    assert result.exit_code == 0, result.output
    assert [(s.budget, s.steps) for s in read_schedules(folder / "schedule.json")] == [(2, 4), (2, 5)]
    result = run(world, "-o", str(folder), "guidance=2", "budgets=[1]")
    assert result.exit_code == 0 and "are replaced" in result.stderr
    assert [(s.budget, s.steps) for s in read_schedules(folder / "schedule.json")] == [(1, 4)]


def test_a_teacher_of_two_passes_over_a_range_of_guidance(world, tmp_path):
    result = run(
        world, f"student={world / 'teacher'}", "guidance_range=[2,4]", "budgets=[2]", "-o", str(tmp_path / "t")
    )
    assert result.exit_code == 0, result.output
    made = Multistep.from_pretrained(tmp_path / "t").config
    assert made.two_pass and made.guidance_range == (2.0, 4.0) and made.lists[0].steps == 6
    words = ["a red circle", f"model={world / 'teacher'}", f"predictor={tmp_path / 't'}", "budget=2", "--json"]
    generate = lambda *more: CliRunner().invoke(app, ["generate", *words, "-o", str(tmp_path / "o.mp4"), *more])  # noqa: E731
    result = generate("guidance=3")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["passes"] == {"full": 4, "predicted": 8}
    result = generate("guidance=6")
    assert result.exit_code == 2 and "guidance=6" in result.stderr


def test_a_negative_prompt_is_that_of_the_runs(world):
    config = PredictorConfig(
        student=str(world / "teacher"), features=str(world / "features"), forecaster="multistep", runs=8
    )
    loaded = load_pipeline(world / "teacher")
    (own, _, _), (sampler, _, _) = (
        sampled_runs(each, loaded) for each in (config, replace(config, negative_prompt="a green square"))
    )
    assert (own.negative_prompt, sampler.negative_prompt) == ("", "a green square")
    assert not torch.equal(own.empty["prompt_embeds"], sampler.empty["prompt_embeds"])


MISTAKES = {
    "fewer runs than unknowns": (["runs=4"], "4 runs for 5 unknowns"),
    "nothing to try on": (["checked_prompts=0"], "checked_prompts"),
    "budgets out of order": (["budgets=[3,2]"], "rises"),
    "a budget beyond the steps": (["budgets=[9]"], "budgets=[9]"),
    "full steps and budgets": (["budgets=[2]", "full_steps=[0,2]"], "in place of budgets"),
    "full steps that begin late": (["full_steps=[1,2]"], "does not start at 0"),
    "full steps beyond the grid": (["full_steps=[0,7]"], "7"),
    "a negative ridge": (["ridge=-1"], "from 0 up"),
    "another forecaster's full steps": (["forecaster=taylor", "full_steps=[0,2]"], "is for forecaster=multistep"),
    "another forecaster's negative prompt": (
        ["forecaster=linear", "negative_prompt=dull"],
        "is for forecaster=reuse|taylor|multistep",
    ),
    "no such forecaster": (["forecaster=oracle"], "is learned or multistep"),
    "a folder of something else": (["-o", "FEATURES"], "features/1"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_end_with_a_line_and_a_hint(world, tmp_path, monkeypatch, mistake):
    monkeypatch.chdir(tmp_path)
    words, expected = MISTAKES[mistake]
    result = run(world, *(word.replace("FEATURES", str(world / "features")) for word in words))
    assert result.exit_code == 2, result.output
    assert expected in result.stderr and "hint: " in result.stderr and "Traceback" not in result.stderr


def test_a_model_that_is_not_finite_is_refused(world, tmp_path, monkeypatch):
    from vidaccel.collect import trajectories

    monkeypatch.setattr(trajectories.TrajectorySampler, "guided", lambda self, x, t, text, r, g: x / 0)
    config = PredictorConfig(student=str(world / "student"), features=str(world / "features"), forecaster="multistep")
    with pytest.raises(UserError, match="not finite"):
        train_multistep(replace(config, runs=8, checked_prompts=2), tmp_path / "x", "cpu")


def test_a_full_disk_at_the_last_save_leaves_what_was_there(world, tmp_path, monkeypatch):
    from vidaccel import artefacts

    folder = tmp_path / "scalars"
    shutil.copytree(world / "scalars", folder)
    before = Multistep.from_pretrained(folder).config

    def full(*args):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(artefacts, "_flush_to_disk", full)
        result = run(world, "-o", str(folder), "full_steps=[0,3]")
    assert result.exit_code == 2 and "no space left" in result.stderr
    assert Multistep.from_pretrained(folder).config == before
    assert run(world, "-o", str(folder), "full_steps=[0,3]").exit_code == 0
