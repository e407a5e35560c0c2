"""VBench by another Python: a stand-in for its package that answers in its format, and everything that can go wrong."""

import sys
from pathlib import Path

import pytest

from vidaccel.bench.vbench import check, judge
from vidaccel.errors import UserError

PACKAGE = """
import json, pathlib

class VBench:
    def __init__(self, device, full_info_dir, output_path):
        assert device == "cpu" and full_info_dir.endswith("VBench_full_info.json")
        self.output = pathlib.Path(output_path)

    def evaluate(self, videos_path, name, prompt_list, dimension_list, mode):
        assert mode == "custom_input"
        files = sorted(pathlib.Path(videos_path).iterdir())
        assert {file.name for file in files} == set(prompt_list)
        answer = {}
        for dimension in dimension_list:
            # as long as its prompt; VBench has imaging_quality of each in percent, and dynamic_degree as true or false
            each = [len(prompt_list[file.name]) / 100 for file in files]
            mean = sum(each) / len(each)
            unit = 100 if dimension == "imaging_quality" else 1
            given = [value > 0.05 for value in each] if dimension == "dynamic_degree" else [unit * v for v in each]
            answer[dimension] = [mean, [{"video_path": str(f), "video_results": v} for f, v in zip(files, given)]]
        (self.output / f"{name}_eval_results.json").write_text(json.dumps(answer))
"""
TORCH = """
class cuda:
    is_available = staticmethod(lambda: False)

device = str
"""
DIMENSIONS = ["imaging_quality", "dynamic_degree", "aesthetic_quality"]
PROMPTS = {"a-0.mp4": "a", "a circle-0.mp4": "a circle"}


def stand_in(folder: Path, package: str = PACKAGE) -> str:
    """A Python of an environment that has such a package."""
    for name, text in (("vbench", package), ("torch", TORCH)):
        (folder / "site" / name).mkdir(parents=True, exist_ok=True)
        (folder / "site" / name / "__init__.py").write_text(text)
    python = folder / "python"
    python.write_text(f'#!/bin/sh\nPYTHONPATH="{folder}/site" exec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    return str(python)


@pytest.fixture
def videos(tmp_path) -> Path:
    folder = tmp_path / "videos"
    folder.mkdir()
    for name in PROMPTS:
        (folder / name).touch()
    return folder


def test_what_it_says_of_all_and_of_each(tmp_path, videos):
    python = stand_in(tmp_path)
    check(python)
    found = judge(python, videos, PROMPTS, DIMENSIONS, tmp_path / "work")
    assert found.overall == pytest.approx(dict.fromkeys(DIMENSIONS, 0.045))
    assert found.videos["a-0.mp4"] == {"imaging_quality": 0.01, "dynamic_degree": 0.0, "aesthetic_quality": 0.01}
    assert found.videos["a circle-0.mp4"] == pytest.approx(dict(zip(DIMENSIONS, (0.08, 1.0, 0.08), strict=True)))


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ('{"imaging_quality": 0.5}', ({"imaging_quality": 0.5}, {})),
        ('{"imaging_quality": [NaN, [{"video_path": "/x/a-0.mp4", "video_results": 7}]]}', ({}, 0.07)),
        ('{"imaging_quality": [0.5]}', None),
        ('{"imaging_quality": [0.5, [{"video": "a"}]]}', None),
        ('{"imaging_quality": "good"}', None),
        ("[0.5]", None),
        ("{}", None),
        ("[", None),
        (None, None),
    ],
)
def test_answers_of_other_forms(tmp_path, videos, answer, expected):
    """One of all videos alone is taken as it is; what is none is named with its file."""
    write = f"(pathlib.Path(output) / 'row_eval_results.json').write_text({answer!r})" if answer else "pass"
    package = f"""
import pathlib
class VBench:
    def __init__(self, device, full_info_dir, output):
        {write}
    def evaluate(self, **asked):
        pass
"""
    python = stand_in(tmp_path, package)
    if expected is None:
        with pytest.raises(UserError, match="VBench left no answer of its form in .*row_eval_results.json") as raised:
            judge(python, videos, PROMPTS, ["imaging_quality"], tmp_path / "work")
        assert "log.txt" in raised.value.hint
        return
    overall, each = expected
    found = judge(python, videos, PROMPTS, ["imaging_quality"], tmp_path / "work")
    assert found.overall == overall
    assert found.videos == ({"a-0.mp4": {"imaging_quality": each}} if each else {})


def test_a_failure_shows_its_last_line_and_keeps_all(tmp_path, videos):
    package = (
        "class VBench:\n    def __init__(self, *words):\n        print('a')\n        raise OSError('no weights here')\n"
    )
    with pytest.raises(UserError, match="VBench failed on videos with status 1: OSError: no weights here"):
        judge(stand_in(tmp_path, package), videos, PROMPTS, DIMENSIONS, tmp_path / "work")
    said = (tmp_path / "work" / "log.txt").read_text()
    assert said.startswith("a\nTraceback") and "no weights here" in said


def test_a_python_without_it_is_refused_before_anything_runs(tmp_path):
    with pytest.raises(UserError, match="cannot be run: No such file or directory"):
        check(str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match="cannot be run: Permission denied"):
        check(str(tmp_path))
    with pytest.raises(UserError, match="/true is no Python"):
        check("/bin/true")
    with pytest.raises(UserError, match="cannot import vbench: ImportError: of torch 1"):
        check(stand_in(tmp_path, "raise ImportError('of torch 1')"))
    with pytest.raises(UserError, match="cannot import vbench: ModuleNotFoundError: No module named 'vbench'"):
        check(sys.executable)
