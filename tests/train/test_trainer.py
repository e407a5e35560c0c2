import json
import math
import os
import pkgutil
import signal
import subprocess
import sys
from collections.abc import Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F

from vidaccel.config.training import TrainConfig
from vidaccel.errors import UserError
from vidaccel.train import metrics as metrics_module
from vidaccel.train.average import Average
from vidaccel.train.objective import generator_for
from vidaccel.train.step import autocast
from vidaccel.train.trainer import TrainingFailed, learning_rate, train

CONFIG = TrainConfig(
    steps=20, batch_size=4, accumulate=2, learning_rate=0.01, warmup=3, ema_decay=0.9, save_every=5, log_every=2
)
STATES = ("model.safetensors", "ema.safetensors", "optimizer.safetensors")


def tiny() -> nn.Module:
    torch.manual_seed(7)
    return nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Dropout(0.25), nn.Linear(8, 1))


def regression(model, index, generator):
    """Noisy samples of a linear function; the dropout of `tiny` draws from the global generator."""
    x = torch.randn(4, 3, generator=generator)
    y = x.sum(1, keepdim=True) + 0.1 * torch.randn(4, 1, generator=generator)
    loss = F.mse_loss(model(x), y)
    return loss, {"index": index, "largest": float(x.max())}


def spoilt(*bad: int, value: float = math.nan):
    """`regression` whose loss, and with it the gradient, is `value` in those forward passes."""

    def loss(model, index, generator):
        clean, metrics = regression(model, index, generator)
        return (clean * value if index in bad else clean), metrics

    return loss


def run(
    folder: Path,
    loss=regression,
    config: TrainConfig = CONFIG,
    model: nn.Module | None = None,
    seed: int = 3,
    settings: Mapping = MappingProxyType({}),
    **more,
):
    model = tiny() if model is None else model
    return train(model, loss, config, folder, seed=seed, title="tiny", settings=settings, **more)


def interrupting_at(stop: int, loss=regression):
    """`loss`, stopped in the middle of forward pass `stop`."""

    def interrupted(model, index, generator):
        if index == stop:
            raise KeyboardInterrupt
        return loss(model, index, generator)

    return interrupted


def metrics(folder: Path) -> list[dict]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert all(line.pop("seconds") >= 0 for line in lines)
    return lines


