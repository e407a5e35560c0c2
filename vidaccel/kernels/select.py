"""Which implementation of an op runs: `reference` (plain torch), `fused` (Triton), or `auto`.

`fused` runs where it was asked for or fails; `auto` is `fused` on a CUDA device with Triton installed and `reference`
elsewhere, and says once which it took. Triton's interpreter (TRITON_INTERPRET=1) lets `fused` run on a CPU: slow, and
the way the kernels are tested on machines without a GPU. An op whose kernel has no backward pass runs its reference
wherever a gradient is asked for, under `fused` as well, and says so in its docstring.
"""

import functools
import importlib.util
import logging
import os

import torch
from torch import Tensor

from vidaccel.errors import UserError, nearest

KERNELS = ("reference", "fused", "auto")
HAVE_TRITON = importlib.util.find_spec("triton") is not None

logger = logging.getLogger(__name__)


def choose(kernels: str, device: torch.device) -> str:
    """`kernels` as written in a configuration -> "reference" or "fused" for tensors on `device`."""
    if kernels == "reference":
        return "reference"
    missing = _missing(device)
    if kernels == "auto":
        chosen = "fused" if missing is None and device.type == "cuda" else "reference"
        if not torch.compiler.is_compiling():
            _say_once(chosen, str(device.type), missing)
        return chosen
    if kernels != "fused":
        raise UserError(f'kernels="{kernels}" is not a choice', nearest(kernels, KERNELS))
    if missing is not None:
        hint = "pip install vidaccel[gpu]" if not HAVE_TRITON else 'kernels="auto" runs the reference there'
        raise UserError(f"kernels=fused, but {missing}", hint)
    return "fused"


def asks_gradient(*tensors: Tensor) -> bool:
    """Whether what is computed of these will be differentiated backward."""
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def _missing(device: torch.device) -> str | None:
    """What keeps the fused kernels from running on `device`; None if nothing does."""
    if not HAVE_TRITON:
        return "Triton is not installed"
    if device.type not in ("cuda", "meta") and os.environ.get("TRITON_INTERPRET") != "1":
        return f'they need a CUDA device and the tensors are on "{device.type}"'
    return None


@functools.cache
def _say_once(chosen: str, device: str, missing: str | None) -> None:
    logger.info("kernels: auto is %s on %s%s", chosen, device, f" ({missing})" if missing else "")
