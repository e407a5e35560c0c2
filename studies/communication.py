"""What Ulysses attention sends between the devices that make one video, computed: `python -m studies.communication`.

In each block a device trades its tokens of all heads for all tokens of its heads, three times (queries, keys, values),
and back once (what attention gives): of each such tensor [N / P, D] it sends all but its own part. Behind the last
block the video is put together again. Nothing else is sent, whatever is cached. tests/runtime/test_context_parallel.py
counts what two processes send.

N tokens, D width, P devices
"""

from dataclasses import dataclass

import typer

from vidaccel.bench.sizes import meta_transformer, rows
from vidaccel.config.benchmark import BenchmarkConfig
from vidaccel.config.loader import load
from vidaccel.families.registry import FAMILIES
from vidaccel.families.walk import blocks_of, width

PASS_SECONDS = {"hunyuan_video": 10.31}
"""Of a full pass on one H100, by configuration: a hundredth of README's measured 1031 s. Of others no share is said."""
LINKS = {"NVLink, 450 GB/s": 450e9, "network, 50 GB/s": 50e9}
"""Bytes a second that a device sends to others at once: within a machine with H100s, and by a 400 Gb/s card each."""
GROUPS = ((2, 1), (4, 1), (8, 1), (8, 8))
"""(devices of a video, videos at once)."""
PREDICTOR_BLOCKS = 2


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


def table(conf: str = "hunyuan_video") -> str:
    """The rows as Markdown."""
    head = ["GPUs", "videos", "sent in a full pass", "in a predicted one", *LINKS]
    lines = [head, ["--:"] * len(head), *(row.cells(PASS_SECONDS.get(conf)) for row in exchanges(conf)[1])]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _bytes(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count > 1e9 else f"{count / 1e6:.0f} MB"


def main(conf: str = typer.Argument("hunyuan_video", help="A shipped configuration of `vidaccel benchmark`.")) -> None:
    """Print the table of docs/scale.md, for this model."""
    print(table(conf))


if __name__ == "__main__":
    typer.run(main)
