"""A forward pass of a predictor's training: losses put together by hand, gradients apart, and what training does."""

import json
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tests.train.predictor.test_discriminator import student
from tests.train.test_trainer import interrupting_at, outcome
from vidaccel.cache.trunk import Trunk
from vidaccel.config.predictor import DiscriminatorConfig
from vidaccel.config.training import TrainConfig
from vidaccel.forecasters.base import Cached
from vidaccel.forecasters.reuse import Reuse
from vidaccel.train.predictor.discriminator import (
    Discriminator,
    discriminator_hinge,
    predictor_hinge,
    token_grid,
    trunk_features,
)
from vidaccel.train.predictor.loss import SHARE, PredictorLoss
from vidaccel.train.predictor.pairs import Pair, Times, noised_pair, restricted_times
from vidaccel.train.trainer import train

WIDTH = 24
CONFIG = DiscriminatorConfig(depths=[0.5, 1.0], scales=[1, 2], width=8, weight=0.5)
TRAIN = TrainConfig(steps=4, learning_rate=1e-3, warmup=0, ema_decay=0.5, save_every=2, log_every=1)


class Fusion(nn.Module):
    """A predictor without blocks: the cached tokens and a linear layer of them and the tokens that come in."""

    history = 1

    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.linear = nn.Linear(2 * WIDTH, WIDTH)
        self.linear.weight.data.mul_(0.05)
        self.linear.bias.data.zero_()

    def forward(self, arguments, memory, t):
        cached = memory[0].tokens["hidden_states"]
        return {"hidden_states": cached + self.linear(torch.cat([arguments["hidden_states"], cached], dim=-1))}


def discriminator() -> Discriminator:
    torch.manual_seed(4)
    return Discriminator(WIDTH, CONFIG)


@pytest.fixture(params=["hunyuan_video", "wan"])
def predictor_loss(request):
    """`predictor_loss(adversarial)`, its student attached; it learns from its `pair` and `draw`."""
    velocity, x_0, text = student(request.param)
    with Trunk(velocity.transformer, velocity.family) as trunk:

        def of(adversarial: bool, predictor: nn.Module | None = None) -> PredictorLoss:
            judge = discriminator() if adversarial else None
            return PredictorLoss(velocity, trunk, predictor or Fusion(), judge, CONFIG)

        def draw(generator) -> Pair:
            eps = torch.randn(x_0.shape, generator=generator)
            full, predicted = restricted_times(2, 0.2, 0.2, generator)
            return noised_pair(velocity, trunk, x_0, eps, text, None, full, predicted)

        of.draw = draw
        of.pair = draw(torch.Generator().manual_seed(5))
        yield of


