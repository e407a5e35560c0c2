"""What is known of each row while a benchmark runs, on disk after every step of it.

    rows/<name>.json      counts, seconds of each round, scores of each prompt ("marks"), or the error
    frames/<name>.safetensors    some frames of the first prompt, for the sheet; <name>.mp4 all of them, for the report
    reference/<i>.safetensors    the baseline's video i, and <name>-<i> of other rows that some are compared with, until
                          the end
    videos/<name>/<prompt>-<n>.mp4    with keep_videos: what is scored, by the names that VBench expects

A round counts when all rows that have no error were timed in it: a ratio is between neighbours in time.
"""

import re
from collections import Counter
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from vidaccel.artefacts import atomic_path, read_json, write_json
from vidaccel.bench.generation import Size, TimedGeneration
from vidaccel.config.benchmark import MethodConfig
from vidaccel.config.checks import SIZE
from vidaccel.data.video import write_video
from vidaccel.errors import UserError

SHEET_FRAMES = 8
CLIP_SIDE = 256
"""Pixels of the shorter side of a clip in the report, about."""
LONGEST_NAME = 230
"""Bytes of a prompt in the name of its video, which with the rest may not pass the 255 of a file system."""
NOT_RUN = "not run: "
"""Begins the error of a row that was left out because what it runs on is not named or cannot be loaded."""
SCHEMA = 1
"""Version of results.json."""
FIELDS = (
    "prompts",
    "seeds",
    "full_steps",
    "passes",
    "text_seconds",
    "denoise_seconds",
    "decode_seconds",
    "write_seconds",
    "end_to_end_seconds",
    "flops",
    "peak_memory_bytes",
    "cache_bytes",
    "parameters",
    "semantic",
    "quality",
    "total",
    "dimensions",
    "fidelity",
    "own_fidelity",
    "vbench",
    "distribution",
    "intervals",
    "per_prompt",
    "full_pass_equivalents",
    "contrasts",
    "error",
)
"""Of a run: null until something is known."""


STAGES = ("text", "denoise", "decode", "write")
"""Of making a video: prompts to embeddings, the sampler, latents to frames, frames to an mp4."""


@dataclass
class Row:
    """One method on one size."""

    name: str
    method: MethodConfig
    size: Size
    settings: dict[str, Any] = field(default_factory=dict)
    """Of its cache, with those that a calibration found."""
    counts: dict[str, Any] | None = None
    """full_steps, passes, flops, cache_bytes, peak_memory_bytes, parameters."""
    rounds: list[dict[str, Any]] = field(default_factory=list)
    """Seconds of each round by STAGES and "end_to_end", the mean of its videos; earlier versions kept "denoise" and
    "end_to_end" alone, without writing."""
    videos: list[dict[str, Any]] = field(default_factory=list)
    """{"marks", "features", "likeness", "own"} of each scored prompt: scores, points to compare sets of videos by, and
    likeness to the videos of the baseline and, by their names, of rows in which the same model runs in full; "vbench"
    where VBench judged them."""
    vbench: dict[str, float] = field(default_factory=dict)
    """What VBench says of all videos together, by dimension, from 0 to 1."""
    error: str | None = None
    attempts: int = 0
    """How often the work that is under way was begun without ending; 0 between two pieces of work."""

    @property
    def id(self) -> str:
        return "/".join([self.name, self.method.weights, "x".join(map(str, self.size))])

    @property
    def file_name(self) -> str:
        return re.sub(r"[^\w.=-]+", "_", self.id)


def blank_run(row: Row, family: str) -> dict[str, Any]:
    """A run of which only the settings are known."""
    return dict.fromkeys(FIELDS) | {
        "method": row.name,
        "family": family,
        "on": row.method.weights,
        "id": row.id,
        "settings": asdict(row.method),
        "size": dict(zip(SIZE, row.size, strict=True)),
        "steps": row.method.steps,
        "speedup": speedups(),
    }


def speedups(
    measured: float | None = None, ideal: float | None = None, end_to_end: float | None = None
) -> dict[str, float | None]:
    """As a run of results.json has them: `measured` of denoising, `ideal` of its FLOPs, `end_to_end` of all stages."""
    share = measured / ideal if measured and ideal else None
    return {"measured": measured, "ideal": ideal, "measured_over_ideal": share, "end_to_end": end_to_end}


