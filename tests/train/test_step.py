import json
import math
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tests.train.test_trainer import CONFIG, metrics
from vidaccel.config.training import TrainConfig
from vidaccel.errors import TrainingFailed, UserError
from vidaccel.train import step as step_module
from vidaccel.train import trainer
from vidaccel.train.objective import Batch, Objective, generator_for
from vidaccel.train.step import CaptureFailed, EagerStep, GraphStep, why_eager
from vidaccel.train.trainer import train

SEED = 3


class Blocks(nn.Module):
    """Matrices in a list, for Muon, and what is none."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(7)
        self.first, self.blocks = nn.Linear(3, 8), nn.ModuleList(nn.Linear(8, 8) for _ in range(2))
        self.last = nn.Linear(8, 1)

    def forward(self, x):
        x = self.first(x)
        for block in self.blocks:
            x = x + torch.tanh(block(x))
        return self.last(x)


def draw(index: int, generator: torch.Generator) -> Batch:
    x = torch.randn(4, 3, generator=generator)
    return Batch({"x": x, "y": x.sum(1, keepdim=True)}, index % 2)


def loss(model, batch):
    error = (model(batch.tensors["x"]) - batch.tensors["y"]).square()
    value = error.mean() if batch.variant == 0 else error.sqrt().mean()
    return value, {"largest": error.max()}


OBJECTIVE = Objective(draw, loss)


def spoilt(*bad: int) -> Objective:
    """`OBJECTIVE` with a loss that is not finite in those passes."""

    def drawn(index, generator):
        batch = draw(index, generator)
        return batch if index not in bad else Batch({n: t * math.nan for n, t in batch.tensors.items()}, batch.variant)

    return Objective(drawn, loss)


def steps_of(kind, config: TrainConfig, objective=OBJECTIVE, count: int = 8):
    """Weights after a few steps, and the outcomes."""
    model = Blocks()
    graph = kind is GraphStep
    optimizers = trainer._optimizers(dict(model.named_parameters()), config, {}, graph)
    more = {"capture": False} if graph else {}
    step = kind(model, objective, config, optimizers, SEED, **more)
    outcomes = []
    for index in range(count):
        outcomes.append(step(index, 0.01) or step.outcome())
    return [p.detach().clone() for p in model.parameters()], outcomes, optimizers


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_step_in_static_memory_is_the_plain_step(optimizer, precision):
    config = TrainConfig(batch_size=4, optimizer=optimizer, precision=precision, clip_norm=0.5)
    plain, of_plain, _ = steps_of(EagerStep, config)
    static, of_static, _ = steps_of(GraphStep, config)
    for a, b in zip(plain, static, strict=True):
        assert torch.allclose(a, b, atol=2e-3 if optimizer == "muon" else 1e-6)  # Muon's products are in bfloat16
    for a, b in zip(of_plain, of_static, strict=True):
        assert a.measured.keys() == b.measured.keys() == {"largest"}
        assert b.loss == pytest.approx(a.loss, rel=2e-2) and b.norm == pytest.approx(a.norm, rel=5e-2)
        assert a.skipped == b.skipped == 0


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_steps_that_are_not_finite_change_nothing_and_are_counted(optimizer):
    config = TrainConfig(batch_size=4, optimizer=optimizer)
    weights, outcomes, optimizers = steps_of(GraphStep, config, spoilt(2, 3, 6))
    assert all(p.isfinite().all() for p in weights)
    assert [o.skipped for o in outcomes] == [0, 0, 1, 1, 0, 0, 1, 0]
    assert [o.bad_in_a_row for o in outcomes][2:4] == [1, 2]
    assert [o.good for o in outcomes] == [True, True, False, False, True, True, False, True]
    counted = [float(state["step"]) for state in optimizers[0].state.values()]
    assert set(counted) == {5.0}
    plain, *_ = steps_of(EagerStep, config, spoilt(2, 3, 6))
    for a, b in zip(plain, weights, strict=True):
        assert torch.allclose(a, b, atol=2e-3 if optimizer == "muon" else 1e-6)


def test_rehearsals_leave_weights_and_moments():
    _, _, optimizers = steps_of(GraphStep, TrainConfig(batch_size=4), count=1)
    assert {float(state["step"]) for state in optimizers[0].state.values()} == {1.0}


def test_why_a_step_is_eager():
    model, config = Blocks(), TrainConfig()
    assert why_eager(model, OBJECTIVE, config) == "there is no CUDA device"

    class OnCuda(nn.Module):
        def parameters(self, recurse=True):
            yield type("P", (), {"device": torch.device("cuda")})()

    cuda = OnCuda()
    assert why_eager(cuda, OBJECTIVE, config) is None
    assert why_eager(cuda, OBJECTIVE, replace(config, checkpointing=True)) == "activations are checkpointed"
    assert why_eager(cuda, OBJECTIVE, replace(config, accumulate=2)) == "gradients are accumulated"
    assert why_eager(cuda, lambda *_: None, config) == "this loss waits for the device"


def test_graph_on_is_refused_where_it_cannot_be(tmp_path):
    with pytest.raises(UserError, match="graph=on, and there is no CUDA device"):
        train(Blocks(), OBJECTIVE, replace(CONFIG, accumulate=1, graph="on"), tmp_path, seed=0, title="t", settings={})


def forced(monkeypatch, capture=False):
    """Graph steps where there is no CUDA device, of which capturing fails if asked for."""
    monkeypatch.setattr(trainer, "why_eager", lambda *_: None)
    monkeypatch.setattr(trainer, "GraphStep", lambda *given: GraphStep(*given, capture=capture))


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_training_in_static_memory_logs_saves_and_resumes(tmp_path, monkeypatch, optimizer):
    config = replace(CONFIG, accumulate=1, log_every=5, optimizer=optimizer)
    forced(monkeypatch)

    def run(folder, **changes):
        return train(Blocks(), OBJECTIVE, replace(config, **changes), folder, seed=0, title="t", settings={})

    straight = run(tmp_path / "straight")

    class Stop(Exception):
        pass

    def stopping(index, generator):
        if index == 13:
            raise Stop
        return draw(index, generator)

    with pytest.raises(Stop):
        train(Blocks(), Objective(stopping, loss), config, tmp_path / "resumed", seed=0, title="t", settings={})
    resumed = run(tmp_path / "resumed")
    for a, b in zip(straight.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)
    lines = metrics(tmp_path / "straight")
    assert [line["step"] for line in lines] == [5, 10, 15, 20] and all("largest" in line for line in lines)
    assert metrics(tmp_path / "resumed") == lines


def test_ten_bad_steps_end_a_training_in_static_memory(tmp_path, monkeypatch):
    forced(monkeypatch)
    config = replace(CONFIG, accumulate=1, steps=40)
    with pytest.raises(TrainingFailed, match="10 steps in a row"):
        train(Blocks(), spoilt(*range(5, 40)), config, tmp_path, seed=0, title="t", settings={})


def test_a_capture_that_fails_leaves_the_plain_training(tmp_path, monkeypatch, caplog):
    config = replace(CONFIG, accumulate=1)
    forced(monkeypatch)

    def failing(self, batch):
        raise CaptureFailed("the driver says no")

    monkeypatch.setattr(step_module.GraphStep, "_prepared", failing)
    trained = train(Blocks(), OBJECTIVE, config, tmp_path / "a", seed=0, title="t", settings={})
    assert "capturing one failed: the driver says no" in caplog.text
    monkeypatch.undo()
    plain = train(Blocks(), OBJECTIVE, config, tmp_path / "b", seed=0, title="t", settings={})
    for a, b in zip(trained.parameters(), plain.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-6)
    forced(monkeypatch)
    monkeypatch.setattr(step_module.GraphStep, "_prepared", failing)
    with pytest.raises(UserError, match="a step is no CUDA graph"):
        train(Blocks(), OBJECTIVE, replace(config, graph="on"), tmp_path / "c", seed=0, title="t", settings={})


# Minutes


class Clock:
    """Time that passes by a second a step."""

    def __init__(self, monkeypatch, seconds: float = 1.0):
        self.now = 0.0
        monkeypatch.setattr(trainer.time, "monotonic", lambda: self.now)
        self.seconds = seconds

    def objective(self) -> Objective:
        def drawn(index, generator):
            self.now += self.seconds
            return draw(index, generator)

        return Objective(drawn, loss)


def test_minutes_end_a_training_and_its_rate_falls_over_them(tmp_path, monkeypatch):
    clock = Clock(monkeypatch)
    config = replace(CONFIG, steps=None, minutes=0.5, accumulate=1, warmup=0, log_every=1)
    train(Blocks(), clock.objective(), config, tmp_path, seed=0, title="t", settings={})
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 30
    # The first second is preparation: the other 29 share the cosine.
    expected = [0.005 * (1 + math.cos(math.pi * max(0, i - 1) / 29)) for i in range(30)]
    assert [line["lr"] for line in lines] == pytest.approx(expected)
    state = json.loads((tmp_path / "checkpoints" / "step-00000030" / "state.json").read_text())
    assert state["share"] == 1.0 and state["seconds"] == 30.0


def test_a_run_of_minutes_is_repeated_by_its_steps(tmp_path, monkeypatch):
    clock = Clock(monkeypatch)
    config = replace(CONFIG, steps=None, minutes=0.2, accumulate=1, warmup=0, schedule="constant")
    timed = train(Blocks(), clock.objective(), config, tmp_path / "a", seed=0, title="t", settings={})
    steps = json.loads((tmp_path / "a" / "metrics.jsonl").read_text().splitlines()[-1])["step"]
    counted = train(
        Blocks(), OBJECTIVE, replace(config, minutes=None, steps=steps), tmp_path / "b", seed=0, title="t", settings={}
    )
    for a, b in zip(timed.parameters(), counted.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_resumed_run_of_minutes_has_what_was_left(tmp_path, monkeypatch):
    clock = Clock(monkeypatch)
    config = replace(CONFIG, steps=None, minutes=0.5, accumulate=1, warmup=0, log_every=1)
    objective = clock.objective()

    def stopping(index, generator):
        if index == 12:
            raise KeyboardInterrupt
        return objective.draw(index, generator)

    with pytest.raises(KeyboardInterrupt):
        train(Blocks(), Objective(stopping, loss), config, tmp_path, seed=0, title="t", settings={})
    clock.now += 1000
    train(Blocks(), objective, config, tmp_path, seed=0, title="t", settings={})
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 31))
    rates = [line["lr"] for line in lines]
    assert rates == sorted(rates, reverse=True) and rates[-1] < 1e-4
    clock.now += 1000
    train(Blocks(), objective, config, tmp_path, seed=0, title="t", settings={})  # which makes no step more
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 30


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"steps": 5, "minutes": 1.0}, "two ways to end"),
        ({"minutes": 0.0}, "above 0"),
        ({"minutes": -1.0}, "above 0"),
        ({"minutes": math.inf}, "finite"),
        ({"minutes": math.nan}, "finite"),
        ({"graph": "maybe"}, "auto, on or off"),
    ],
)
def test_bad_settings(given, message):
    with pytest.raises(UserError) as refused:
        TrainConfig(**given)
    assert message in f"{refused.value.message} {refused.value.hint}"


def test_without_steps_and_minutes_there_are_1000():
    assert TrainConfig().steps == 1000 and TrainConfig(minutes=1.0).steps is None


def test_generators_on_other_devices_repeat():
    a, b = (torch.rand(3, generator=generator_for(1, 2, "cpu")) for _ in range(2))
    assert torch.equal(a, b)
    assert F.mse_loss(a, b) == 0