def by_hand(predictor_loss: PredictorLoss, pair: Pair) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The squared error, L_D and the hinge of L_P, each with all the gradients that its formula has."""
    velocity = predictor_loss.student
    with predictor_loss.trunk.predicted(predictor_loss.predictor, memory=pair.memory):
        u = velocity(pair.x, pair.times.t, pair.text, r=pair.times.r)
    length = (pair.times.t - pair.times.r).view(2, 1, 1, 1, 1)
    ends = [pair.x - length * velocity_of_step for velocity_of_step in (u, pair.target)]
    ours, theirs = (trunk_features(velocity, CONFIG.depths, x, pair.times.r, pair.text, None) for x in ends)
    grid = token_grid(velocity.transformer, pair.x)
    ours, theirs = (predictor_loss.discriminator(features, grid) for features in (ours, theirs))
    return F.mse_loss(u, pair.target), discriminator_hinge(theirs, ours), predictor_hinge(ours)


def gradients(loss: torch.Tensor, module: nn.Module) -> list[torch.Tensor]:
    return torch.autograd.grad(loss, list(module.parameters()), retain_graph=True)


# Mathematics


def test_the_first_stage_is_the_squared_error(predictor_loss):
    first, pair = predictor_loss(adversarial=False), predictor_loss.pair
    loss, measured = first(pair)
    with torch.no_grad(), first.trunk.predicted(first.predictor, memory=pair.memory):
        u = first.student(pair.x, pair.times.t, pair.text, r=pair.times.r)
    assert loss.item() == measured["mse"] == pytest.approx(F.mse_loss(u, pair.target).item())
    with torch.no_grad(), first.trunk.predicted(Reuse(), memory=pair.memory):
        again = first.student(pair.x, pair.times.t, pair.text, r=pair.times.r)
    assert measured["reuse"] == pytest.approx(F.mse_loss(again, pair.target).item())


def test_relative_errors_are_shares_of_what_reuse_has(predictor_loss):
    plain, relative, pair = predictor_loss(adversarial=False), predictor_loss(adversarial=False), predictor_loss.pair
    relative.relative = True
    _, each = plain(pair)
    shares = []
    for b in range(2):
        alone = pair._replace(
            x=pair.x[b : b + 1],
            times=Times(*(time[b : b + 1] for time in pair.times)),
            text={name: tensor[b : b + 1] for name, tensor in pair.text.items()},
            target=pair.target[b : b + 1],
            memory=tuple(Cached({n: x[b : b + 1] for n, x in m.tokens.items()}, m.t[b : b + 1]) for m in pair.memory),
        )
        _, measured = plain(alone)
        least = SHARE * float(alone.target.square().mean())
        shares.append(measured["mse"] / (measured["reuse"] + least))
    loss, measured = relative(pair)
    assert loss.item() == measured["share"] == pytest.approx(sum(shares) / 2, rel=1e-4)
    assert measured["mse"] == each["mse"] and abs(shares[0] - shares[1]) > 1e-3
    unmoved = relative(pair._replace(target=relative._predicted(pair, Reuse()).detach()))  # reuse has no error at all
    assert unmoved[0].isfinite()


def test_the_second_stage_gives_each_part_the_gradients_of_its_own_loss_only(predictor_loss):
    second = predictor_loss(adversarial=True)
    loss, measured = second(predictor_loss.pair)
    loss.backward()
    error, told, fooled = by_hand(second, predictor_loss.pair)
    assert loss.item() == pytest.approx((error + told + CONFIG.weight * fooled).item(), rel=1e-5)
    assert measured["discriminator"] == pytest.approx(told.item(), rel=1e-5)
    assert measured["adversarial"] == pytest.approx(fooled.item(), rel=1e-5)
    for part, own in ((second.discriminator, told), (second.predictor, error + CONFIG.weight * fooled)):
        for p, expected in zip(part.parameters(), gradients(own, part), strict=True):
            torch.testing.assert_close(p.grad, expected, atol=1e-6, rtol=1e-3)
    assert any(g.abs().max() > 1e-6 for g in gradients(fooled, second.predictor))  # it has an effect
    assert all(p.grad is None for p in second.student.parameters())


@pytest.mark.parametrize("turn", ["discriminator", "predictor"])
def test_in_turn_each_part_is_trained_by_its_own_loss_and_the_other_by_none(predictor_loss, turn):
    second = predictor_loss(adversarial=True)
    loss, measured = second(predictor_loss.pair, turn)
    loss.backward()
    error, told, fooled = by_hand(second, predictor_loss.pair)
    parts = {
        "discriminator": (second.discriminator, told),
        "predictor": (second.predictor, error + CONFIG.weight * fooled),
    }
    trained, own = parts.pop(turn)
    assert loss.item() == pytest.approx(own.item(), rel=1e-5)
    for p, expected in zip(trained.parameters(), gradients(own, trained), strict=True):
        torch.testing.assert_close(p.grad, expected, atol=1e-6, rtol=1e-3)
    ((other, _),) = parts.values()
    assert all(p.grad is None for p in [*other.parameters(), *second.student.parameters()])
    both = second(predictor_loss.pair)[1]
    assert measured == pytest.approx(both)


def test_balanced_the_adversarial_loss_weighs_as_it_does_beside_the_plain_error(predictor_loss):
    """Of one sample, so that there is one error of reuse: the gradient is the plain one's over that error."""
    pair = predictor_loss.pair
    alone = pair._replace(
        x=pair.x[:1],
        times=Times(*(time[:1] for time in pair.times)),
        text={name: tensor[:1] for name, tensor in pair.text.items()},
        target=pair.target[:1],
        memory=tuple(Cached({n: x[:1] for n, x in m.tokens.items()}, m.t[:1]) for m in pair.memory),
    )
    plain, balanced = predictor_loss(adversarial=True), predictor_loss(adversarial=True)
    balanced.relative, balanced.config = True, replace(CONFIG, balanced=True)
    (loss, measured), (other, _) = plain(alone, "predictor"), balanced(alone, "predictor")
    least = measured["reuse"] + SHARE * float(alone.target.square().mean())
    assert other.item() == pytest.approx(loss.item() / least, rel=1e-5)
    of_plain, of_balanced = gradients(loss, plain.predictor), gradients(other, balanced.predictor)
    for one, another in zip(of_plain, of_balanced, strict=True):
        torch.testing.assert_close(another, one / least, rtol=1e-3, atol=1e-6 / least)