class Rows:
    """The rows of one output folder."""

    def __init__(self, folder: Path, rows: Iterable[Row]):
        self.folder, self.rows = folder, []
        self.add(rows)

    def add(self, rows: Iterable[Row]) -> None:
        """More rows, behind those that are there, with what is on disk about them."""
        added = list(rows)
        self.rows += added
        for row in added:
            if self._file(row).exists():
                known = read_json(self._file(row), "remove this file to time the row anew")
                for name in ("settings", "counts", "rounds", "videos", "error", "attempts"):
                    setattr(row, name, known[name])
                row.vbench = known.get("vbench", {})

    def keep_whole_rounds(self) -> None:
        """Forget those in which not all rows were timed."""
        whole = min((len(row.rounds) for row in self.without_error), default=0)
        for row in self.without_error:
            del row.rounds[whole:]

    @property
    def without_error(self) -> list[Row]:
        return [row for row in self.rows if row.error is None]

    def save(self, row: Row) -> None:
        write_json(self._file(row), {key: value for key, value in asdict(row).items() if key not in ("name", "method")})

    def save_frames(self, row: Row, frames: np.ndarray) -> None:
        """A few of frames [T, H, W, 3] that are evenly spaced."""
        chosen = np.linspace(0, len(frames) - 1, min(SHEET_FRAMES, len(frames))).round().astype(int)
        _save(self.folder / "frames" / f"{row.file_name}.safetensors", frames=torch.from_numpy(frames[chosen]))

    def save_clip(self, row: Row, frames: np.ndarray, fps: float) -> None:
        """The video uint8 [T, H, W, 3] that the report plays, no larger than a page needs; none where no mp4 can be
        written."""
        with suppress(ImportError, UserError):
            write_video(_shrunk(frames), self.folder / "frames" / f"{row.file_name}.mp4", fps)

    def clip(self, row: Row) -> bytes | None:
        """That mp4."""
        file = self.folder / "frames" / f"{row.file_name}.mp4"
        return file.read_bytes() if file.exists() else None

    def frames(self, row: Row) -> np.ndarray | None:
        file = self.folder / "frames" / f"{row.file_name}.safetensors"
        return load_file(file)["frames"].numpy() if file.exists() else None

    def video_files(self, row: Row, prompts: Iterable[str]) -> list[Path]:
        """Where the row's video of each prompt is kept, by the names that VBench expects."""
        names = [re.sub(r"[/\\\0]", " ", each).encode()[:LONGEST_NAME].decode(errors="ignore") for each in prompts]
        folder, seen = self.folder / "videos" / row.file_name, Counter[str]()
        files = []
        for name in names:
            files.append(folder / f"{name}-{seen[name]}.mp4")
            seen[name] += 1
        return files

    def save_reference(self, size: Size, index: int, made: TimedGeneration, own: Row | None = None) -> None:
        """Video `index` of the baseline, or of the row that others of the same model are compared with."""
        _save(self.reference_file(size, index, own), frames=torch.from_numpy(made.frames), latents=made.latents)

    def reference_file(self, size: Size, index: int, own: Row | None = None) -> Path:
        """Where `save_reference` puts it."""
        name = "x".join(map(str, size)) if own is None else own.file_name
        return self.folder / "reference" / f"{name}-{index}.safetensors"

    def _file(self, row: Row) -> Path:
        return self.folder / "rows" / f"{row.file_name}.json"


def read_reference(file: Path) -> TimedGeneration | None:
    """The one video in it; None if there is no such file."""
    if not file.exists():
        return None
    tensors = load_file(file)
    return TimedGeneration(tensors["frames"].numpy(), tensors["latents"], 0.0, 0.0)


def _shrunk(frames: np.ndarray) -> np.ndarray:
    """Frames uint8 [T, H, W, 3] by a whole factor smaller, as means, of even sizes."""
    factor = max(1, min(frames.shape[1:3]) // CLIP_SIDE)
    height, width = (2 * (side // (2 * factor)) for side in frames.shape[1:3])
    cut = frames[:, : height * factor, : width * factor]
    parts = cut.reshape(len(cut), height, factor, width, factor, 3)
    return parts.mean((2, 4), dtype=np.float32).round().astype(np.uint8)


def _save(path: Path, **tensors: torch.Tensor) -> None:
    with atomic_path(path) as temporary:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary)
