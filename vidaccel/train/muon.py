"""Muon over matrices of one shape at once: for many small blocks a few large products in place of hundreds of launches.

The update of torch.optim.Muon with `match_rms_adamw` (arXiv 2502.16982), matrix by matrix; the rate is a tensor, so
that a CUDA graph of the step can be told another one.
"""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from vidaccel.compat.torch import add_all, scale_all

MOMENTUM = 0.95
COEFFICIENTS = (3.4445, -4.775, 2.0315)
"""Of the Newton-Schulz iteration that brings singular values near to 1, as torch.optim.Muon has them."""
ITERATIONS = 5
SMALLEST = 1e-7


class StackedMuon(torch.optim.Optimizer):
    """Muon for matrices [M, N], stacked by shape; each one's `momentum_buffer` is its part of the stack."""

    def __init__(self, groups: Iterable[dict[str, Any]], lr: float, weight_decay: float):
        super().__init__(groups, {"lr": lr, "weight_decay": weight_decay})
        self.found_inf: Tensor | None = None
        """Where it is 1 the step is left out, as the fused AdamW's does."""
        self._stacks: list[tuple[dict[str, Any], list[Tensor], Tensor]] = []
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[Tensor]] = {}
            for p in group["params"]:
                by_shape.setdefault(p.shape, []).append(p)
            for shape, alike in by_shape.items():
                momentum = torch.zeros(len(alike), *shape, device=alike[0].device)
                self._stacks.append((group, alike, momentum))
                for p, own in zip(alike, momentum, strict=True):
                    self.state[p] = {"momentum_buffer": own}

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        kept = 1.0 if self.found_inf is None else 1.0 - self.found_inf
        for group, parameters, momentum in self._stacks:
            gradient = torch.stack([torch.zeros_like(p) if p.grad is None else p.grad for p in parameters])
            if self.found_inf is not None:
                gradient = torch.where(self.found_inf > 0, momentum, gradient)  # which leaves the momentum as it is
            momentum.lerp_(gradient, 1 - MOMENTUM)
            update = orthogonal(gradient.lerp(momentum, MOMENTUM))
            rows, columns = parameters[0].shape
            rate = group["lr"] * kept
            if group["weight_decay"]:
                scale_all(parameters, 1 - rate * group["weight_decay"])
            change = update.float() * (-rate * 0.2 * math.sqrt(max(rows, columns)))
            add_all(parameters, list(change.unbind(0)))


def orthogonal(matrices: Tensor) -> Tensor:
    """U V' of the singular value decomposition of each of `matrices` [K, M, N], nearly, in bfloat16."""
    a, b, c = COEFFICIENTS
    x = matrices.bfloat16()
    tall = x.size(1) > x.size(2)
    if tall:
        x = x.mT
    x = x / x.float().norm(dim=(1, 2), keepdim=True).clamp(min=SMALLEST).to(x.dtype)
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x
