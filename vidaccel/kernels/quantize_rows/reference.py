"""Rows in float8 in plain torch: the definition that the fused kernel is tested against."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

LARGEST = 448.0
"""Of float8_e4m3fn."""
ZERO = 1e-30
"""A row with nothing as large is taken for zeros: what is smaller may be flushed on the way."""


class Rows(NamedTuple):
    """A tensor [..., K] whose rows are in float8, each with a scale of its own: it is values * scales[..., None]."""

    values: Tensor
    """float8_e4m3fn [..., K]."""
    scales: Tensor
    """float32 [...]."""


def quantize_rows(x: Tensor, left: Tensor | None = None, gelu: bool = False) -> Rows:
    """x [..., D], after GELU (tanh-approximate) where asked for, to the right of left [..., J] -> rows [..., J + D].

    The largest number of a row becomes 448, the largest of float8_e4m3fn; a row of zeros has the scale 1.
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    if gelu:
        wide = F.gelu(wide, approximate="tanh")
    if left is not None:
        wide = torch.cat([left.to(wide.dtype), wide], dim=-1)
    most = wide.abs().amax(-1)
    scales = torch.where(most < ZERO, torch.ones_like(most), most / LARGEST)
    return Rows((wide * (1 / scales)[..., None]).to(torch.float8_e4m3fn), scales.float())
