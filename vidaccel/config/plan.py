"""Settings of `--plan`: what a run is to be worked out for. They shape no run, and so are no settings of one."""

import math
import re
from dataclasses import dataclass, field
from typing import NamedTuple

from vidaccel.config.checks import expand_paths, require


class Gpu(NamedTuple):
    """A card, by its maker's data sheet: dense, accumulated in float32, without sparsity."""

    title: str
    bfloat16: float
    """FLOP/s of its tensor cores."""
    float32: float
    """FLOP/s without them, which is what PyTorch computes float32 products with unless told."""
    memory: float
    """Bytes."""
    fp8: bool = True
    """Whether its tensor cores have products of fp8."""


GPUS = {
    "a100": Gpu("A100 SXM 80 GB", 312e12, 19.5e12, 80e9, fp8=False),
    "a100-40gb": Gpu("A100 40 GB", 312e12, 19.5e12, 40e9, fp8=False),
    "b200": Gpu("B200", 2250e12, 75e12, 180e9),
    "h100": Gpu("H100 SXM", 989e12, 67e12, 80e9),
    "h200": Gpu("H200 SXM", 989e12, 67e12, 141e9),
    "l40s": Gpu("L40S", 362e12, 91.6e12, 48e9),
    "rtx3090": Gpu("RTX 3090", 71e12, 35.6e12, 24e9, fp8=False),
    "rtx4090": Gpu("RTX 4090", 165e12, 82.6e12, 24e9),
    "rtx5090": Gpu("RTX 5090", 209e12, 104.8e12, 32e9),
}
"""By the name that settings know."""
MEASURED_MFU = 0.383
"""Of one pass of HunyuanVideo in bf16 on an H100 with stock kernels (studies/results/gpu): 3.91 PFLOPs in 10.31 s."""
UNITS = {"MB": 1e6, "MiB": 2**20, "GB": 1e9, "GiB": 2**30, "TB": 1e12}


@dataclass
class PlanConfig:
    """What a plan is worked out for."""

    gpu: str = "h100"
    """The card: `a100`, `a100-40gb`, `b200`, `h100`, `h200`, `l40s`, `rtx3090`, `rtx4090` or `rtx5090`."""
    memory: str | None = None
    """What a card has, such as 24GB; null is the card's own."""
    mfu: float = MEASURED_MFU
    """Share of the card's peak that is reached (model FLOPs utilisation). 0.383 was measured on passes of HunyuanVideo
    on an H100 with stock kernels; of training nothing of this size was."""
    price: float | None = None
    """Of an hour of one card, in any money."""
    gpus: list[int] = field(default_factory=lambda: [1, 2, 4, 8, 16, 32, 64])
    """Numbers of processes, one a card, that memory is worked out for."""
    size_of: str | None = None
    """A model as large, for one that is not there yet: a folder, a hub id, or a configuration of `benchmark`
    (wan_14b)."""

    def __post_init__(self) -> None:
        expand_paths(self)
        require(self.gpu in GPUS, "gpu", self.gpu, f"is a card that is known: {', '.join(GPUS)}")
        bytes_of(self.memory)
        require(0 < self.mfu <= 1, "mfu", self.mfu, "is a share of the peak, in (0, 1]")
        price = self.price
        require(price is None or 0 <= price < math.inf, "price", price, "is 0 or more, and finite")
        rising = bool(self.gpus) and self.gpus == sorted(set(self.gpus)) and self.gpus[0] >= 1
        require(rising, "gpus", self.gpus, "rises, from 1 or more")

    @property
    def card(self) -> Gpu:
        return GPUS[self.gpu]

    @property
    def room(self) -> float:
        """Bytes of a card."""
        asked = bytes_of(self.memory)
        return self.card.memory if asked is None else asked

    def seconds(self, flops: float, float32: float = 0.0) -> float:
        """Of one card, for so many FLOPs in bfloat16 and in float32."""
        return (flops / self.card.bfloat16 + float32 / self.card.float32) / self.mfu


def bytes_of(memory: str | None) -> float | None:
    """Of a size as people write it; `UserError` for one that is none."""
    if memory is None:
        return None
    units = {unit.lower(): scale for unit, scale in UNITS.items()}
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-z]+)", memory.strip().lower())
    size = float(found[1]) * units.get(found[2], 0.0) if found else 0.0
    require(size > 0, "memory", memory, f"is a number above 0 and its unit, such as 24GB ({', '.join(UNITS)})")
    return size
