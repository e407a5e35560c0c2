"""Predictors trained through whole served runs: a toy student by hand, tiny students of real families."""

import json
import logging
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from torch import nn

from tests.students import contents
from tests.students import student as save_tiny_student
from tests.train.test_distill import write_features
from vidaccel.artefacts import read_run, verify_files
from vidaccel.cache.attach import attach
from vidaccel.cache.schedule import read_schedules
from vidaccel.collect.bank import Bank
from vidaccel.config.predictor import PredictorConfig
from vidaccel.config.training import TrainConfig
from vidaccel.data.shards import ShardFolder
from vidaccel.errors import UserError
from vidaccel.forecasters.base import Cached
from vidaccel.forecasters.learned import Predictor
from vidaccel.forecasters.multistep import FittedList
from vidaccel.forecasters.reuse import Reuse
from vidaccel.models.grid import Grid
from vidaccel.models.loading import load_pipeline
from vidaccel.train import trainer
from vidaccel.train.objective import generator_for
from vidaccel.train.predictor import served as module
from vidaccel.train.predictor.comparing import compared
from vidaccel.train.predictor.served import (
    Serving,
    Starts,
    check_lists,
    default_lists,
    served_loss,
    start_predictor,
)
from vidaccel.train.predictor.task import task_of
from vidaccel.train.predictor.training import train_predictor, train_served
from vidaccel.train.step import EagerStep, GraphStep

NO_STAGE = TrainConfig(steps=0)
FAMILIES = ("hunyuan_video", "wan")


# a toy: u = a x, tokens are the velocity


class Toy:
    """Student and trunk in one."""

    def __init__(self, a: float):
        self.a, self.forecaster, self.known, self.kept = a, None, (), ()

    @contextmanager
    def full(self, t):
        self.known, self.remembering = (), True
        yield
        self.remembering = False

    @contextmanager
    def predicted(self, forecaster, t, memory):
        self.forecaster, self.known, self.t = forecaster, memory, t
        yield
        self.forecaster = None

    def memory(self):
        return self.kept

    def reset(self):
        self.kept = ()

    def __call__(self, x, t, text, r=None, g=None):
        if self.forecaster is not None:
            return self.forecaster({"hidden_states": x}, self.known, self.t)["hidden_states"]
        u = self.a * x
        self.kept = (Cached({"hidden_states": u.detach()}, t),)
        return u


class Added(nn.Module):
    """Reuse, with a number added to the tokens at the step of one time."""

    history = 1

    def __init__(self, at: float):
        super().__init__()
        self.at, self.number = at, nn.Parameter(torch.tensor(0.3, dtype=torch.float64))

    def forward(self, arguments, memory, t):
        (tokens,) = memory[0].tokens.values()
        return {"hidden_states": tokens + self.number * (t == self.at)}


def toy(a: float = 0.5) -> Serving:
    made = Toy(a)
    return Serving(made, made, torch.tensor([1.0, 0.75, 0.5, 0.125, 0.0], dtype=torch.float64))  # type: ignore[arg-type]


def noise() -> torch.Tensor:
    return torch.randn(3, 2, 1, 2, 2, generator=torch.Generator().manual_seed(0))


def test_a_served_run_by_hand():
    """u = x / 2, steps of 1/4, 1/4, 3/8 and 1/8, full at 0 and 2."""
    serving, x = toy(), noise()
    states, left = serving.own(x, {}, None, kept=1)
    by_hand = [1.0]
    for dt in (0.25, 0.25, 0.375, 0.125):
        by_hand.append(by_hand[-1] * (1 - 0.5 * dt))
    for state, factor in zip(states, by_hand, strict=True):
        assert torch.allclose(state, factor * x)
    assert len(left) == 1
    second = 1 - 2 * 0.125  # both steps with the velocity x / 2
    third = second * (1 - 0.5 * 0.375)
    fourth = third - 0.125 * 0.5 * second
    made = serving.served(Reuse(), (0, 2), (states, left), {}, None)
    for state, factor in zip(made, (second, third, fourth), strict=True):
        assert torch.allclose(state, factor * x)
    (found,) = compared(serving, Grid((1.0, 0.75, 0.5, 0.125, 0.0)), Reuse(), [(0, 2)], [{"noise": x}])
    assert found.error == pytest.approx(abs(fourth - by_hand[4]) / by_hand[4]) == found.reuse and found.share == 1
    value, error = served_loss(serving, Reuse(), (0, 2), x, {}, None)
    errors = [abs(a - b) / b for a, b in zip((second, third, fourth), by_hand[2:], strict=True)]
    assert float(error) == pytest.approx(errors[2], rel=1e-3)
    assert float(value) == pytest.approx(2 * errors[2] + 0.5 * (errors[0] + errors[1]), rel=1e-3)


