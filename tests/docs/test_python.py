"""The Python lines of README and docs/accelerate-your-model.md run, on tiny models in the places that they name."""

import re
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch

from tests.docs.pages import ROOT, Code, blocks, name, spans
from tests.published import hunyuan_video_predictor, hunyuan_video_student, write
from tests.students import STARTED, save, save_teacher, trained
from tests.tiny import SIZE
from vidaccel import api
from vidaccel.artefacts import write_run
from vidaccel.cache.schedule import Schedule, write_schedules
from vidaccel.forecasters.learned import new_predictor
from vidaccel.models.loading import load_pipeline
from vidaccel.models.weight_hashes import student_hash

SMALLER = (
    (r'"cuda"', '"cpu"'),
    (r"torch\.bfloat16", "torch.float32"),
    (r"=50\b", "=4"),
    (r'\("a cat on a surfboard"', f'("a cat on a surfboard", **{SIZE}'),
)
"""What is another on a small machine."""
PAGES = (ROOT / "README.md", ROOT / "docs" / "accelerate-your-model.md")
PASSES = dict(zip(PAGES, (2 * 6 + 2 * 4 + 20, 20), strict=True))
"""Of the transformer: two a step with guidance, one of the student."""
PYTHON = [
    code
    for page in PAGES
    for code in blocks(page)
    if code.language != "text" and re.search(r"^(import|with) ", code.text, re.MULTILINE)
]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory) -> Path:
    """path/to/Wan2.1, runs/student and runs/predictor, as the commands before the lines left them; HunyuanVideo and
    what has been published for it."""
    folder = tmp_path_factory.mktemp("workplace")
    save_teacher(folder / "path/to/Wan2.1", "wan")
    save_teacher(folder / "path/to/HunyuanVideo", "hunyuan_video")
    write(folder / "path/to/hyvideo10_t2v_restricted_meanflow_540p.safetensors", hunyuan_video_student())
    write(folder / "path/to/hyvideo10_t2v_predictor_540p.safetensors", hunyuan_video_predictor())
    loaded = load_pipeline(folder / "path/to/Wan2.1")
    save(folder / "runs/student", loaded, trained(loaded), steps=20)
    student = load_pipeline(folder / "runs/student")
    tokens = {"hidden_states": torch.randn(1, 8, 24)}
    made_for = {"steps": 20, "shift": 2.0, "student": student_hash(student)}
    predictor = new_predictor(student.pipe.transformer, student.family, tokens, tokens, blocks=1, **made_for)
    predictor.save_pretrained(folder / "runs/predictor")
    schedule = Schedule(20, (0, 1, 2, 5, 9, 13, 17, 19), "search", 2.0)
    write_schedules(folder / "runs/predictor/schedule.json", [schedule])
    write_run(folder / "runs/predictor", format="predictor/1", command="test", config={}, seed=0, started=STARTED)
    return folder


def test_there_is_python_on_both_pages():
    assert {code.page for code in PYTHON} == set(PAGES)


@pytest.mark.parametrize("code", PYTHON, ids=lambda code: f"{name(code.page)}:{code.line}")
def test_python_runs(code: Code, workplace, monkeypatch):
    monkeypatch.chdir(workplace)
    passes = []
    for transformer in (diffusers.WanTransformer3DModel, diffusers.HunyuanVideoTransformer3DModel):
        monkeypatch.setattr(transformer, "forward", counted(transformer.forward, passes))
    text = code.text
    for pattern, smaller in SMALLER:
        text = re.sub(pattern, smaller, text)
    assert text != code.text
    made: dict = {}
    exec(compile(text, str(code.page), "exec"), made)
    videos = [made[key] for key in ("frames", "video") if key in made]
    assert videos and all(np.shape([np.asarray(frame) for frame in video]) == (5, 32, 32, 3) for video in videos)
    assert len(passes) == PASSES[code.page]


def counted(forward, passes: list):
    return lambda self, *args, **kwargs: passes.append(self) or forward(self, *args, **kwargs)


def test_functions_that_the_text_names_are_public():
    import vidaccel

    named = {call for page in PAGES for span in spans(page) for call in re.findall(r"\bvidaccel\.(\w+)\(", span)}
    named |= {call for code in PYTHON for call in re.findall(r"\bvidaccel\.(\w+)\(", code.text)}
    assert named and named <= set(vidaccel.__all__)
    readme = " ".join(spans(ROOT / "README.md"))
    assert all(hasattr(api, each) and each in readme for each in ("collect_features", "train_predictor", "plan"))