def checkpoints(folder: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step-")) for path in (folder / "checkpoints").iterdir())


def outcome(folder: Path) -> dict:
    """All that a run leaves, apart from times: bytes of each checkpoint's tensors, its state, metrics."""
    result = {"metrics": metrics(folder)}
    for checkpoint in sorted((folder / "checkpoints").iterdir()):
        state = json.loads((checkpoint / "state.json").read_text())
        assert state.pop("seconds") >= 0
        result[checkpoint.name] = [state, *((checkpoint / name).read_bytes() for name in STATES)]
    return result


@pytest.fixture(scope="module")
def straight(tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("straight")
    run(folder)
    return outcome(folder)


# Mathematics


@settings(deadline=None)
@given(
    data=st.data(),
    steps=st.integers(1, 500),
    warmup=st.integers(0, 100),
    schedule=st.sampled_from(["cosine", "constant"]),
    rate=st.floats(1e-6, 1.0),
)
def test_learning_rate_has_a_closed_form(data, steps, warmup, schedule, rate):
    step = data.draw(st.integers(0, steps - 1))
    expected = rate
    if step < warmup:
        expected = rate * (step + 1) / warmup
    elif schedule == "cosine":
        expected = rate * math.cos(math.pi / 2 * (step - warmup) / (steps - warmup)) ** 2  # = (1 + cos 2x) / 2
    config = TrainConfig(steps=steps, warmup=warmup, schedule=schedule, learning_rate=rate)
    assert learning_rate(config, step) == pytest.approx(expected, rel=1e-9)
    assert 0 < learning_rate(config, step) <= rate * (1 + 1e-12)


@pytest.mark.parametrize("schedule", ["cosine", "constant"])
def test_learning_rate_peaks_where_warm_up_ends(schedule):
    config = TrainConfig(steps=100, warmup=10, schedule=schedule, learning_rate=0.5)
    assert learning_rate(config, 0) == 0.05
    assert learning_rate(config, 9) == learning_rate(config, 10) == 0.5
    assert learning_rate(config, 55) == pytest.approx(0.25 if schedule == "cosine" else 0.5)


@settings(deadline=None)
@given(seed=st.integers(0, 2**62), index=st.integers(0, 2**40), others=st.sets(st.integers(0, 10_000), min_size=2))
def test_generators_repeat_and_differ(seed, index, others):
    def drawn(i):
        return tuple(torch.randint(2**62, (4,), generator=generator_for(seed, i)).tolist())

    assert drawn(index) == drawn(index)
    assert len({drawn(i) for i in others}) == len(others)


def test_dropout_draws_from_another_stream_than_the_loss(tmp_path):
    """Else the mask would follow from the noise it falls on."""
    pairs = []

    def loss(model, index, generator):
        pairs.append((torch.rand(8, generator=generator).tolist(), torch.rand(8).tolist()))
        return regression(model, index, generator)

    run(tmp_path, loss)
    drawn = [tuple(stream) for pair in pairs for stream in pair]
    assert len(set(drawn)) == len(drawn) == 2 * CONFIG.steps * CONFIG.accumulate


def test_ema_is_the_recursion_in_float64(tmp_path, monkeypatch):
    model, seen = tiny(), []
    step = torch.optim.AdamW.step

    def watched(self, *arguments):
        step(self, *arguments)
        seen.append([p.detach().double() for p in model.parameters()])

    monkeypatch.setattr(torch.optim.AdamW, "step", watched)
    average = run(tmp_path, model=model)
    expected = seen[0]
    for n, weights in enumerate(seen[1:], start=1):
        decay = min(CONFIG.ema_decay, (1 + n) / (10 + n))
        expected = [decay * e + (1 - decay) * w for e, w in zip(expected, weights, strict=True)]
    assert len(seen) == CONFIG.steps
    assert not average.training
    assert average is model
    for actual, e, last in zip(average.parameters(), expected, seen[-1], strict=True):
        torch.testing.assert_close(actual.double(), e, rtol=1e-6, atol=1e-6)
        assert not torch.equal(actual.double(), last)


@pytest.mark.parametrize("parts", [2, 3, 8])
def test_accumulated_batches_equal_a_big_one(tmp_path, parts):
    x = torch.randn(24, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    y = x @ torch.tensor([[1.0], [-2.0], [3.0]], dtype=torch.float64)

    def trained(accumulate):
        batches = list(zip(x.chunk(accumulate), y.chunk(accumulate), strict=True))

        def loss(model, index, generator):
            inputs, targets = batches[index % accumulate]
            return F.mse_loss(model(inputs), targets), {}

        torch.manual_seed(0)
        model = nn.Linear(3, 1).double()
        run(tmp_path / str(accumulate), loss, replace(CONFIG, accumulate=accumulate), model)
        return model, [line["loss"] for line in metrics(tmp_path / str(accumulate))]

    (big, big_losses), (small, small_losses) = trained(1), trained(parts)
    torch.testing.assert_close(small.state_dict(), big.state_dict(), rtol=1e-9, atol=1e-12)
    assert small_losses == pytest.approx(big_losses, rel=1e-9)


def test_one_step_is_adamw_on_the_clipped_gradient(tmp_path):
    """Gradient (3, 4) * 10, norm 50; Adam's first step is lr * g / (|g| + eps), after decoupled weight decay."""
    model = nn.Linear(2, 1, bias=False).double()
    nn.init.constant_(model.weight, 1.0)
    direction = torch.tensor([[30.0, 40.0]], dtype=torch.float64)
    config = TrainConfig(
        steps=1, learning_rate=0.1, warmup=0, weight_decay=0.5, clip_norm=1e-8, schedule="constant", log_every=1
    )
    run(tmp_path, lambda model, index, generator: ((model.weight * direction).sum(), {}), config, model)
    clipped = direction * 1e-8 / (50 + 1e-6)
    expected = 1 - 0.1 * 0.5 - 0.1 * clipped / (clipped + 1e-8)
    torch.testing.assert_close(model.weight.detach(), expected, rtol=1e-9, atol=0)
    assert metrics(tmp_path)[0]["grad_norm"] == pytest.approx(50)


MUON = replace(CONFIG, optimizer="muon")


class Blocks(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Linear(4, 6)
        self.blocks = nn.ModuleList([nn.Linear(6, 6), nn.Linear(6, 12)])


def test_muon_turns_the_matrices_of_blocks_by_their_gradients_polar_factor_and_adamw_moves_the_rest(tmp_path):
    """A multiple of a rotation Q has the polar factor Q. Muon's iteration ends with singular values of 0.68 to 1.2, all
    of them the same here, so that the update is a multiple of Q, whatever the gradient's length."""
    model, before = Blocks(), Blocks()
    square, wide = (torch.linalg.qr(torch.randn(n, 6, generator=generator_for(0, n)))[0] for n in (6, 12))
    slopes = {"blocks.0.weight": 1e-3 * square, "blocks.1.weight": 1e3 * wide, "blocks.0.bias": torch.arange(1.0, 7.0)}
    slopes["embed.weight"] = torch.arange(1.0, 25.0).view(6, 4)

    def loss(model, index, generator):
        return sum((model.get_parameter(name) * slope).sum() for name, slope in slopes.items()), {}

    config = TrainConfig(steps=1, optimizer="muon", learning_rate=1e-3, warmup=0, schedule="constant", ema_decay=0.0)
    run(tmp_path, loss, config, model)
    moved = {name: p.detach() - before.get_parameter(name).detach() for name, p in model.named_parameters()}
    for name, q in (("blocks.0.weight", square), ("blocks.1.weight", wide)):
        length = float((moved[name] * q).sum() / (q * q).sum())
        assert 0.65 < -length / (5 * 1e-3 * 0.2 * math.sqrt(max(q.shape))) < 1.25
        torch.testing.assert_close(moved[name], length * q, rtol=0, atol=0.02 * abs(length))
    for name in ("blocks.0.bias", "embed.weight"):
        torch.testing.assert_close(moved[name], torch.full_like(moved[name], -1e-3), rtol=1e-4, atol=1e-7)


def test_muon_resumes_bit_for_bit(tmp_path):
    run(tmp_path / "straight", config=MUON)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "resumed", interrupting_at(23), MUON)
    run(tmp_path / "resumed", config=MUON)
    assert outcome(tmp_path / "resumed") == outcome(tmp_path / "straight")


def test_muon_is_refused_where_pytorch_has_none(tmp_path, monkeypatch):
    monkeypatch.delattr(torch.optim, "Muon")
    with pytest.raises(UserError, match="needs PyTorch 2.9"):
        run(tmp_path, config=MUON)


def test_frozen_weights_stay_and_tied_weights_stay_tied(tmp_path):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.frozen, self.inner, self.outer = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3)
            self.frozen.requires_grad_(False)
            self.outer.weight = self.inner.weight

        def forward(self, x):
            return self.outer(self.inner(self.frozen(x))).sum(1, keepdim=True)

    model, fresh = Tied(), Tied()
    average = run(tmp_path, model=model)
    again = run(tmp_path, model=fresh)
    assert fresh.outer.weight is fresh.inner.weight
    assert torch.equal(fresh.frozen.weight, Tied().frozen.weight)
    for a, b in ((model, fresh), (average, again)):
        torch.testing.assert_close(a.state_dict(), b.state_dict(), rtol=0, atol=0)


def test_metrics_are_those_of_the_whole_step(tmp_path):
    """Passes 2n and 2n + 1 make step n."""
    run(tmp_path, config=replace(CONFIG, log_every=1))
    assert [line["index"] for line in metrics(tmp_path)] == [2 * n + 0.5 for n in range(CONFIG.steps)]


class Once(nn.Module):
    """Counts its calls."""

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner, self.calls = inner, 0

    def forward(self, *arguments):
        self.calls += 1
        return self.inner(*arguments)


def test_recomputed_activations_give_the_same_training(tmp_path):
    from tests.tiny import tiny_pipeline  # here, or it slows the processes that are forked below

    def trained(checkpointing):
        model = tiny_pipeline("wan").transformer
        model.blocks[0] = Once(model.blocks[0])

        def loss(model, index, generator):
            x, text = torch.randn(1, 4, 2, 4, 4, generator=generator), torch.randn(1, 6, 32, generator=generator)
            return model(x, torch.full((1,), 500.0), text, return_dict=False)[0].square().mean(), {}

        config = replace(CONFIG, steps=3, log_every=1, checkpointing=checkpointing)
        run(tmp_path / str(checkpointing), loss, config, model)
        return model.blocks[0].calls, model.state_dict(), metrics(tmp_path / str(checkpointing))

    (once, kept, kept_metrics), (twice, again, again_metrics) = trained(False), trained(True)
    assert (once, twice) == (6, 12)
    torch.testing.assert_close(again, kept, rtol=1e-6, atol=1e-7)
    for a, b in zip(again_metrics, kept_metrics, strict=True):
        assert a == pytest.approx(b, rel=1e-6)


def test_a_model_that_cannot_recompute_activations_says_so(tmp_path):
    with pytest.raises(UserError, match="Sequential cannot compute activations again") as error:
        run(tmp_path, config=replace(CONFIG, checkpointing=True))
    assert error.value.hint == "set its checkpointing to false"


def test_half_precision_and_frozen_models_are_not_trained(tmp_path):
    with pytest.raises(ValueError, match="0.weight is torch.bfloat16: what is trained has to be float32"):
        run(tmp_path, model=tiny().bfloat16())
    with pytest.raises(ValueError, match="no parameter of the model requires a gradient"):
        run(tmp_path, model=tiny().requires_grad_(False))
    assert list(tmp_path.iterdir()) == []


def test_a_frozen_part_may_be_in_half_precision_and_is_not_saved(tmp_path):
    model = nn.Sequential(nn.Linear(3, 3).bfloat16().requires_grad_(False), tiny())

    def loss(model, index, generator):
        x = torch.randn(4, 3, generator=generator)
        return model[1](model[0](x.bfloat16()).float()).square().mean(), {}

    run(tmp_path, loss, model=model)
    newest = tmp_path / "checkpoints" / "step-00000020"
    names = [f"1.{i}.{name}" for i in (0, 3) for name in ("bias", "weight")]
    assert sorted(load_file(newest / "model.safetensors")) == names
    assert sorted(load_file(newest / "ema.safetensors")) == names


def test_bfloat16_computes_in_bfloat16_and_keeps_float32_weights(tmp_path):
    dtypes = set()

    def loss(model, index, generator):
        x = torch.randn(4, 3, generator=generator)
        output = model(x)
        dtypes.add(output.dtype)
        return F.mse_loss(output.float(), x.sum(1, keepdim=True)), {}

    def evaluate(model):
        evaluated.add(model(torch.ones(1, 3)).dtype)
        return 0.0

    model, evaluated, sampled = tiny(), set(), set()
    config = replace(CONFIG, precision="bfloat16", evaluate_every=5, sample_every=5)
    average = run(
        tmp_path, loss, config, model, evaluate=evaluate, sample=lambda _: sampled.add(model(torch.ones(1, 3)).dtype)
    )
    assert dtypes == evaluated == sampled == {torch.bfloat16}
    assert {p.dtype for p in (*model.parameters(), *average.parameters())} == {torch.float32}
    assert all(math.isfinite(line["loss"]) for line in metrics(tmp_path))


@pytest.mark.parametrize("checkpointing", [True, False])
def test_where_activations_are_computed_again_no_copies_of_weights_are_kept(checkpointing):
    layer, config = nn.Linear(2, 2), replace(CONFIG, precision="bfloat16", checkpointing=checkpointing)
    with autocast(config, torch.device("cpu")):
        transposed = [layer(torch.ones(1, 2)).grad_fn.next_functions[-1][0] for _ in range(2)]
    casts = [each.next_functions[0][0] for each in transposed]
    assert (casts[0] is casts[1]) != checkpointing


# Averaged weights: evaluated, sampled, put away again


def valued(*values: float, seen: list | None = None):
    """An evaluation that returns these in turn, and notes the weights it finds."""
    following = iter(values)

    def evaluate(model):
        assert not model.training
        assert not torch.is_grad_enabled()
        if seen is not None:
            seen.append([p.detach().clone() for p in model.parameters()])
        torch.rand(3)  # what is drawn here must not matter
        return next(following)

    return evaluate


def test_evaluation_and_samples_see_averages_and_leave_no_trace(tmp_path, straight):
    """At steps 4, 8, ... the average is what ema.safetensors of those steps holds, and training goes on as if nothing
    had happened, to the bit."""
    model, evaluated, sampled = tiny(), [], []

    def sample(step):
        sampled.append((step, {name: p.detach().clone() for name, p in model.named_parameters()}))

    config = replace(CONFIG, evaluate_every=4, sample_every=5)
    run(tmp_path, config=config, model=model, evaluate=valued(5, 4, 4, 4, 4, seen=evaluated), sample=sample)
    assert [step for step, _ in sampled] == [5, 10, 15, 20]
    for step, index in ((15, 2), (20, 3)):
        saved = load_file(tmp_path / "checkpoints" / f"step-{step:08d}" / "ema.safetensors")
        assert all(torch.equal(a, saved[name]) for name, a in sampled[index][1].items())
    assert all(torch.equal(a, b) for a, b in zip(evaluated[4], sampled[3][1].values(), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(evaluated[4], model.parameters(), strict=True))
    ours = outcome(tmp_path)
    for checkpoint in ("step-00000015", "step-00000020"):
        assert ours[checkpoint][1:] == straight[checkpoint][1:]
    evaluations = {line["step"]: line.pop("evaluation") for line in ours["metrics"] if "evaluation" in line}
    assert evaluations == {4: 5, 8: 4, 12: 4, 16: 4, 20: 4}
    assert ours["metrics"] == straight["metrics"]


def test_samples_that_fail_cost_a_warning_each_and_change_nothing(tmp_path, straight, caplog):
    """They come after the checkpoint of their step; 0 is never."""
    saved = []

    def sample(step):
        saved.append((step, (tmp_path / "some" / "checkpoints" / f"step-{step:08d}").exists()))
        raise UserError("the sheet cannot be written", "hint")

    run(tmp_path / "some", config=replace(CONFIG, sample_every=10), sample=sample)
    assert saved == [(10, True), (20, True)]
    assert "the samples of step 20 failed (failure 2); training goes on: the sheet cannot be written" in caplog.text
    run(tmp_path / "never", config=replace(CONFIG, sample_every=0), sample=sample)
    assert len(saved) == 2
    assert outcome(tmp_path / "some") == outcome(tmp_path / "never") == straight


def test_exchanged_weights_come_back_bit_for_bit():
    model = tiny().eval()
    average = Average(model, model.parameters(), 0.9)
    for step in range(3):
        for p in model.parameters():
            p.data += 0.1
        average.update(step)
    weights, averages = [p.detach().clone() for p in model.parameters()], [t.clone() for t in average.tensors]
    with average.in_place():
        assert all(torch.equal(p, a) for p, a in zip(model.parameters(), averages, strict=True))
    assert model.training
    assert all(torch.equal(p, w) for p, w in zip(model.parameters(), weights, strict=True))
    assert all(torch.equal(t, a) for t, a in zip(average.tensors, averages, strict=True))
    with pytest.raises(KeyboardInterrupt), average.in_place():
        raise KeyboardInterrupt
    assert all(torch.equal(p, w) for p, w in zip(model.parameters(), weights, strict=True))


def test_the_best_checkpoint_is_kept_beside_the_last_two(tmp_path):
    """Best at step 4, which no checkpoint fell on."""
    run(tmp_path, config=replace(CONFIG, evaluate_every=4), evaluate=valued(3, 4, math.nan, 5, 6))
    assert checkpoints(tmp_path) == [4, 15, 20]
    state = json.loads((tmp_path / "checkpoints" / "step-00000020" / "state.json").read_text())
    assert (state["best"], state["best_step"]) == (3, 4)


def test_a_better_checkpoint_takes_the_place_of_the_best(tmp_path):
    run(tmp_path, config=replace(CONFIG, evaluate_every=4), evaluate=valued(3, 2, 1, 1, 5))
    assert checkpoints(tmp_path) == [12, 15, 20]


def test_the_best_is_known_after_a_resume(tmp_path):
    config = replace(CONFIG, evaluate_every=4)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, interrupting_at(23), config, evaluate=valued(3, 4))
    run(tmp_path, config=config, evaluate=valued(4, 5, 6))
    assert checkpoints(tmp_path) == [4, 15, 20]
    assert [line.get("evaluation") for line in metrics(tmp_path) if line["step"] % 4 == 0] == [3, 4, 4, 5, 6]


def test_an_evaluation_that_falls_on_a_bad_step_is_made_after_the_next_good_one(tmp_path):
    config = replace(CONFIG, evaluate_every=4, log_every=1)
    run(tmp_path, spoilt(6, 7, 8), config, evaluate=valued(5, 6, 7, 8, 9))
    assert [line["step"] for line in metrics(tmp_path) if "evaluation" in line] == [6, 8, 12, 16, 20]


# What is left behind, and going on from it


def test_a_run_leaves_the_last_two_checkpoints_and_its_metrics(straight):
    assert list(straight) == ["metrics", "step-00000015", "step-00000020"]
    assert [line["step"] for line in straight["metrics"]] == [2, 4, 6, 8, 10, 12, 14, 16, 18, 20]
    assert straight["metrics"][0].keys() == {"step", "loss", "grad_norm", "lr", "index", "largest", "skipped"}
    assert straight["metrics"][0]["lr"] == learning_rate(CONFIG, 1)
    assert straight["step-00000020"][0].keys() == {"step", "skipped", "share", "best", "best_step", "identity"}


def test_steps_that_no_interval_divides_are_logged_and_saved_at_the_end(tmp_path):
    run(tmp_path, config=replace(CONFIG, steps=7, save_every=5, log_every=3))
    assert checkpoints(tmp_path) == [5, 7]
    assert [line["step"] for line in metrics(tmp_path)] == [3, 6, 7]


def test_a_finished_run_is_returned_and_left_alone(tmp_path, straight):
    first = run(tmp_path)

    def never(model, index, generator):
        raise AssertionError("nothing is left to train")

    again = run(tmp_path, never)
    torch.testing.assert_close(again.state_dict(), first.state_dict(), rtol=0, atol=0)
    assert outcome(tmp_path) == straight


@pytest.mark.parametrize("stops", [[0], [3], [9, 10], [11, 23, 24, 39], list(range(1, 40, 2))])
def test_interrupted_and_resumed_equals_straight_bit_for_bit(tmp_path, straight, stops):
    """Stopped in the middle of these forward passes, each in a call of its own."""
    for stop in stops:
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path, interrupting_at(stop))
        torch.manual_seed(stop)  # what else draws from it must not matter
    run(tmp_path)
    assert outcome(tmp_path) == straight


WRITES = ("os.fsync", "pathlib.Path.rename", "shutil.rmtree", "json.dumps", "vidaccel.train.checkpoints.save_file")


@pytest.mark.parametrize("call", WRITES)
@pytest.mark.parametrize("nth", [1, 3])
def test_interrupted_in_the_middle_of_writing(tmp_path, straight, monkeypatch, call, nth):
    genuine, calls = pkgutil.resolve_name(call), []

    def interrupted(*arguments, **keywords):
        calls.append(call)
        if len(calls) == nth:
            raise KeyboardInterrupt
        return genuine(*arguments, **keywords)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(call, interrupted)
        run(tmp_path)
    run(tmp_path)
    assert outcome(tmp_path) == straight


@pytest.mark.parametrize("cut", [1, 2, 10, 60])
def test_a_metrics_line_cut_in_half_is_written_again(tmp_path, straight, cut):
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, interrupting_at(29))
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(path.read_bytes()[:-cut])
    run(tmp_path)
    assert outcome(tmp_path) == straight


