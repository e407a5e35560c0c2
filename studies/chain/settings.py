"""Settings of `python -m studies.chain`."""

import math
from dataclasses import dataclass, field
from pathlib import Path

from vidaccel.config.checks import require
from vidaccel.worlds import WORLDS

CONF = Path(__file__).parent
STAGES = ("cfg", "few_steps", "forecasters", "score")
"""In the order in which they run."""
MAKING = ("autoencoder", "teacher")
"""Stages before those, which run only where they are named: a teacher that goes on from the shipped one."""


@dataclass
class ChainConfig:
    """`python -m studies.chain`."""

    world: str = "sprites"
    """Whose models, clips and scorer."""
    minutes: float = 8.0
    """In all, loading and compiling included."""
    stages: list[str] = field(default_factory=lambda: list(STAGES))
    """Of `autoencoder`, `teacher`, `cfg`, `few_steps`, `forecasters` and `score`."""
    shares: dict[str, float] = field(
        default_factory=lambda: {
            "autoencoder": 1.0,
            "teacher": 1.0,
            "cfg": 0.35,
            "few_steps": 0.4,
            "forecasters": 0.15,
            "score": 0.1,
        }
    )
    """Of the time, by stage; of stages that do not run the others have theirs."""
    work: str = "runs/chain"
    """Folder for everything; a second call goes on from what is there."""
    output: str = "runs/chain/pieces"
    """Folder for the pieces that travel: few files of limited size, which `unpack` puts together."""
    piece_mib: int = 15
    """Largest size of a piece."""
    device: str = "auto"
    seed: int = 0
    scenes: int = 24000
    """Clips to train on."""
    captions: int = 3
    """Of each."""
    held_out: int = 512
    """Clips that gates are computed on."""
    runs: int = 256
    """Of them, those that costly gates are computed on."""
    prompts: int = 1024
    """Held-out prompts that are scored."""
    score_batch: int = 128
    """Videos that are made at once."""
    score_steps: list[int] = field(default_factory=lambda: [20, 8, 4, 3, 2])
    """Steps of the student that are scored."""
    scorer: str = ""
    """What scores, with a set of prompts: `WORLD/PROMPTS`. Empty is the world, with its own."""
    grids: list[int] = field(default_factory=lambda: [8, 6, 20, 10])
    """Steps of the grids that forecasters are made for, the first ones first."""
    reserve: float = 12.0
    """Seconds of each training stage for loading before it and for gates and files after it."""
    making: str = "lamps"
    """Configuration of `python -m vidaccel.sprites make` that autoencoder and teacher are made by."""
    autoencoder: list[str] = field(default_factory=list)
    """Settings of the autoencoder's stage, beside those."""
    teacher: list[str] = field(default_factory=list)
    """Settings of the teacher's."""
    cfg: list[str] = field(default_factory=list)
    """Settings of the CFG distillation, beside those of --conf sprites/cfg."""
    few_steps: list[str] = field(default_factory=list)
    """Settings of the training on mean velocities, beside those of --conf sprites/restricted_meanflow."""
    multistep: list[str] = field(default_factory=list)
    """Settings of the fitted scalars, beside those of --conf sprites."""
    learned: list[str] = field(default_factory=list)
    """Settings of the network, beside those of --conf sprites."""

    def __post_init__(self) -> None:
        require(self.world in WORLDS, "world", self.world, f"is one of {', '.join(WORLDS)}")
        require(0 < self.minutes < math.inf, "minutes", self.minutes, "must be above 0 and finite")
        unknown = [stage for stage in self.stages if stage not in (*MAKING, *STAGES)]
        require(not unknown and bool(self.stages), "stages", self.stages, f"are of {', '.join((*MAKING, *STAGES))}")
        scored = self.scorer.partition("/")[0] in ("", self.world)
        require(scored, "scorer", self.scorer, f"is {self.world}/PROMPTS, or empty")
        wrong = [stage for stage in self.stages if not 0 < self.shares.get(stage, 0) < math.inf]
        require(not wrong, "shares", self.shares, f"are above 0 for each stage that runs: {', '.join(wrong)} is not")
        for key in ("scenes", "captions", "held_out", "runs", "prompts", "score_batch", "piece_mib"):
            require(getattr(self, key) >= 1, key, getattr(self, key), "must be at least 1")
        require(0 <= self.reserve < math.inf, "reserve", self.reserve, "must be at least 0 and finite")

    def ends(self) -> dict[str, float]:
        """Seconds since the start at which each stage ends."""
        running = [stage for stage in (*MAKING, *STAGES) if stage in self.stages]
        whole, passed, ends = sum(self.shares[stage] for stage in running), 0.0, {}
        for stage in running:
            passed += self.shares[stage]
            ends[stage] = 60 * self.minutes * passed / whole
        return ends
