"""Settings of the toy method."""

from dataclasses import dataclass

from vidaccel.config.checks import require


@dataclass
class ToyTraining:
    RENAMED = {"finish": "end"}

    end: float = 0.5

    def __post_init__(self) -> None:
        require(0 <= self.end <= 1, "end", self.end, "must be in [0, 1]")
