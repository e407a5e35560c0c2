"""Scores are the same whoever judges."""

import multiprocessing
import os
import random
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from vidaccel.bench.generation import TimedGeneration
from vidaccel.bench.judges import judged, judges
from vidaccel.bench.measures.quality import summary
from vidaccel.bench.rows import Row, Rows
from vidaccel.config.benchmark import BenchmarkConfig, MethodConfig
from vidaccel.worlds.sprites.captions import caption
from vidaccel.worlds.sprites.render import render, to_uint8
from vidaccel.worlds.sprites.world import random_scene

SCENES = [random_scene(random.Random(i)) for i in range(3)]
PROMPTS = [caption(scene, random.Random(0)) for scene in SCENES]


@pytest.fixture(scope="module")
def videos() -> list[TimedGeneration]:
    clips = [to_uint8(render([scene])).numpy() for scene in SCENES]
    return [TimedGeneration(clip, torch.full((1, 4, 5, 8, 8), i + 1.0), 0.0, 0.0) for i, clip in enumerate(clips)]


def test_other_processes_judge_as_this_one_does(videos, tmp_path):
    size, row = (17, 64, 64), Row("student-20", MethodConfig(steps=20), (17, 64, 64))
    rows = Rows(tmp_path, [row])
    rows.save_reference(size, 0, videos[0])
    rows.save_reference(size, 0, videos[1], row)
    files = rows.reference_file(size, 0), {row.name: rows.reference_file(size, 0, row), "lost": tmp_path / "lost"}
    with judges(BenchmarkConfig(scoring_processes=2), torch.device("cpu")) as others:
        futures = [others.submit(judged, "sprites", *each, *files) for each in zip(PROMPTS, videos, strict=True)]
        found = [future.result() for future in futures]
    assert found[0]["marks"]["shape"] == 1 and found[0]["likeness"]["latent_relative_l2"] == 0
    assert found[1]["own"].keys() == {row.name} and found[1]["own"][row.name]["psnr_db"] is None
    assert [each["likeness"]["latent_relative_l2"] for each in found] == [0, 1, 2]
    here = judged("sprites", PROMPTS[2], videos[2], *files)
    assert [len(each["features"]) for each in found] == [len(scene.sprites) for scene in SCENES]
    assert found[2]["marks"] == pytest.approx(here["marks"]) and found[2]["own"] == {
        row.name: pytest.approx(here["own"][row.name], nan_ok=True)
    }


def test_without_a_scorer_or_a_reference(videos):
    assert judged(None, "a", videos[0], None, {}) == {
        "marks": None,
        "features": [],
        "likeness": None,
        "own": {},
    }


@pytest.mark.parametrize(("count", "device", "expected"), [(None, "cpu", False), (0, "cuda", False), (1, "cpu", True)])
def test_how_many_processes(count, device, expected):
    with judges(BenchmarkConfig(scoring_processes=count), SimpleNamespace(type=device)) as others:
        assert (others is not None) is expected


def test_judges_end_with_the_process_that_they_judge_for():
    """Whose SIGTERM they do not take for it, and which may be killed."""

    def benchmark(told) -> None:
        signal.signal(signal.SIGTERM, lambda *_: None)
        with judges(BenchmarkConfig(scoring_processes=2), torch.device("cpu")) as others:
            told.send((others.submit(_ends_on_sigterm).result(), list(others._processes)))
            os.kill(os.getpid(), signal.SIGKILL)

    way = multiprocessing.get_context("fork")
    here, there = way.Pipe()
    process = way.Process(target=benchmark, args=(there,))
    process.start()
    there.close()
    ends_on_sigterm, pids = here.recv()
    process.join()
    assert ends_on_sigterm
    ended = time.monotonic() + 20
    while any(_lives(pid) for pid in pids):
        assert time.monotonic() < ended
        time.sleep(0.05)


def _ends_on_sigterm() -> bool:
    return signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def _lives(pid: int) -> bool:
    """A dead one that nobody has waited for is as good as gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_what_a_prompt_does_not_say_is_held_against_the_other_video(tmp_path):
    scene = random_scene(random.Random(0), pair_share=0.0, lamps=1.0)
    prompt, frames = caption(scene, random.Random(0)), to_uint8(render([scene])).numpy()
    video = TimedGeneration(frames, torch.ones(1, 4, 5, 8, 8), 0.0, 0.0)
    rows = Rows(tmp_path, [Row("student-20", MethodConfig(steps=20), (17, 64, 64))])
    rows.save_reference((17, 64, 64), 0, video)
    found = judged("sprites/lamps", prompt, video, rows.reference_file((17, 64, 64), 0), {})
    assert found["likeness"]["agreement"] == 1 and found["marks"]["lamps"] > 0.9
    told = summary([found, found], ["a", "b"], None)
    assert told["fidelity"]["agreement"] == 1 and told["intervals"]["fidelity.agreement"] == [1, 1]
    assert "agreement" not in summary([found | {"likeness": {"ssim": 1.0}}] * 2, ["a", "b"], None)["fidelity"]
