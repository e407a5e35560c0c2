"""`vidaccel generate --compare`: a fast way beside the model's own full way, through the command line."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from tests.students import save, save_teacher, trained
from tests.tiny import FLOW, TEXT_TO_VIDEO
from vidaccel.api import generate
from vidaccel.artefacts import RUN_FILE
from vidaccel.cli.main import app
from vidaccel.comparison import full_way
from vidaccel.config.generate import GenerateConfig
from vidaccel.models.loading import load_pipeline
from vidaccel.sampling import too_small


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def run(*args: str):
    return CliRunner().invoke(app, ["generate", "a red circle", *args])


def with_student(family: str) -> None:
    """A model, its student in one pass, and one in 4 steps of that."""
    loaded = load_pipeline(save_teacher(Path("model"), family))
    save(Path("cfg"), loaded, trained(loaded, ("g",)), steps=6, config={"teacher": "model", "method": "cfg"})
    loaded = load_pipeline("cfg")
    save(Path("student"), loaded, trained(loaded), config={"teacher": "cfg", "method": "mean_velocity"})


@pytest.mark.parametrize("family", TEXT_TO_VIDEO)
def test_a_forecast_beside_the_same_model_in_full(family):
    save_teacher(Path("model"), family)
    words = ["model=model", "predictor=reuse", "full_steps=[0,3]", "guidance=4", "--seed", "2"]
    result = run(*words, "--compare", "-o", "both")
    assert result.exit_code == 0, result.output
    line, gain = result.stdout.splitlines()
    quick = "left model, 6 steps, 4 full + 8 predicted passes, guidance 4"
    assert line == f"both: {quick}; right model, 6 steps, 12 passes, guidance 4"
    assert re.fullmatch(
        r"both: [\d.]+x in denoising \([\d.]+ s for [\d.]+ s\)( \(too small to gain: the passes take [\d.]+ ms\))?, "
        r"[\d.]+x end to end \([\d.]+ s for [\d.]+ s\); latent error 0\.\d+ \(0 is identical\)",
        gain,
    )
    both = np.stack([_png(file) for file in sorted(Path("both").glob("*.png"))])
    assert both.shape == (5, 16 + 32, 32 + 2 + 32, 3)
    quick = generate("a red circle", model="model", predictor="reuse", full_steps=[0, 3], guidance=4, seed=2)
    full = generate("a red circle", model="model", guidance=4, seed=2)
    assert np.array_equal(both[:, 16:, :32], quick) and np.array_equal(both[:, 16:, 34:], full)
    assert not np.array_equal(quick, full)


def _png(file: Path) -> np.ndarray:
    from PIL import Image

    return np.asarray(Image.open(file))


def test_every_step_in_full_is_no_error():
    save_teacher(Path("model"), "wan")
    made = json.loads(run("model=model", "predictor=reuse", "every=1", "--compare", "--json").stdout)
    assert made["compared"]["latent_error"] == [0.0]


@pytest.mark.parametrize("family", FLOW)
@pytest.mark.parametrize("predicted", [[], ["predictor=taylor", "full_steps=[0,2]"]], ids=["student", "predicted"])
def test_a_student_beside_the_model_that_it_stands_in_for(family, predicted):
    with_student(family)
    made = json.loads(run("model=student", *predicted, "--compare", "--json", "--sheet", "sheet.png").stdout)
    compared = made["compared"]
    assert made["passes"] == {"full": 4 - 2 * bool(predicted), "predicted": 2 * bool(predicted)}
    named = {key: compared[key] for key in ("model", "steps", "passes", "guidance")}
    assert named == {"model": "model", "steps": 6, "passes": 12, "guidance": 4.0}  # the student's scale, not its own 3
    assert compared["latent_error"][0] > 0 and compared["speedup"][0].keys() == {"denoising", "end_to_end"}
    assert Path("sheet.png").is_file() and made["files"] == ["out.mp4"] and Path("out.mp4").is_file()


def test_many_prompts_make_as_many_pairs():
    save_teacher(Path("model"), "wan")
    Path("prompts.txt").write_text("a red circle\na blue square\n")
    words = ["--prompts", "prompts.txt", "model=model", "predictor=reuse", "every=2", "--compare", "-o", "videos"]
    result = CliRunner().invoke(app, ["generate", *words])
    assert result.exit_code == 0, result.output
    assert sorted(path.name for path in Path("videos").iterdir()) == ["0000.mp4", "0001.mp4"]
    assert result.stdout.count("latent error") == 2


def test_a_model_that_is_named_takes_the_place_of_the_teacher():
    with_student("wan")
    shutil.move("model", "moved")
    lost = run("model=student", "--compare")
    assert lost.exit_code == 2 and "model, which cfg was distilled from, is not here" in lost.stderr
    assert "hint: name the model that it stands in for: compare_to=MODEL" in lost.stderr
    made = json.loads(run("model=student", "--compare", "compare_to=moved", "--json").stdout)
    assert made["compared"]["model"] == "moved"


def test_a_released_student_is_held_against_its_base_model_as_it_is():
    """LoRA files that are in that model's weights already, as an export says of them, are not added once more."""
    file = save_teacher(Path("model"), "hunyuan_video") / RUN_FILE
    file.write_text(json.dumps(json.loads(file.read_text()) | {"config": {"lora": ["style.safetensors:0.5"]}}))
    full = full_way(GenerateConfig(model="model", student="released.safetensors", lora=["fast.safetensors"]))
    assert (full.model, full.student, full.lora) == ("model", None, None)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["model=model", "--compare"], "nothing to compare: this is the model's own full way"),
        (["model=model", "compare_to=model"], "compare_to=model came without --compare"),
        (["model=model", "--compare", "compare_to=./nowhere"], "there is no folder ./nowhere"),
        (["model=model", "--compare", "compare_to=other"], "other is a HunyuanVideo, and model a Wan 2.1"),
        (["model=model", "predictor=reuse", "--compare"], "nothing says which steps are full"),
        (["model=model", "predictor=reuse", "every=2", "--compare", "-o", "a.avi"], "cannot write a.avi"),
    ],
)
def test_what_cannot_be_compared_is_refused(words, said, monkeypatch):
    save_teacher(Path("model"), "wan")
    save_teacher(Path("other"), "hunyuan_video")
    monkeypatch.setattr("vidaccel.sampling.run_pipeline", None)  # nothing is made
    monkeypatch.setattr("vidaccel.session.generate", lambda *args, **more: None)
    result = run(*words)
    assert result.exit_code == 2 and said in result.stderr, result.output
    assert not Path("out.mp4").exists()


def test_no_line_reads_as_a_slowdown_without_a_reason(monkeypatch):
    save_teacher(Path("model"), "wan")
    monkeypatch.setattr("vidaccel.sampling.REFERENCE_PASSES", 0)  # so that no denoising is shorter
    result = run("model=model", "predictor=reuse", "every=2")
    assert re.search(r"denoising [\d.]+ s \(too small to gain: the passes take [\d.]+ ms\)", result.stdout)
    assert too_small(2.0) == "no gain here: full passes take 2 s, and the others as long"