KILLED = """
import os, random, signal, sys, time
from pathlib import Path
from tests.train.test_trainer import *

folder, rng, alive_when_killed = Path(sys.argv[1]), random.Random(0), 0
config = replace(CONFIG, **SLOW)
for attempt in range(200):
    if not (child := os.fork()):
        run(folder, config=config)
        os._exit(0)
    if attempt < 10:
        time.sleep(rng.uniform(0.0, 0.15))
        os.kill(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    alive_when_killed += os.WIFSIGNALED(status)
    if status == 0:
        break
print(alive_when_killed, status)
"""
SLOW = {"steps": 150, "save_every": 4, "log_every": 1}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
def test_killed_at_random_moments_it_ends_with_the_same_bits(tmp_path):
    """Ten processes, forked from one that has torch loaded, die of SIGKILL; the next one finishes."""
    run(tmp_path / "straight", config=replace(CONFIG, **SLOW))
    script = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path / "killed")],
        cwd=Path(__file__).parents[2],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert script.returncode == 0, script.stderr
    killed, status = map(int, script.stdout.split())
    assert status == 0
    assert killed >= 3
    assert outcome(tmp_path / "killed") == outcome(tmp_path / "straight")


def signalling_at(stop: int, *numbers: int):
    """`regression`, with signals to this process in the middle of forward pass `stop`."""

    def signalled(model, index, generator):
        if index == stop:
            for number in numbers:
                signal.raise_signal(number)
        return regression(model, index, generator)

    return signalled


