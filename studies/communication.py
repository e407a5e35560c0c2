"""What devices send to each other, computed: for one video by Ulysses attention, `python -m studies.communication`; for
a distillation under FSDP2, `python -m studies.communication wan_14b/cfg`.

In each block a device trades its tokens of all heads for all tokens of its heads, three times (queries, keys, values),
and back once (what attention gives): of each such tensor [N / P, D] it sends all but its own part. Behind the last
block the video is put together again. Nothing else is sent, whatever is cached. tests/runtime/test_context_parallel.py
counts what two processes send.

A pass of a training gathers the teacher's weights once and the student's twice, before it runs forwards and backwards,
all in float32, and adds up the gradients of what is trained: of each, a device sends all but its own part.
tests/train/test_parallel.py counts what two processes gather.

N tokens, D width, P devices
"""

from dataclasses import dataclass

import typer

from vidaccel.bench.plan_distill import plan_distillation
from vidaccel.bench.sizes import meta_transformer, rows
from vidaccel.config.benchmark import BenchmarkConfig
from vidaccel.config.distill import DistillConfig
from vidaccel.config.loader import load
from vidaccel.config.plan import PlanConfig
from vidaccel.families.registry import FAMILIES
from vidaccel.families.walk import blocks_of, width

PASS_SECONDS = {"hunyuan_video": 10.31}
"""Of a full pass on one H100, by configuration: a hundredth of README's measured 1031 s. Of others no share is said."""
LINKS = {"NVLink, 450 GB/s": 450e9, "network, 50 GB/s": 50e9}
"""Bytes a second that a device sends to others at once: within a machine with H100s, and by a 400 Gb/s card each."""
GROUPS = ((2, 1), (4, 1), (8, 1), (8, 8))
"""(devices of a video, videos at once)."""
PREDICTOR_BLOCKS = 2
TRAINING_GPUS = (2, 8, 64)


def exchanged(tokens: int, width: int, blocks: int, devices: int, size: int = 2) -> int:
    """Bytes that each of `devices` sends in the attentions of so many blocks, for numbers of `size` bytes."""
    padded = -(-tokens // devices) * devices
    return 4 * blocks * padded * width * size * (devices - 1) // devices**2


@dataclass(frozen=True)
class Exchange:
    """One row of the table."""

    devices: int
    videos: int
    full: int
    """Bytes that a device sends in a full pass."""
    predicted: int
    """In a predicted one."""

    def cells(self, pass_seconds: float | None) -> list[str]:
        gpus = [f"{self.devices * self.videos}", f"{self.videos} on {self.devices}"]
        times = (self._on(rate, pass_seconds) for rate in LINKS.values())
        return [*gpus, _bytes(self.full), _bytes(self.predicted), *times]

    def _on(self, rate: float, pass_seconds: float | None) -> str:
        seconds = self.full / rate
        return f"{1000 * seconds:.0f} ms" + (f", {seconds * self.devices / pass_seconds:.1%}" if pass_seconds else "")


def exchanges(conf: str = "hunyuan_video") -> tuple[int, list[Exchange]]:
    """Tokens of a video and a row for each of `GROUPS`, of the first size of a configuration of `benchmark`."""
    config = load("benchmark", BenchmarkConfig, conf)
    transformer, family = meta_transformer(config), FAMILIES[config.family]
    streams = rows(config, transformer, tuple(config.videos[0]))
    tokens = streams["all"] if "encoder_hidden_states" in family.block_lists[0].returns else streams["video"]
    D, blocks = width(transformer), len(blocks_of(transformer, family))
    return streams["video"], [
        Exchange(devices, videos, *(exchanged(tokens, D, count, devices) for count in (blocks, PREDICTOR_BLOCKS)))
        for devices, videos in GROUPS
    ]


def shared_weights(teacher: float, student: float, trained: float, devices: int) -> float:
    """Bytes that each of `devices` sends in a pass of a training, of so many bytes of weights in all."""
    return (teacher + 2 * student + trained) * (devices - 1) / devices


def training_cells(conf: str = "wan_14b/cfg") -> list[list[str]]:
    """Rows of a distillation's table, for each of `TRAINING_GPUS`.

    Of a method that calls its teacher once a pass: `conf` is of method=cfg.
    """
    config, plan = load("distill", DistillConfig, conf), PlanConfig()
    found = plan_distillation(config, plan, conf)
    assert config.method == "cfg" and config.train.steps is not None
    training = found.work[0].times(1 / (config.train.steps * config.train.accumulate))
    seconds = plan.seconds(training.flops, training.float32)
    rows = []
    for gpus in TRAINING_GPUS:
        weights = (found.memory.shared[name] for name in ("teacher", "student", "gradients"))
        sent = shared_weights(*weights, devices=gpus)
        rows.append(
            [f"{gpus}", _bytes(sent), *(f"{sent / rate:.2g} s, {sent / rate / seconds:.1%}" for rate in LINKS.values())]
        )
    return rows


def table(conf: str = "hunyuan_video") -> str:
    """The rows as Markdown: of a video, or of a distillation where that is what the configuration is of."""
    if "/" in conf:
        head, cells = ["GPUs", "sent in a pass", *LINKS], training_cells(conf)
    else:
        head = ["GPUs", "videos", "sent in a full pass", "in a predicted one", *LINKS]
        cells = [row.cells(PASS_SECONDS.get(conf)) for row in exchanges(conf)[1]]
    lines = [head, ["--:"] * len(head), *cells]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _bytes(count: float) -> str:
    return f"{count / 1e9:.{0 if count > 1e11 else 1}f} GB" if count > 1e9 else f"{count / 1e6:.0f} MB"


def main(conf: str = typer.Argument("hunyuan_video", help="Of `vidaccel benchmark`, or of `distill`.")) -> None:
    """Print the table of docs/scale.md, for this model."""
    print(table(conf))


if __name__ == "__main__":
    typer.run(main)
