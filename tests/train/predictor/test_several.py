"""A predictor of a model that is denoised by two transformers: a network for each, in one folder."""

import json
from dataclasses import replace

import pytest
import torch

import vidaccel
from tests.students import save, save_teacher, trained
from tests.train.test_distill import write_features
from vidaccel.bench.models import Models
from vidaccel.bench.plan_predictor import plan_predictor
from vidaccel.cache.attach import attach
from vidaccel.cache.schedule import read_schedules
from vidaccel.collect.trajectories import TrajectorySampler
from vidaccel.config.benchmark import BenchmarkConfig, MethodConfig
from vidaccel.config.collect import CollectConfig
from vidaccel.config.plan import PlanConfig
from vidaccel.config.predictor import DiscriminatorConfig, PredictorConfig
from vidaccel.config.training import TrainConfig
from vidaccel.errors import UserError
from vidaccel.forecasters.learned import Predictor
from vidaccel.forecasters.reuse import Reuse
from vidaccel.models.loading import load_pipeline, of_one
from vidaccel.models.velocity import SwitchedVelocity
from vidaccel.train.objective import generator_for
from vidaccel.train.predictor import training, trajectories
from vidaccel.train.predictor.discriminator import Discriminator
from vidaccel.train.predictor.loss import PredictorLoss
from vidaccel.train.predictor.pairs import Pairs, grid_times, restricted_times
from vidaccel.train.predictor.search import list_errors
from vidaccel.train.predictor.served import (
    Starts,
    check_lists,
    default_lists,
    leading,
    relative_squares,
    served_loss,
    serving_of,
    start_predictor,
)
from vidaccel.train.predictor.task import default_budgets, task_of