@pytest.fixture
def _unhandled():
    """Nobody has taken the signals, and they are not ignored, as of a process in the background."""
    numbers = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}
    before = {number: signal.signal(number, own) for number, own in numbers.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_asked_to_stop_it_saves_the_step_and_goes_on_bit_for_bit(_unhandled, tmp_path, straight, caplog, number):
    caplog.set_level("INFO", logger="vidaccel")
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, signalling_at(4, number))
    assert checkpoints(tmp_path) == [3]  # of two passes each
    assert "stopping after this step" in caplog.text
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, signalling_at(2 * CONFIG.steps - 1, number))  # the last, which is saved as ever
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers
    run(tmp_path)
    assert outcome(tmp_path) == straight


def test_asked_twice_it_stops_at_once(_unhandled, tmp_path, straight):
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, signalling_at(4, signal.SIGINT, signal.SIGINT))
    assert not (tmp_path / "checkpoints").exists()
    run(tmp_path)
    assert outcome(tmp_path) == straight


# Faults


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_bad_batch_is_skipped_and_counted(tmp_path, caplog, value):
    """Passes 8 and 9 make step 4; one of them is enough to spoil it. Weights, EMA and moments stay at step 3's."""
    run(tmp_path / "before", config=replace(CONFIG, steps=4, schedule="constant"))
    run(tmp_path / "bad", spoilt(9, value=value), replace(CONFIG, steps=5, save_every=4, schedule="constant"))
    before, bad = outcome(tmp_path / "before"), outcome(tmp_path / "bad")
    assert list(bad) == ["metrics", "step-00000004"]
    assert bad["step-00000004"][1:] == before["step-00000004"][1:]
    assert "step 4 skipped" in caplog.text
    assert bad["metrics"][-1] == bad["metrics"][-1] | {"step": 5, "loss": None, "grad_norm": None, "skipped": 1}


