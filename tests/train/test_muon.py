import pytest
import torch
from torch import nn

from vidaccel.train.muon import StackedMuon, orthogonal

SHAPES = ((8, 8), (8, 8), (6, 12), (12, 6), (12, 6))


def matrices(seed: int) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_it_is_torchs_muon_matrix_by_matrix(weight_decay):
    ours, theirs = matrices(1), matrices(1)
    common = {"lr": 0.02, "weight_decay": weight_decay}
    stacked = StackedMuon([{"params": ours, "rate": 1.0}], **common)
    plain = torch.optim.Muon(theirs, adjust_lr_fn="match_rms_adamw", **common)
    for step in range(5):
        for a, b, gradient in zip(ours, theirs, matrices(10 + step), strict=True):
            a.grad, b.grad = gradient.detach().clone(), gradient.detach().clone()
        stacked.step()
        plain.step()
    for a, b in zip(ours, theirs, strict=True):
        # Products in bfloat16, the norm of a whole stack in float32 here.
        assert torch.allclose(a, b, atol=0.02 * 5 * 0.2 * 12**0.5 * 2**-7)
        assert torch.allclose(stacked.state[a]["momentum_buffer"], plain.state[b]["momentum_buffer"], atol=1e-6)


def test_updates_have_singular_values_near_one():
    found = torch.linalg.svdvals(orthogonal(torch.randn(3, 6, 12, generator=torch.Generator().manual_seed(2))).float())
    assert found.min() > 0.3 and found.max() < 1.5


def test_a_step_that_is_not_finite_changes_nothing():
    parameters = matrices(1)
    optimizer = StackedMuon([{"params": parameters, "rate": 1.0}], lr=0.1, weight_decay=0.1)
    for p, gradient in zip(parameters, matrices(3), strict=True):
        p.grad = gradient.detach().clone()
    optimizer.step()
    before = [(p.detach().clone(), optimizer.state[p]["momentum_buffer"].clone()) for p in parameters]
    optimizer.found_inf = torch.ones(())
    for p in parameters:
        p.grad = torch.full_like(p, torch.nan)
    optimizer.step()
    for p, (value, momentum) in zip(parameters, before, strict=True):
        assert torch.equal(p, value) and torch.equal(optimizer.state[p]["momentum_buffer"], momentum)


def test_a_matrix_without_a_gradient_stays():
    parameters = matrices(1)
    optimizer = StackedMuon([{"params": parameters, "rate": 1.0}], lr=0.1, weight_decay=0.0)
    kept = parameters[0].detach().clone()
    for p in parameters[1:]:
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert torch.equal(parameters[0], kept) and not torch.equal(parameters[1], matrices(1)[1])