ONE = {"steps": 1, "batch_size": 2, "learning_rate": 1e-3, "warmup": 0, "log_every": 1}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A student with embeddings of r and g on each of its transformers, for 6 steps of shift 3, and features."""
    folder = tmp_path_factory.mktemp("two")
    student = {"steps": 6, "shift": 3.0, "guidance": 4.0}
    first = of_one(load_pipeline(save_teacher(folder / "teacher", "wan22")), "transformer")
    save(folder / "half", first, trained(first, until=0.8, restrict=0.1), **student)
    second = of_one(load_pipeline(folder / "half"), "transformer_2")
    own = {"transformer": second.pipe.transformer_2, **student}
    save(folder / "student", second, trained(second, restrict=0.4), **own)
    write_features(folder / "features", load_pipeline(folder / "student"))
    return folder


def config(world, **changes) -> PredictorConfig:
    own = {"student": str(world / "student"), "features": str(world / "features"), "blocks": 1, "search_prompts": 1}
    return PredictorConfig(**own | {"mse": TrainConfig(**ONE), "adversarial": TrainConfig(steps=0)} | changes)


def test_times_are_those_of_one_transformer():
    for low, high in ((0.8, 1.0), (0.0, 0.8)):
        drawn = restricted_times(10_000, 0.3, 0.2, torch.Generator().manual_seed(0), (low, high))
        for t, r in drawn:
            assert (low <= r).all() and (r <= t).all() and (t < high).all()
            assert float(t.min()) < low + 0.01 and float(t.max()) > high - 0.02
    grid = torch.tensor([1.0, 0.9, 0.75, 0.5, 0.3, 0.0])
    for own, times in ((range(2), {1.0, 0.9}), (range(2, 5), {0.75, 0.5, 0.3})):
        full, predicted = grid_times(1000, grid, 0.9, torch.Generator().manual_seed(0), own)
        found = {round(t, 4) for t in torch.cat([full.t, predicted.t]).tolist()}
        assert found == times and (predicted.t < full.t).all()


@pytest.mark.parametrize("how", [{"intervals": "restricted"}, {"intervals": "grid"}], ids=["restricted", "grid"])
def test_networks_take_turns_and_each_learns_from_its_own_transformer(world, how):
    task = task_of(load_pipeline(world / "student"), config(world, **how), None)
    assert isinstance(task.student, SwitchedVelocity) and task.firsts == (0, 3)
    with task.trunks:
        predictor, pairs = training._start(task)
        assert isinstance(predictor, Predictor) and predictor.config.boundary == 0.8
        assert pairs.steps_of == {0: range(3), 1: range(3, 6)}
        assert (pairs.restrict, pairs.further_restrict) == (0.1, 0.4)
        first, second = (part.statistics["hidden_states"].mean for part in predictor.parts)
        assert not torch.equal(first, second) and first.abs().sum() > 0 and second.abs().sum() > 0
        loss = PredictorLoss(task.student, task.trunks, predictor)
        for step in range(4):
            pair = pairs.draw(step, 2, step, generator_for(0, step))
            which = step % 2
            assert ((pair.times.t >= 0.8) == (which == 0)).all()
            assert (pair.memory[0].t > pair.times.t).all() or how == {"intervals": "restricted"}
            assert ((pair.memory[0].t >= 0.8) == (which == 0)).all()
            loss(pair)[0].backward()
            learnt = [any(p.grad is not None for p in (*part.blocks.parameters(),)) for part in predictor.parts]
            assert learnt == [which == 0, which == 1]
            predictor.zero_grad()


class Runs:
    """Trajectories in memory, in the place of a feature folder."""

    buckets = None

    def __init__(self, loaded):
        sampler = TrajectorySampler(loaded, CollectConfig(kind="trajectory", model="here"))
        with torch.no_grad():
            made = sampler(["a red circle", "a blue square"], [0, 1]) | {"times": sampler.grid.tensor.repeat(2, 1)}
        self.samples = [({name: tensor[i] for name, tensor in made.items()}, {}) for i in range(2)]

    def at(self, index, seed):
        return index % 2

    def read(self, chosen):
        return [self.samples[i] for i in chosen]


def test_trajectories_lead_through_one_transformer(world):
    """Looking back on two full steps, the first of each transformer's is looked back on twice."""
    loaded = load_pipeline(world / "student")
    task = task_of(loaded, config(world), None)
    asked = replace(task.config, pairs="trajectory", history=2)
    grid, data = task.sampling.grid.tensor, Runs(loaded)
    with task.trunks, torch.no_grad():
        pairs = Pairs(task.student, task.trunks, Reuse(), data, asked, grid, 4.0, 0.2, 0, task.boundary, 0.2)
        seen = set()
        for step in range(24):
            pair = pairs.draw(step, 2, step, generator_for(0, step))
            spans = [{bool(t >= 0.8) for t in times} for times in (pair.times.t, *(each.t for each in pair.memory))]
            assert spans == 3 * [{step % 2 == 0}]
            seen |= {round(float(t), 4) for t in pair.times.t}
    assert seen == {round(float(grid[i]), 4) for i in (1, 2, 4, 5)}


def test_trajectories_and_training_tell_the_second_one_scale(world, monkeypatch):
    loaded, asked = load_pipeline(world / "student"), config(world, pairs="trajectory", guidance_2=2.0)

    def job(loaded, source, collected):
        raise RuntimeError(f"at {collected.guidance_2}")

    monkeypatch.setattr(trajectories, "trajectory_job", job)
    with pytest.raises(RuntimeError, match="at 2.0"):
        trajectories.with_trajectories(asked, loaded, world / "none")
    opened = [({}, {"steps": 6, "shift": 3.0, "guidance": 4.0, "guidance_2": 3.0})], {}
    task = task_of(loaded, replace(asked, guidance_2=None), None, opened)
    assert (task.sampling.guidance, task.student.second) == (4.0, 3.0)
    with pytest.raises(UserError, match="are of guidance_2=3, not 2"):
        task_of(loaded, asked, None, opened)