def test_training_goes_on_after_a_bad_batch_and_resumes_with_the_count(tmp_path):
    bad = spoilt(8, 20, 21)
    run(tmp_path / "straight", bad)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "resumed", interrupting_at(33, bad))
    run(tmp_path / "resumed", bad)
    assert outcome(tmp_path / "resumed") == outcome(tmp_path / "straight")
    assert [line["skipped"] for line in metrics(tmp_path / "straight")] == [0, 0, 1, 1, 1, 2, 2, 2, 2, 2]


def test_a_skipped_step_changes_nothing(tmp_path):
    model = tiny()
    seen = []

    def loss(model, index, generator):
        seen.append([p.detach().clone() for p in model.parameters()])
        return spoilt(10, 11)(model, index, generator)

    run(tmp_path, loss, model=model)
    for before, after in zip(seen[10], seen[12], strict=True):
        assert torch.equal(before, after)
    assert not all(torch.equal(a, b) for a, b in zip(seen[12], seen[14], strict=True))


def test_a_checkpoint_that_falls_on_a_bad_step_is_made_after_the_next_good_one(tmp_path):
    run(tmp_path, spoilt(8, 18, 28), replace(CONFIG, steps=16))
    assert checkpoints(tmp_path) == [11, 16]


def test_ten_bad_steps_in_a_row_stop_with_the_last_good_checkpoint(tmp_path):
    with pytest.raises(
        TrainingFailed, match="tiny: 10 steps in a row .* at step 15; the last good checkpoint"
    ) as error:
        run(tmp_path, spoilt(*range(12, 40)))
    assert str(tmp_path / "checkpoints") in str(error.value)
    assert checkpoints(tmp_path) == [5]
    run(tmp_path)  # with the fault mended
    assert checkpoints(tmp_path) == [15, 20]