def test_a_served_run_under_scalars_by_hand():
    """Steps 1 and 3, with the network's answer, velocities and latents of the full steps before and the step's own
    latent as terms."""
    serving, x = toy(), noise().double()
    numbers = {1: torch.tensor([0.5, 0.2, 0.1, -0.3]), 3: torch.tensor([0.4, 0.3, 0.1, 0.2, -0.1, 0.05])}
    own = serving.own(x, {}, None, kept=1)
    first, second = 1.0, 1 - 0.5 * 0.25
    third = second - 0.25 * (0.5 * 0.5 * first + 0.2 * 0.5 * first + 0.1 * second - 0.3 * first)
    fourth = third * (1 - 0.5 * 0.375)
    answer = 0.4 * 0.5 * third + 0.3 * 0.5 * third + 0.1 * 0.5 * first + 0.2 * fourth - 0.1 * third + 0.05 * first
    last = fourth - 0.125 * answer
    made = serving.served(Reuse(), (0, 2), own, {}, None, numbers)
    for state, factor in zip(made, (third, fourth, last), strict=True):
        assert torch.allclose(state, factor * x, rtol=1e-5)
    as_reuse = {1: torch.tensor([1.0, 0, 0, 0]), 3: torch.tensor([1.0, 0, 0, 0, 0, 0])}
    for under, alone in zip(
        serving.served(Reuse(), (0, 2), own, {}, None, as_reuse),
        serving.served(Reuse(), (0, 2), own, {}, None),
        strict=True,
    ):
        assert torch.allclose(under, alone)


def test_gradients_go_through_later_full_steps():
    """That of the final latents by what is added at step 1, which steps 2 (full) and 3 (from its tokens) follow; by a
    difference. Tokens that are cached pass none on."""
    serving, x, forecaster = toy(), noise().double(), Added(at=0.75)

    def final(number: float) -> torch.Tensor:
        with torch.no_grad():
            forecaster.number.fill_(number)
        own = serving.own(x, {}, None, kept=1)
        return serving.served(forecaster, (0, 2, 3), own, {}, None)[-1].sum()

    final(0.3).backward()
    expected = float((final(0.8) - final(-0.2)).detach())
    assert expected != 0
    assert float(forecaster.number.grad) == pytest.approx(expected, rel=1e-5)
    per_step = -0.25 * x.numel()
    assert expected == pytest.approx(per_step * (1 - 0.5 * 0.375) * (1 - 0.5 * 0.125), rel=1e-5)


# lists


@pytest.mark.parametrize("steps", [2, 3, 4, 6, 8, 10, 20, 50])
def test_the_lists_of_any_grid_are_lists_of_it(steps):
    lists = default_lists(steps)
    assert check_lists(lists, steps) == lists and len(set(lists)) == len(lists)


def test_the_lists_of_eight_steps():
    assert default_lists(8) == [(0, 2), (0, 1, 3), (0, 1, 4), (0, 1, 2, 4), (0, 1, 2, 5)]


@pytest.mark.parametrize("bad", [[], [1, 2], [0, 2, 1], [0, 0], [0, 4], [0, 1, 2, 3]])
def test_what_is_no_list_is_refused(bad):
    with pytest.raises(UserError, match="no full steps of 4") as caught:
        check_lists([[0, 1], bad], 4)
    assert caught.value.hint


