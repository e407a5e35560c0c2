"""The commands of docs/accelerate-your-model.md run one after another, with its YAML files, on a tiny Wan.

Left out are those that want a GPU or a compiler, and what README's way (test_own_model.py) and the tests of the
benchmark run in the same words.
"""

import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from tests.docs.pages import ROOT, blocks, commands
from tests.published import hunyuan_video_predictor, hunyuan_video_student, write
from tests.students import save_teacher
from vidaccel.cli.main import app
from vidaccel.data.clips import write_clips
from vidaccel.models.loading import load_pipeline

PAGE = ROOT / "docs" / "accelerate-your-model.md"
LEFT_OUT = ("--conf sprites/decoder", "compile=true", "--random-weights", "-o runs/untrained", "-o runs/bench")
FEWER = {
    "distill": ["train.steps=1", "train.accumulate=1"],
    "train-predictor": ["mse.steps=1", "mse.accumulate=1", "clips=2", "search_prompts=1", "tried=1"],
    "benchmark": ["timed_seconds=0", "prompts=[a red circle]"],
}
"""What is not the point, on the machine of a test."""
OTHER = (
    ("--device cuda", "--device cpu"),
    ("-o runs/cfg train.lora_rank=64", "-o runs/adapters train.lora_rank=2"),  # another way to what was just made
)
MADE = {
    "plain.mp4": "6 steps, 12 passes, guidance 3",
    "turn.mp4": "photo.jpg: 60x40, 33% cropped away, scaled to 32x32",
    "turns": "photos/photo.jpg: 60x40, 33% cropped away, scaled to 32x32",
    "published.mp4": "20 steps, 8 full + 12 predicted passes",
    "every3.mp4": "6 steps, 4 full + 8 predicted passes",
    "searched.mp4": "20 steps, 16 full + 24 predicted passes",
    "both.mp4": "right path/to/Wan2.1-T2V-1.3B-Diffusers, 6 steps, 12 passes",
    "cfg.mp4": "50 steps, 50 passes",
    "student.mp4": "20 steps, 20 passes",
    "runs/cfg-for-diffusers": "for diffusers alone; call its pipeline with num_inference_steps=50",
    "ten.mp4": "10 steps, 10 passes",
    "decoded.mp4": "by runs/decoder",
    "fast.mp4": "20 steps, 8 full + 12 predicted passes",
}


@pytest.fixture
def _reader(tmp_path, monkeypatch):
    """A folder with the models, the clips, images and prompts, and the YAML files that the page names."""
    monkeypatch.chdir(tmp_path)
    save_teacher(Path("path/to/Wan2.1-T2V-1.3B-Diffusers"), "wan")
    save_teacher(Path("path/to/Wan2.1-I2V-14B-480P-Diffusers"), "wan_i2v")
    save_teacher(Path("path/to/HunyuanVideo"), "hunyuan_video")
    write(Path("path/to/hyvideo10_t2v_restricted_meanflow_540p.safetensors"), hunyuan_video_student())
    write(Path("path/to/hyvideo10_t2v_predictor_540p.safetensors"), hunyuan_video_predictor())
    Path("photos").mkdir()
    for photo in ("photo.jpg", "photos/photo.jpg"):
        Image.new("RGB", (60, 40), "red").save(photo)
    Path("prompts.txt").write_text("a red circle\n")
    frames = np.random.default_rng(0).integers(0, 256, (3, 12, 40, 48, 3), dtype=np.uint8)
    write_clips("path/to/clips", zip(frames, ("a red circle", "blue", "a green circle"), strict=True), fps=16)
    for code in blocks(PAGE):
        if named := re.match(r"# (mine/\S+\.yaml)\n", code.text):
            Path(named[1]).parent.mkdir(exist_ok=True)
            Path(named[1]).write_text(code.text)


def test_the_page_from_top_to_bottom(_reader):
    said = {}
    for line in commands(PAGE, "vidaccel"):
        if any(words in line for words in LEFT_OUT):
            continue
        for old, new in OTHER:
            line = line.replace(old, new)
        words = shlex.split(line, comments=True)[1:]
        fewer = FEWER.get(words[0], []) if "--plan" not in words and "stage=search" not in words else []
        result = CliRunner().invoke(app, [*words, *fewer])
        assert result.exit_code == 0, f"{line}\n{result.output}"
        if words[0] == "generate":
            said[words[words.index("-o") + 1]] = result.stdout
    assert {file: how for file, how in MADE.items() if how not in said[file]} == {} and said.keys() == MADE.keys()
    assert Path("runs/adapters/transformer").is_dir() and load_pipeline("runs/student").call["steps"] == 20
    assert Path("runs/rows/report.html").is_file()