def test_lists_hold_the_first_step_of_each():
    assert default_lists(8) == default_lists(8, (0,))
    assert all({0, 5} <= set(each) and len(each) < 8 for each in default_lists(8, (0, 5)))
    assert default_lists(3, (0, 2)) == [(0, 2)]
    assert check_lists([[0, 3, 5]], 8, (0, 5)) == [(0, 3, 5)]
    with pytest.raises(UserError, match=r"\[0, 3\] leaves out 5, the first step of the second"):
        check_lists([[0, 3]], 8, (0, 5))


def test_served_runs_are_those_of_the_search_and_teach_both(world):
    task = task_of(load_pipeline(world / "student"), config(world, pairs="served", history=2), None)
    with task.trunks:
        starts = Starts.of(task, 2)
        predictor, serving = start_predictor(task, starts), serving_of(task)
        for network in predictor.parts:
            assert network.statistics["hidden_states"].mean.abs().sum() > 0
            torch.nn.init.normal_(network.fusions["hidden_states"].outer.weight, std=0.05)
        tensors = starts.draw(2, generator_for(0, 0), task.device)
        noise, g = tensors["noise"], torch.full((2,), 4.0)
        text = {"prompt_embeds": next(each for name, each in tensors.items() if name.endswith("prompt_embeds"))}
        lists = [(0, 3), (0, 1, 3), (0, 1, 2, 3, 4), (0, 2, 3, 5)]
        found = list_errors(
            task.student, task.trunks, predictor, noise, text, task.sampling.grid, g, lists, task.firsts
        )
        with torch.no_grad():
            for full, error in found:
                own = serving.own(noise, text, g, kept=leading(full))
                last = serving.served(predictor, full, own, text, g)[-1]
                torch.testing.assert_close(relative_squares(last, own[0][-1]).double(), error, rtol=1e-3, atol=1e-9)
        served_loss(serving, predictor, (0, 3), noise, text, g)[0].backward()
        assert all(part.fusions["hidden_states"].outer.weight.grad.abs().sum() > 0 for part in predictor.parts)


def test_a_folder_has_both_and_serves_under_scalars(world, tmp_path):
    """Trained as served, with scalars on top, then attached by its folder, and in a row of a benchmark."""
    made = config(world, pairs="served", scalars=True, runs=8, checked_prompts=2, tried=1, budgets=[2, 3])
    vidaccel.train_predictor(made, tmp_path / "p")
    written = json.loads((tmp_path / "p" / "config.json").read_text())
    assert written["boundary"] == 0.8 and written["steps"] == 6
    run = json.loads((tmp_path / "p" / "run.json").read_text())
    assert {len(each["full_steps"]) for each in run["fitted"]} <= {2, 3} and run["compared"]
    schedules = read_schedules(tmp_path / "p" / "schedule.json")
    assert all({0, 3} <= set(each.full_steps) and each.boundary == 0.8 for each in schedules)
    again = Predictor.from_pretrained(tmp_path / "p")
    assert len(again.parts) == 2 and again.further[0].config.boundary is None
    loaded = load_pipeline(world / "student")
    scales = {"guidance": 4.0, "guidance_2": 4.0}
    assert {name: loaded.call[name] for name in scales} == scales
    for full in ([0, 3], [0, 1, 3, 4]):
        with attach(loaded, predictor=tmp_path / "p", steps=6, full_steps=full) as attached:
            latents = loaded.pipe("a red circle", output_type="latent").frames
        assert latents.isfinite().all()
        assert (attached.full_passes, attached.predicted_passes) == (len(full), 6 - len(full))
    both = {"student": str(world / "student"), "predictor": str(tmp_path / "p")}
    models = Models(BenchmarkConfig(family="wan22", dtype="float32", **both), "cpu")
    row = MethodConfig(steps=6, full_steps=[0, 3])
    with models.running(row, {}) as timed:
        again = timed.pipe("a red circle", output_type="latent", generator=torch.Generator().manual_seed(0)).frames
    with attach(loaded, predictor=tmp_path / "p", steps=6, full_steps=[0, 3]):
        generator = torch.Generator().manual_seed(0)
        assert torch.equal(again, loaded.pipe("a red circle", output_type="latent", generator=generator).frames)
    added = models.parameters(row, timed) - models.parameters(MethodConfig(steps=6), timed)
    assert added == sum(weight.numel() for weight in Predictor.from_pretrained(tmp_path / "p").parameters())


