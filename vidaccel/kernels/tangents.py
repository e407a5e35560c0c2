"""Forward-mode derivatives of library ops, for PyTorch's dual numbers (`torch.autograd.forward_ad`).

A dual number is a primal and its tangent in one tensor; PyTorch pushes both through every op that has a derivative
formula. A library op cannot register one: given a dual it returns the output without its tangent, silently. So each
public op takes its inputs apart here, computes output and tangent together in one kernel, and puts them together again:

    primals, tangents = split(x, scale, shift)
    if tangents is not None:
        return join(*tangent_kernel(primals, tangents))

This also works under `torch.func.jvp`, which is built on the same dual numbers. It does not survive `torch.compile`,
which drops the tangents of anything it traces: derivative passes run uncompiled. The derivative of a tangent (forward
over reverse) is not implemented, so a derivative pass runs under `torch.no_grad()`, as method.md's section 2 asks.
"""

import torch
from torch import Tensor
from torch.autograd import forward_ad

from vidaccel.kernels import select


def split(*duals: Tensor) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...] | None]:
    """Primals, and tangents with zeros for those that are missing, or None when no input has one."""
    if torch.compiler.is_compiling():
        return duals, None
    pairs = [forward_ad.unpack_dual(dual) for dual in duals]
    if all(pair.tangent is None for pair in pairs):
        return duals, None
    if select.asks_gradient(*(pair.primal for pair in pairs)):
        raise NotImplementedError("the tangent of a fused op has no gradient: take it under torch.no_grad()")
    primals = tuple(pair.primal for pair in pairs)
    return primals, tuple(torch.zeros_like(p.primal) if p.tangent is None else p.tangent for p in pairs)


def any_tangent(*tensors: Tensor) -> bool:
    """Whether one of these is a dual number with a tangent."""
    return any(forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors)


def join(primal: Tensor, tangent: Tensor) -> Tensor:
    """The dual number that the ops which follow will carry on."""
    return forward_ad.make_dual(primal, tangent)


def refuse(op: str, **inputs: Tensor) -> None:
    """Raises if one of these inputs has a tangent, which `op` would drop."""
    for name, tensor in inputs.items():
        if split(tensor)[1] is not None:
            raise NotImplementedError(f"{op}: no forward-mode derivative with respect to {name}; use kernels=reference")