# tiny students


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """`world(family)`: a folder with a student, and features for it."""
    made = {}

    def of(family: str):
        if family not in made:
            made[family] = tmp_path_factory.mktemp(family)
            write_features(made[family] / "features", load_pipeline(save_tiny_student(made[family], family)))
        return made[family]

    return of


def settings(world, family="wan", **changes) -> PredictorConfig:
    stage = TrainConfig(steps=4, batch_size=2, learning_rate=1e-3, warmup=0, ema_decay=0.5, log_every=1, save_every=1)
    own = {"student": str(world(family) / "student"), "features": str(world(family) / "features"), "blocks": 1}
    return PredictorConfig(
        **own
        | {"pairs": "served", "search_prompts": 1, "mse": stage, "adversarial": NO_STAGE}
        | {"runs": 8, "checked_prompts": 2, "tried": 1}
        | changes
    )


def task_for(world, family="wan", **changes):
    config = settings(world, family, **changes)
    return task_of(load_pipeline(config.student, dtype="float32"), config, None)


@pytest.mark.parametrize("family", FAMILIES)
def test_an_exact_forecaster_has_no_error(world, family):
    """Which gives the tokens that a full pass would leave there; and reuse has its own."""
    task = task_for(world, family)
    starts = Starts.of(task, 3)
    with task.trunks:
        serving = module.serving_of(task)
        tensors = starts.draw(2, generator_for(0, 0), task.device) | {"g": torch.full((2,), 4.0)}
        _, left = serving.own(tensors["noise"], module.text_of(tensors), tensors["g"], kept=4)

        class Exact(Reuse):
            def __call__(self, arguments, memory, t):
                return next(cached.tokens for cached in left if torch.equal(cached.t, t))

        for forecaster, share in ((Exact(), 0.0), (Reuse(), 1.0)):
            for found in compared(serving, task.sampling.grid, forecaster, [(0, 2), (0, 1)], [tensors, tensors]):
                assert found.share == pytest.approx(share, abs=1e-4) and found.reuse > 1e-3


def test_runs_begin_with_the_first_captions(world):
    task = task_for(world)
    starts = Starts.of(task, 2)
    assert len(starts) == 2 and starts.shape == tuple(task.data[0][0]["latent"].shape)
    for name, text in starts.texts.items():
        assert torch.equal(text[1], task.data[1][0][name].float()[: text.shape[1]])
    tried, learnt = Starts.of(task, 3).apart(1)
    assert (len(tried), len(learnt)) == (1, 2)
    assert all(torch.equal(learnt.texts[name], text) for name, text in starts.texts.items())
    tried, learnt = starts.apart(2)
    assert tried is learnt is starts


@pytest.mark.parametrize("family", FAMILIES)
def test_a_step_in_static_memory_is_the_plain_step(world, family):
    """Lists of full steps are variants of the loss, and scalars come with what is drawn."""
    task = task_for(world, family, lists=[[0, 2], [0, 1], [0, 1, 3]], guidance_range=[2.0, 5.0])
    starts, weights, outcomes = Starts.of(task, 3), [], []
    with task.trunks:
        made = start_predictor(task, starts)
        made_up = {
            each: FittedList(each, numbers_for(each), 4, times=task.sampling.grid.times, network=True)
            for each in module.lists_of(task)
        }
        objective = module.objective_of(task, starts, fits=lambda step: made_up)
        assert [objective.draw(i, generator_for(0, i)).variant for i in range(4)] == [(0, 2), (0, 1), (0, 1, 3), (0, 2)]
        g = objective.draw(0, generator_for(0, 0)).tensors["g"]
        assert ((g >= 2) & (g <= 5)).all() and g[0] != g[1]
        for kind in (EagerStep, GraphStep):
            predictor = Predictor(made.config)
            predictor.load_state_dict(made.state_dict())
            named, graph = dict(predictor.named_parameters()), kind is GraphStep
            optimizers = trainer._optimizers(named, task.config.mse, {}, graph)
            step = kind(predictor, objective, task.config.mse, optimizers, 3, **({"capture": False} if graph else {}))
            outcomes.append([step(index, 1e-3) or step.outcome() for index in range(5)])
            weights.append([p.detach().clone() for p in predictor.parameters()])
    for a, b in zip(*outcomes, strict=True):
        assert b.loss == pytest.approx(a.loss, rel=1e-4) and b.measured["error"] == pytest.approx(a.measured["error"])
        assert a.norm > 0 and a.skipped == b.skipped == 0
    for a, b in zip(*weights, strict=True):
        assert torch.allclose(a, b, atol=1e-5)