def test_nine_bad_steps_in_a_row_do_not(tmp_path):
    run(tmp_path, spoilt(*range(12, 30)))
    assert metrics(tmp_path)[-1]["skipped"] == 9


def test_other_settings_are_not_continued(tmp_path, straight):
    run(tmp_path)
    with pytest.raises(UserError) as error:
        run(tmp_path, config=replace(CONFIG, learning_rate=0.02, steps=30), seed=4)
    assert "learning_rate was 0.01, now 0.02; seed was 3, now 4; steps was 20, now 30" in error.value.message
    assert "another folder" in error.value.hint
    assert outcome(tmp_path) == straight


def test_settings_that_the_loop_does_not_know_are_compared_too(tmp_path):
    run(tmp_path, settings={"loss": {"weights": [1, 0.5], "kind": "huber"}, "data": "abc"})
    run(tmp_path, settings={"loss": {"weights": (1, 0.5), "kind": "huber"}, "data": "abc"})  # a tuple is JSON's list
    with pytest.raises(UserError) as error:
        run(tmp_path, settings={"loss": {"weights": [1, 0.25], "kind": "huber"}, "text": "abc"})
    expected = "settings.data was 'abc', now None; settings.loss.weights was [1, 0.5], now [1, 0.25]; settings.text was"
    assert expected in error.value.message