def test_a_perfect_predictor_cannot_be_told_apart(predictor_loss):
    """Reusing the tokens of the very state is exact, so both of the discriminator's inputs are one."""

    class Exact(Fusion):
        def forward(self, arguments, memory, t):
            return {"hidden_states": memory[0].tokens["hidden_states"]}

    second = predictor_loss(adversarial=True, predictor=Exact())
    pair = predictor_loss.pair
    with torch.no_grad(), second.trunk.full():
        second.student(pair.x, pair.times.t, pair.text, r=pair.times.r)
    _, measured = second(pair._replace(memory=second.trunk.memory()))
    assert measured["mse"] == pytest.approx(0, abs=1e-10)
    assert measured["discriminator"] >= 2 - 1e-5  # max(0, 1 - D) + max(0, 1 + D) with one D


class Parts(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.other = (nn.Linear(2, 1, bias=False) for _ in range(2))
        for part in (self.one, self.other):
            nn.init.zeros_(part.weight)


def test_parts_learn_at_their_own_rates_and_are_clipped_apart(tmp_path):
    """AdamW's first step is as long as its rate, whatever the gradient; a second one tells what was clipped."""
    slopes = torch.tensor([3.0, 4.0])

    def loss(model, index, generator):
        return (model.one.weight * slopes).sum() + 1000 * (model.other.weight * slopes).sum(), {}

    config = replace(TRAIN, steps=1, schedule="constant", ema_decay=0.0, clip_norm=1.0)
    parts = train(Parts(), loss, config, tmp_path, seed=0, title="parts", settings={}, rates={"other": 50.0})
    torch.testing.assert_close(parts.one.weight.detach(), torch.full((1, 2), -1e-3))
    torch.testing.assert_close(parts.other.weight.detach(), torch.full((1, 2), -5e-2))
    line = json.loads((tmp_path / "metrics.jsonl").read_text())
    assert line["grad_norm"] == pytest.approx((5**2 + 5000**2) ** 0.5)
    moments = load_moments(tmp_path)
    # Clipped together, the gradient of `one` would be a thousandth of this: 0.1 (1 - beta_1) times 0.6 and 0.8.
    torch.testing.assert_close(moments["one.weight.exp_avg"], torch.tensor([[0.06, 0.08]]))
    torch.testing.assert_close(moments["other.weight.exp_avg"], torch.tensor([[0.06, 0.08]]))


def load_moments(folder) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "checkpoints" / "step-00000001" / "optimizer.safetensors")


# Training


def run(predictor_loss, folder, adversarial: bool, stop: int | None = None, **changes) -> PredictorLoss:
    """Trains, and stops in the middle of forward pass `stop`."""

    def loss(model, index, generator):
        return model(predictor_loss.draw(generator))

    loss, config = loss if stop is None else interrupting_at(stop, loss), replace(TRAIN, **changes)
    model, rates = predictor_loss(adversarial), {"discriminator": 10.0}
    return train(model, loss, config, folder, seed=0, title="toy", settings={}, rates=rates)


def test_training_beats_reuse_and_leaves_the_student_alone(predictor_loss, tmp_path):
    before = {name: p.clone() for name, p in predictor_loss(adversarial=False).student.state_dict().items()}
    first = run(predictor_loss, tmp_path, False, steps=40, learning_rate=3e-3)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    late = lines[-10:]
    assert sum(line["mse"] for line in late) < 0.8 * sum(line["reuse"] for line in late)
    assert all(torch.equal(p, before[name]) for name, p in first.student.state_dict().items())
    assert not first.training and not first.student.training


def test_a_killed_second_stage_goes_on_bit_for_bit(predictor_loss, tmp_path):
    run(predictor_loss, tmp_path / "straight", True)
    with pytest.raises(KeyboardInterrupt):
        run(predictor_loss, tmp_path / "killed", True, stop=3)
    run(predictor_loss, tmp_path / "killed", True)
    assert outcome(tmp_path / "killed") == outcome(tmp_path / "straight")
    last = (tmp_path / "straight" / "metrics.jsonl").read_text().splitlines()[-1]
    assert {"mse", "reuse", "discriminator", "adversarial"} < json.loads(last).keys()


def test_the_student_stays_in_evaluation_mode(predictor_loss):
    second = predictor_loss(adversarial=True).train()
    assert second.predictor.training and second.discriminator.training and not second.student.training