def numbers_for(full_steps: tuple[int, ...]) -> dict[int, tuple[float, ...]]:
    """Of each predicted step of four: nearly the network's answer."""
    others = [step for step in range(4) if step not in full_steps]
    return {step: (0.9, 0.1, *[0.01] * (2 * sum(full < step for full in full_steps))) for step in others}


def test_nothing_in_the_loss_asks_for_a_value(world, monkeypatch):
    task = task_for(world)
    starts = Starts.of(task, 3)
    with task.trunks:
        predictor, objective = start_predictor(task, starts), module.objective_of(task, starts)
        drawn = objective.draw(0, generator_for(0, 0))
        for name in ("item", "tolist", "__bool__", "__float__", "__int__"):
            monkeypatch.setattr(torch.Tensor, name, refuse(name))
        objective.loss(predictor, drawn)[0].backward()


def refuse(name):
    def asked(*_):
        raise AssertionError(f"{name} waits for the device")

    return asked


@pytest.mark.parametrize("family", FAMILIES)
def test_training_lowers_the_error_below_that_of_reuse(world, family, tmp_path, caplog):
    caplog.set_level(logging.INFO, "vidaccel")
    config = settings(world, family, search_prompts=3)
    config = replace(config, mse=replace(config.mse, steps=60, learning_rate=5e-3, save_every=100))
    schedules = train_predictor(config, tmp_path)
    assert [schedule.budget for schedule in schedules] == [1, 2, 3, 4]
    run = read_run(tmp_path, "predictor/1")
    verify_files(tmp_path, run)
    of_lists = {tuple(each["full_steps"]): each["of_reuse"] for each in run["compared"]}
    assert set(default_lists(4)) <= of_lists.keys()
    assert all(of_lists[each] < 1 for each in default_lists(4))
    assert "as served at" in caplog.text and "of reuse" in caplog.text and "worse than" not in caplog.text
    lines = (tmp_path / "checkpoints" / "mse" / "metrics.jsonl").read_text().splitlines()
    assert len(lines) == 60 and "error" in json.loads(lines[0])
    assert not (tmp_path / "trajectories").exists()
    again = train_predictor(replace(config, stage="search", steps=6), tmp_path)
    assert {schedule.steps for schedule in again} == {6} and read_run(tmp_path, "predictor/1")["compared"]


def test_a_predictor_that_is_worse_than_reuse_is_said_to_be(world, tmp_path, caplog):
    """Whatever it was trained on."""
    stage = TrainConfig(steps=3, batch_size=2, learning_rate=0.3, warmup=0, schedule="constant", ema_decay=0.0)
    train_predictor(settings(world, pairs="data", mse=stage), tmp_path)
    assert "worse than giving the cached tokens again (predictor=reuse) at 0" in caplog.text
    assert any(each["of_reuse"] > 1 for each in read_run(tmp_path, "predictor/1")["compared"])