def test_another_model_is_not_continued(tmp_path, straight):
    run(tmp_path)
    with pytest.raises(UserError, match=r"model.safetensors: 0.bias is \[8\] float32 there and \[9\] float32 here"):
        run(tmp_path, model=nn.Sequential(nn.Linear(3, 9), nn.Tanh(), nn.Dropout(0.25), nn.Linear(9, 1)))
    with pytest.raises(UserError, match=r"3.bias is \[1\] float32 there and missing here \(2 tensors differ\)"):
        run(tmp_path, model=nn.Sequential(nn.Linear(3, 8), nn.Tanh()))
    with pytest.raises(UserError, match="0.bias is .* float32 there and .* float64 here"):
        run(tmp_path, model=tiny().double())
    assert outcome(tmp_path) == straight


@pytest.mark.parametrize("name", [*STATES, "state.json"])
@pytest.mark.parametrize("damage", ["truncated", "empty", "missing", "garbage"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_serves(tmp_path, straight, name, damage):
    run(tmp_path)
    newest = tmp_path / "checkpoints" / "step-00000020"
    file, content = newest / name, (newest / name).read_bytes()
    file.unlink()
    if damage != "missing":
        file.write_bytes({"truncated": content[:-7], "empty": b"", "garbage": b"\x80\x04\x95pickle"}[damage])
    with pytest.raises(UserError) as error:
        run(tmp_path)
    assert str(file) in error.value.message
    assert f"remove {newest}" in error.value.hint
    for path in newest.iterdir():
        path.unlink()
    newest.rmdir()
    run(tmp_path)
    assert outcome(tmp_path)["step-00000020"] == straight["step-00000020"]
    assert metrics(tmp_path) == straight["metrics"]


@contextmanager
def small_disk(folder: Path, size: str):
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"no tmpfs can be mounted here: {mounted.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_keeps_the_last_good_checkpoint(tmp_path, straight):
    with small_disk(tmp_path / "disk", "256k") as disk:
        with pytest.raises(KeyboardInterrupt):
            run(disk, interrupting_at(15))
        before = outcome(disk)
        ballast = disk / "ballast"
        with pytest.raises(OSError, match="No space left"), ballast.open("wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))
        os.truncate(ballast, ballast.stat().st_size - 8192)  # room for metrics, not for a checkpoint
        with pytest.raises(UserError) as error:
            run(disk)
        assert "no space left on device; the checkpoint of step 5 is kept" in error.value.message
        assert "the same command then goes on from there" in error.value.hint
        assert list(outcome(disk)) == ["metrics", "step-00000005"]
        assert outcome(disk)["step-00000005"] == before["step-00000005"]
        ballast.unlink()
        run(disk)
        assert outcome(disk) == straight


@pytest.mark.parametrize(
    ("since", "kept"), [(0, "there is no checkpoint yet"), (5, "the checkpoint of step 5 is kept")]
)
def test_metrics_on_a_full_disk(tmp_path, monkeypatch, since, kept):
    """/dev/full refuses every write as a full disk does."""
    genuine = metrics_module.append

    def full(path, line):
        genuine(Path("/dev/full") if line["step"] > since else path, line)

    with monkeypatch.context() as patch, pytest.raises(UserError) as error:
        patch.setattr(metrics_module, "append", full)
        run(tmp_path)
    assert error.value.message == f"cannot write /dev/full: no space left on device; {kept}"


def test_what_a_kill_left_unfinished_is_cleared_away(tmp_path):
    unfinished = tmp_path / "checkpoints" / ".step-00000005.0123abcd"
    unfinished.mkdir(parents=True)
    (unfinished / "model.safetensors").write_bytes(b"half")
    run(tmp_path)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step-00000015", "step-00000020"]


def test_settings_without_effect_that_an_earlier_version_recorded_do_not_refuse(tmp_path):
    run(tmp_path, config=replace(CONFIG, steps=5))
    (state,) = tmp_path.rglob("step-00000005/state.json")
    record = json.loads(state.read_text())
    assert not record["identity"].keys() & {"minutes", "graph"}
    record["identity"] |= {"minutes": 30.0, "graph": True}
    state.write_text(json.dumps(record))
    run(tmp_path, config=replace(CONFIG, steps=5, gates_every=0))
    record["identity"]["warmup"] = 4
    state.write_text(json.dumps(record))
    with pytest.raises(UserError, match="warmup was 4, now 3"):
        run(tmp_path, config=replace(CONFIG, steps=5))