def test_what_one_transformer_alone_can_have_is_refused_first(world, monkeypatch, tmp_path):
    for module in ("training", "untrained"):
        name = f"vidaccel.train.predictor.{module}.load_named"
        monkeypatch.setattr(name, lambda *args, **more: pytest.fail("loaded"))
    with pytest.raises(UserError, match=r"forecaster=linear is fitted to one"):
        vidaccel.train_predictor(config(world, forecaster="linear"), tmp_path / "x")


def test_steps_that_leave_nothing_to_predict_are_refused(world):
    with pytest.raises(UserError, match="each of 2 steps is the first of a transformer"):
        task_of(load_pipeline(world / "student"), config(world, steps=2, shift=1.0), None)


def test_budgets_without_the_first_step_of_each_are_refused_before_a_training(world, caplog):
    """And left out, with a warning, where others are asked for beside them."""
    loaded = load_pipeline(world / "student")
    with pytest.raises(UserError, match=r"budgets=\[1\], and the first step of each of 2 .*\nhint: .*budgets=\[2\]"):
        task_of(loaded, config(world, budgets=[1]), None)
    task_of(loaded, config(world, budgets=[1, 3]), None)
    assert caplog.messages[-1].startswith("budgets=[1] are left out")
    assert [*default_budgets(8, (0,))] == [1, 2, 3, 4] and [*default_budgets(3, (0, 2))] == [2]


@pytest.mark.parametrize("in_turn", [False, True])
def test_a_discriminator_of_each_sees_the_tokens_of_the_transformer_whose_step_it_is(world, monkeypatch, in_turn):
    small = DiscriminatorConfig(depths=[0.5, 1.0], scales=[1], width=8, in_turn=in_turn)
    task = task_of(load_pipeline(world / "student"), config(world, discriminator=small, intervals="grid"), None)
    ran: list[tuple[int, float]] = []
    for which, velocity in enumerate(task.velocities):
        velocity.transformer.register_forward_pre_hook(
            lambda _, args, kwargs, which=which: ran.append((which, float(kwargs["timestep"].min()))), with_kwargs=True
        )
    with task.trunks:
        predictor, pairs = training._start(task)
        loss = PredictorLoss(task.student, task.trunks, predictor, Discriminator(24, small, 2), small)
        sets, turns = [loss.discriminator.heads, loss.discriminator.further[0]], []

        def stage(name, task, model, objective, output, measure):
            for step in range(4):
                ran.clear()
                value, measured = objective(model, step, generator_for(0, step))
                value.backward()
                which, found = step % 2, [any(p.grad is not None for p in each.parameters()) for each in sets]
                assert {each for each, _ in ran} == {which} and min(t for _, t in ran) >= 800 * (which == 0)
                assert found[1 - which] is False and {"discriminator", "adversarial"} <= measured.keys()
                turns.append((found[which], any(p.grad is not None for p in predictor.parameters())))
                model.zero_grad()

        monkeypatch.setattr(training, "_trained", stage)
        training._stage("adversarial", task, pairs, loss, None, None)
    assert turns == ([(True, False)] * 2 + [(False, True)] * 2 if in_turn else [(True, True)] * 4)


def test_a_plan_counts_the_weights_of_both():
    plan = plan_predictor(PredictorConfig(adversarial=TrainConfig(steps=0)), PlanConfig(size_of="wan22"))
    assert plan.parameters["frozen"] == pytest.approx(2 * 14.288e9, rel=1e-3)
    assert plan.memory.shared["student"] == 4 * plan.parameters["frozen"]
    assert plan.memory.shared["gradients"] == 4 * plan.parameters["trained"]