@pytest.mark.parametrize("changes", [{}, {"scalars_every": 2, "runs": 10}], ids=["alone", "under scalars"])
def test_a_killed_training_ends_as_one_that_was_not(world, tmp_path, monkeypatch, changes):
    """Under scalars within the two steps of a fit, which is not made again."""
    config = settings(world, "hunyuan_video", **changes)
    config = replace(config, mse=replace(config.mse, steps=4, gates_every=2))
    train_predictor(config, tmp_path / "straight")
    plain, calls = module.served_loss, []

    def interrupted(*given):
        calls.append(None)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return plain(*given)

    monkeypatch.setattr(module, "served_loss", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train_predictor(config, tmp_path / "killed")
    monkeypatch.undo()
    train_predictor(config, tmp_path / "killed")
    for name in ("model.safetensors", "config.json", "schedule.json"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "straight" / name).read_bytes()
    folder = tmp_path / "killed" / "checkpoints" / "mse"
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    curves = {f"error_over_reuse/{' '.join(map(str, each))}" for each in default_lists(4)}
    assert [curves <= line.keys() for line in lines] == [False, True, False, True] and (folder / "gates.png").exists()
    if changes:
        assert len(list(folder.glob("scalars-*.json"))) == 2
        weights = (tmp_path / "straight" / "model.safetensors").read_bytes()
        train_predictor(replace(config, scalars_every=0), tmp_path / "alone")
        assert (tmp_path / "alone" / "model.safetensors").read_bytes() != weights
        with pytest.raises(UserError, match=r"ridge was .*, now 0.5"):
            train_predictor(replace(config, ridge=0.5), tmp_path / "killed")


def test_two_full_steps_are_looked_back_on_if_asked_for(world, tmp_path):
    train_predictor(settings(world, history=2), tmp_path)
    assert Predictor.from_pretrained(tmp_path).history == 2


def test_a_bank_trains_one_that_serves(world, tmp_path):
    """On the model that is there; and what was finished is not trained again."""
    config = settings(world, features=None, lists=[[0, 1], [0, 2], [0, 1, 3]])
    loaded = load_pipeline(config.student, dtype="float32")
    bank = Bank.of(ShardFolder(world("wan") / "features", "encoded"), torch.device("cpu"), loaded.family)
    found = train_served(loaded, bank, config, tmp_path)
    assert {each.full_steps for each in found} == {(0, 1), (0, 2), (0, 1, 3)}
    run = read_run(tmp_path, "predictor/1")
    verify_files(tmp_path, run)
    assert len(run["compared"]) == 3 and (tmp_path / "README.md").exists()
    schedules = {schedule.budget: schedule for schedule in read_schedules(tmp_path / "schedule.json")}
    on_top = {len(each["full_steps"]): each for each in run["fitted"]}
    assert on_top and (tmp_path / "scalars.json").exists()
    for budget, schedule in schedules.items():
        if budget in on_top:  # kept because they are better than the network alone
            made, error = on_top[budget]["full_steps"], on_top[budget]["error"]
            assert error < on_top[budget]["network"]
        else:
            best = min((each for each in found if len(each.full_steps) == budget), key=lambda each: each.error)
            made, error = best.full_steps, best.error
        assert (schedule.full_steps, schedule.expected_error) == (tuple(made), pytest.approx(error))
    assert "scalars on top" in (tmp_path / "README.md").read_text()
    before = contents(tmp_path)
    assert train_served(loaded, bank, config, tmp_path) == found
    assert contents(tmp_path) | {"run.json": ""} == before | {"run.json": ""}
    timed = replace(config, mse=replace(config.mse, steps=None, minutes=0.01))
    assert len(train_served(loaded, bank, timed, tmp_path / "timed")) == 3
    with attach(load_pipeline(config.student, dtype="float32"), predictor=str(tmp_path), steps=4, budget=2):
        pass


# faults


def test_what_cannot_be_trained_so_is_refused(world, tmp_path):
    for message, changes in {
        "must be 0 with pairs=served": {"adversarial": TrainConfig(steps=1)},
        "is for pairs=served": {"pairs": "data", "lists": [[0, 1]]},
        "is one list of full steps or more": {"lists": []},
    }.items():
        with pytest.raises(UserError, match=message):
            settings(world, **changes)
    with pytest.raises(UserError, match="no full steps of 4"):
        train_predictor(settings(world, lists=[[0, 4]]), tmp_path)
    assert not (tmp_path / "run.json").exists()
