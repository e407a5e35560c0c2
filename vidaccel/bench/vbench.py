"""VBench's own package, in an environment of its own, on the videos that a benchmark kept.

It pins versions of torch and transformers that are not ours, so that it is run by another Python: one process a row,
in its mode for prompts of one's own (`custom_input`), which answers {dimension: [of all videos, [{"video_path",
"video_results"}, ...]]} in a JSON file. Its weights it fetches itself.
"""

import json
import math
import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from vidaccel.errors import UserError

PROBE = "print('python', flush=True); import vbench"
PROGRAM = """
import json, pathlib, sys
import torch, vbench
asked = json.loads(pathlib.Path(sys.argv[1]).read_text(encoding="utf-8"))
prompts = pathlib.Path(vbench.__file__).with_name("VBench_full_info.json")
device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
vbench.VBench(device, str(prompts), asked.pop("output")).evaluate(mode="custom_input", **asked)
"""
NAME = "row"
"""Begins the names of the files that it writes."""
HUNDREDFOLD = ("imaging_quality",)
"""Dimensions that it gives as percentages of single videos and as shares of all."""
NOT_OURS = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")
"""Of this process's environment, what would lead the other Python to our packages."""


class Judgement(NamedTuple):
    """Of one row's videos, from 0 to 1."""

    overall: dict[str, float]
    """By dimension."""
    videos: dict[str, dict[str, float]]
    """The same of each video by the name of its file, where VBench says it."""


def check(python: str) -> None:
    """`UserError` unless `python` runs and has the package."""
    hint = "give the path of python in the environment where VBench is installed: vbench=ENVIRONMENT/bin/python"
    try:
        done = _run(python, PROBE)
    except OSError as error:
        raise UserError(f"vbench={python} cannot be run: {error.strerror or error}", hint) from error
    if done.stdout.split()[:1] != ["python"]:
        raise UserError(f"vbench={python} is no Python", hint)
    if done.returncode:
        raise UserError(f"vbench={python} cannot import vbench: {_last_line(done.stderr)}", hint)


def judge(python: str, videos: Path, prompts: Mapping[str, str], dimensions: Sequence[str], work: Path) -> Judgement:
    """What VBench says of the videos in a folder.

    Args:
        prompts: of each file in it, by its name.
        work: a folder for what it writes.

    Raises:
        UserError: it fails, or its answer is none; with the last line that it said.
    """
    work.mkdir(parents=True, exist_ok=True)
    asked = {"videos_path": str(videos.absolute()), "name": NAME, "prompt_list": prompts, "dimension_list": dimensions}
    answer, log = work / f"{NAME}_eval_results.json", work / "log.txt"
    answer.unlink(missing_ok=True)
    task = work / "asked.json"
    task.write_text(json.dumps(asked | {"output": str(work.absolute())}), encoding="utf-8")
    done = _run(python, PROGRAM, str(task.absolute()), cwd=work)
    log.write_text(done.stdout + done.stderr, encoding="utf-8")
    hint = f"all that it said is in {log}; the same command goes on here, and without vbench= ends without it"
    if done.returncode:
        said = _last_line(done.stderr) or _last_line(done.stdout)
        raise UserError(f"VBench failed on {videos.name} with status {done.returncode}: {said}", hint)
    try:
        return _read(json.loads(answer.read_text(encoding="utf-8")), dimensions)
    except (OSError, ValueError, TypeError, KeyError, IndexError) as error:
        raise UserError(f"VBench left no answer of its form in {answer}: {error!r}", hint) from error


def _run(python: str, program: str, *words: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    found = shutil.which(python)
    path = str(Path(found).absolute()) if found else python
    environment = {key: value for key, value in os.environ.items() if key not in NOT_OURS}
    return subprocess.run(
        [path, "-c", program, *words],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
        cwd=cwd,
        env=environment,
    )


def _read(answer: dict[str, Any], dimensions: Sequence[str]) -> Judgement:
    overall: dict[str, float] = {}
    videos: dict[str, dict[str, float]] = {}
    for dimension in dimensions:
        said = answer[dimension]
        of_all, of_each = said if isinstance(said, list) else (said, [])
        if math.isfinite(of_all):
            overall[dimension] = float(of_all)
        for each in of_each:
            value = float(each["video_results"]) / (100 if dimension in HUNDREDFOLD else 1)
            if math.isfinite(value):
                videos.setdefault(Path(each["video_path"]).name, {})[dimension] = value
    return Judgement(overall, videos)


def _last_line(said: str) -> str:
    return next((line.strip() for line in reversed(said.splitlines()) if line.strip()), "it said nothing")
