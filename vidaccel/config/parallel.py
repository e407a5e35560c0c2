"""How one video is split over several devices."""

from dataclasses import dataclass

from vidaccel.config.checks import require


@dataclass
class ParallelConfig:
    """On how many devices one video is made (runtime/context_parallel.py), under torchrun. Its processes form groups of
    ulysses times ring neighbours, which make a video each."""

    ulysses: int = 1
    """Devices that its tokens are split over by Ulysses attention, which gives each some heads of all tokens."""
    ring: int = 1
    """Devices, times those, that they are split over by ring attention, which passes keys and values round; CUDA."""

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            require(value >= 1, f"parallel.{name}", value, "must be at least 1")

    @property
    def devices(self) -> int:
        """Of one video."""
        return self.ulysses * self.ring
