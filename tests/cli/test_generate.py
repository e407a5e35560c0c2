"""`vidaccel generate` through real files: what it writes, what it says, and how it refuses."""

import json
import os
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from peft import LoraConfig
from PIL import Image
from typer.testing import CliRunner

from tests import tiny
from tests.students import save, student, trained
from tests.tiny import HUNYUAN_CALL, SIZE, tiny_pipeline
from tests.train.torchrun import program
from vidaccel.artefacts import sha256_file, write_run
from vidaccel.cli.main import app
from vidaccel.data.ffmpeg import list_frames
from vidaccel.models.loading import load_pipeline
from vidaccel.prompts import prompts_in

QUICK = ["steps=2", *(f"{name}={value}" for name, value in SIZE.items())]


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Path]:
    """A tiny random pipeline folder of every family; HunyuanVideo's says itself how it is to be called."""
    root = tmp_path_factory.mktemp("models")
    for family in ("hunyuan_video", "hunyuan_video_15", "wan"):
        tiny_pipeline(family).save_pretrained(root / family)
    write_run(
        root / "hunyuan_video",
        format="model/1",
        command="test",
        config={},
        seed=0,
        started=datetime.now(UTC),
        call=HUNYUAN_CALL | SIZE | {"fps": 8, "steps": 2, "guidance": 3.0},
    )
    return {folder.name: folder for folder in root.iterdir()}


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def run(*args: str):
    return CliRunner().invoke(app, ["generate", *map(str, args)])


@pytest.mark.parametrize("family", ["hunyuan_video", "hunyuan_video_15", "wan"])
def test_every_family_makes_a_video(models, family):
    result = run("a red circle", f"model={models[family]}", *QUICK, "-o", "out.mp4")
    assert result.exit_code == 0, result.output
    made = list_frames(Path("out.mp4"), until=60)
    assert (len(made.times), made.height, made.width) == (5, 32, 32)
    assert result.stdout.startswith("out.mp4: 5 frames 32x32; 2 steps, 4 passes")


def test_json_says_what_was_made(models):
    model = models["hunyuan_video"]
    result = run(
        "a red circle",
        f"model={model}",
        "--seed",
        "7",
        "--json",
        "--sheet",
        "sheet.png",
    )
    made = json.loads(result.stdout)
    assert made["files"] == ["out.mp4"]
    assert (made["seed"], made["steps"], made["shift"], made["guidance"]) == (7, 2, 5.0, 3.0)
    assert made["passes"] == {"full": 4, "predicted": 0}
    assert (made["predictor"], made["full_steps"]) == (None, None)
    assert made["size"] == [5, 32, 32]
    assert set(made["seconds"]) == {"load", "text", "denoise", "decode", "write"}
    weights = model / "transformer" / "diffusion_pytorch_model.safetensors"
    assert made["hashes"]["transformer/diffusion_pytorch_model.safetensors"] == sha256_file(weights)
    assert Image.open("sheet.png").width >= 5 * 32


@pytest.fixture(scope="module")
def students(tmp_path_factory) -> dict[str, Path]:
    """One of its own weights, made for 4 steps with guidance 4, and one that is an adapter of its teacher."""
    root = tmp_path_factory.mktemp("students")
    made = {"student": student(root, "hunyuan_video")}
    teacher = load_pipeline(root / "teacher")
    adapter = LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False)
    teacher.pipe.transformer.add_adapter(adapter)
    return made | {"adapter": save(root / "adapter", teacher, trained(teacher))}


@pytest.mark.parametrize("kind", ["student", "adapter"])
def test_a_student_is_a_model_like_any_other(students, kind):
    result = run("a red circle", f"model={students[kind]}", "-o", "out.mp4")
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("out.mp4: 5 frames 32x32; 4 steps, 4 passes, guidance 4;")
    made = json.loads(run("a red circle", f"model={students[kind]}", "steps=2", "guidance=7", "--json").stdout)
    assert (made["steps"], made["passes"]["full"], made["guidance"]) == (2, 2, 7.0)
    assert "conditioning/model.safetensors" in made["hashes"]
    assert ("lora/pytorch_lora_weights.safetensors" in made["hashes"]) == (kind == "adapter")


def test_predicted_steps_are_counted_and_said(students):
    """Two videos under one attachment, the second as it is alone."""
    Path("prompts.txt").write_text("a red circle\na blue square\n")
    own = [f"model={students['student']}", "predictor=reuse"]
    result = run("--prompts", "prompts.txt", "-o", "videos", *own, "full_steps=[0,2]")
    assert result.exit_code == 0, result.output
    assert result.stdout.count("4 steps, 2 full + 2 predicted passes, guidance 4; denoising") == 2
    assert "(50 steps of two full passes take about" in result.stdout
    Path("schedule.json").write_text(json.dumps({"steps": 4, "full_steps": [0, 2], "budget": 2}))
    made = json.loads(run("a blue square", *own, "schedule=schedule.json", "--seed", "1", "--json").stdout)
    assert made["passes"] == {"full": 2, "predicted": 2}
    assert (made["predictor"], made["full_steps"]) == ("reuse", [0, 2])
    assert Path("out.mp4").read_bytes() == Path("videos/0001.mp4").read_bytes()
    assert len(run("--prompts", "prompts.txt", "-o", "videos", *own, "schedule=schedule.json").stdout.splitlines()) == 2
    Path("schedule.json").write_text(json.dumps({"steps": 4, "full_steps": [0, 3], "budget": 2}))
    assert len(run("--prompts", "prompts.txt", "-o", "videos", *own, "schedule=schedule.json").stdout.splitlines()) == 2
    assert run("a blue square", *own, "every=2", "--seed", "1", "-o", "every.mp4").exit_code == 0
    assert Path("every.mp4").read_bytes() == Path("out.mp4").read_bytes()
    full = run("a blue square", *own, "every=1", "--seed", "1", "-o", "full.mp4")
    assert "4 passes" in full.stdout and "all 4 steps are full, and nothing is predicted" in full.stderr
    assert Path("full.mp4").read_bytes() != Path("out.mp4").read_bytes()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["full_steps=[0,2]"], "without a predictor"),
        (["every=2"], "without a predictor"),
        (["predictor=reuse", "every=2", "budget=2"], "every= came with budget="),
        (["predictor=reuse"], "nothing says which steps are full"),
        (["predictor=reuse", "full_steps=[1,2]"], "does not start at 0"),
        (["predictor=reuse", "full_steps=[0,4]"], "there are 4 steps"),
        (["predictor=nowhere", "full_steps=[0]"], "there is no folder nowhere"),
        (["predictor="], "there is no folder"),
        (["predictor=multistep", "every=2"], "train-predictor forecaster=multistep makes one"),
    ],
)
def test_predicted_steps_that_cannot_be_meant(students, words, message):
    result = run("a red circle", f"model={students['student']}", *words)
    assert result.exit_code == 2
    assert message in result.stderr
    assert not Path("out.mp4").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["every=2"], "every=2 without a predictor"),
        (["predictor=nowhere", "every=2"], "there is no folder nowhere"),
        (["predictor=reuse", "schedule=nowhere.json"], "nowhere.json cannot be read"),
        (["predictor=reuse", "every=0"], "every=0 is not possible"),
        (["guidance=0.5"], "guidance=0.5 is not possible"),
        (["guidance=nan"], "guidance=nan is not possible"),
    ],
)
def test_what_no_model_can_follow_is_said_before_one_is_loaded(students, monkeypatch, words, message):
    monkeypatch.setattr("vidaccel.session.load_pipeline", None)
    result = run("a red circle", f"model={students['student']}", *words)
    assert result.exit_code == 2 and message in result.stderr


def test_r_is_set_to_t_only_of_what_is_told_it(students):
    result = run("a red circle", f"model={students['student'].parent / 'teacher'}", "instantaneous=true")
    assert result.exit_code == 2 and "is told no r" in result.stderr and not Path("out.mp4").exists()


def test_a_shipped_student_takes_one_yaml(students, monkeypatch):
    monkeypatch.setattr("vidaccel.worlds.sprites.SHIPPED", students["student"].parent)
    Path("student.yaml").write_text("model: sprites/student\n")
    Path("cfg.yaml").write_text("model: sprites/student\nsteps: 6\ninstantaneous: true\n")
    assert ": 5 frames 32x32; 4 steps, 4 passes" in run("a red circle", "--conf", "student.yaml", "-o", "a.gif").stdout
    assert ": 5 frames 32x32; 6 steps, 6 passes" in run("a red circle", "--conf", "cfg.yaml", "-o", "b.gif").stdout
    assert run("a red circle", "--conf", "student.yaml", "steps=6", "-o", "c.gif").exit_code == 0
    assert Path("b.gif").read_bytes() != Path("c.gif").read_bytes()  # r = t is another model
    for shift, same in ((2, True), (5, False)):  # of which the student has the first
        assert run("a red circle", "--conf", "cfg.yaml", f"shift={shift}", "-o", f"{shift}.gif").exit_code == 0
        assert (Path(f"{shift}.gif").read_bytes() == Path("b.gif").read_bytes()) == same


def test_the_default_goes_with_its_own_model_only(students):
    """A predictor fits one student, so that a model= of one's own leaves default.yaml out."""
    own = yaml.safe_load(run("--print-conf", f"model={students['student']}").stdout)
    assert own == yaml.safe_load(run("--print-conf", "--conf", "teacher", f"model={students['student']}").stdout)
    assert own == yaml.safe_load(run("--print-conf", f"++model={students['student']}").stdout)
    assert own["predictor"] is None
    shipped = yaml.safe_load(run("--print-conf").stdout)
    assert shipped == yaml.safe_load(run("--print-conf", "--conf", "default").stdout)
    assert shipped["predictor"] == "sprites/predictor"


@pytest.mark.parametrize(
    ("words", "left"),
    [
        ([], {"budget": 4}),
        (["budget=3", "steps=20"], {"budget": 3}),
        (["full_steps=[0,5]"], {"full_steps": [0, 5]}),
        (["every=3"], {"every": 3}),
        (["+every=3"], {"every": 3}),
        (["predictor=null"], {}),
        (["predictor=reuse", "full_steps=[0,5]"], {"full_steps": [0, 5]}),
        (["every=3", "budget=4"], {"every": 3, "budget": 4}),  # which is refused later
        (["schedule=mine.json"], {"schedule": "mine.json", "budget": 4}),
    ],
)
def test_one_way_of_saying_which_steps_are_full_takes_the_place_of_the_configurations(words, left):
    chosen = yaml.safe_load(run("--print-conf", *words).stdout)
    ways = ("full_steps", "every", "budget", "schedule")
    assert {way: chosen[way] for way in ways if chosen[way] is not None} == left


def test_a_scale_that_a_student_was_not_trained_on_is_warned_of(students, tmp_path):
    teacher = load_pipeline(students["student"].parent / "teacher")
    taught = save(tmp_path / "taught", teacher, trained(teacher, guidance_range=(1.0, 4.0)))
    for guidance, warned in ((4, False), (7, True)):
        result = run("a red circle", f"model={taught}", f"guidance={guidance}")
        assert ("guidance=7: the student was trained on scales from 1 to 4" in result.stderr) == warned
        assert result.exit_code == 0


def test_two_passes_of_a_student_are_refused(students):
    result = run("a red circle", f"model={students['student']}", "two_pass=true")
    assert result.exit_code == 2
    assert "two_pass=true has no meaning" in result.stderr and "hint: leave two_pass out" in result.stderr


def test_a_file_of_prompts_makes_a_folder_of_videos(models):
    Path("prompts.txt").write_text("a red circle\n\na green square\n")
    model = f"model={models['hunyuan_video']}"
    assert run("--prompts", "prompts.txt", model, "steps=2", "-o", "videos").exit_code == 0
    assert sorted(p.name for p in Path("videos").iterdir()) == [".made", "0000.mp4", "0001.mp4"]
    assert run("a green square", model, "steps=2", "seed=1", "-o", "alone.mp4").exit_code == 0
    assert Path("alone.mp4").read_bytes() == Path("videos/0001.mp4").read_bytes()


def test_videos_of_prompts_are_made_once(models):
    Path("prompts.txt").write_text("a red circle\na green square\na blue cross\n")
    words = ("--prompts", "prompts.txt", f"model={models['hunyuan_video']}", "steps=1", "-o", "videos")
    first, files = run(*words, "--json"), [Path(f"videos/000{i}.mp4") for i in range(3)]
    straight = [file.read_bytes() for file in files]
    files[0].unlink()
    files[1].write_bytes(b"cut short")
    left = [Path(f"videos/{name}") for name in (".0001.0123abcd.mp4", ".made/.0002.0123abcd.json", ".9.0123abcd.mp4")]
    for file in left:  # two of a run that was killed, and one of somebody else
        file.write_bytes(b"half")
    again = run(*words)
    assert [file.exists() for file in left] == [False, False, True]
    assert "1 of 3 videos are there already" in again.stderr
    assert [line.partition(":")[0] for line in again.stdout.splitlines()] == ["videos/0000.mp4", "videos/0001.mp4"]
    assert [file.read_bytes() for file in files] == straight
    reports = [json.loads(each.stdout) for each in (first, run(*words, "--json"))]
    assert [{**report, "seconds": None} for report in reports] == [{**reports[0], "seconds": None}] * 2
    assert len(run(*words, "seed=1").stdout.splitlines()) == 3
    assert files[0].read_bytes() != straight[0]


def test_what_many_processes_do_not_share_is_refused(models, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    Path("prompts.txt").write_text("a red circle\n")
    for words in (["a red circle"], ["a red circle", "--compare"], ["--prompts", "prompts.txt", "--sheet", "s.png"]):
        refused = run(*words)
        assert refused.exit_code == 2 and "is the work of one process, and torchrun started 2" in refused.stderr
        assert not list(Path().glob("out*"))
    refused = run("a red circle", "parallel.ulysses=3")
    assert refused.exit_code == 2 and "is the work of 3 processes, and torchrun started 2" in refused.stderr
    assert "hint: torchrun --nproc-per-node=3 -m vidaccel generate" in refused.stderr


def test_gif_and_png_folder(models):
    model = f"model={models['hunyuan_video']}"
    assert run("a red circle", model, "steps=2", "-o", "out.gif").exit_code == 0
    assert run("a red circle", model, "steps=2", "-o", "frames").exit_code == 0
    frames = [np.asarray(Image.open(p)) for p in sorted(Path("frames").iterdir())]
    assert len(frames) == 5 and frames[0].shape == (32, 32, 3)
    assert Image.open("out.gif").n_frames >= 1


def test_two_processes_write_the_same_bytes(models):
    words = ["generate", "a red circle", f"model={models['hunyuan_video']}", "steps=2"]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    subprocess.run([sys.executable, "-m", "vidaccel", *words, "-o", "a.mp4"], check=True, env=environment)
    program(*words, "-o", "b.mp4")
    assert Path("a.mp4").read_bytes() == Path("b.mp4").read_bytes()
    assert run(*words[1:], "seed=1", "-o", "c.mp4").exit_code == 0
    assert Path("c.mp4").read_bytes() != Path("a.mp4").read_bytes()


def test_unknown_words_are_named(models):
    result = run("a red zebra", f"model={models['hunyuan_video']}", "steps=2")
    assert result.exit_code == 0
    assert 'warning: the model does not know "zebra"' in result.stderr


def test_print_conf_stops_and_can_be_read_back():
    printed = run("--print-conf", "steps=3", "--seed", "5")
    assert printed.exit_code == 0
    assert "steps: 3\n" in printed.stdout and "seed: 5\n" in printed.stdout
    Path("mine.yaml").write_text(printed.stdout)
    assert run("--conf", "mine.yaml", "--print-conf").stdout == printed.stdout


MISTAKES = {
    "an empty prompt": ([""], "the prompt is empty"),
    "a blank prompt": (["  "], "the prompt is empty"),
    "no prompt": (["steps=2"], "no prompt was given"),
    "two prompts": (["a", "b"], "more than one prompt"),
    "a prompt and a file": (["a", "--prompts", "none.txt"], "more than one prompt"),
    "no such prompt file": (["--prompts", "none.txt"], "none.txt"),
    "an unknown suffix": (["a", "-o", "out.avi"], ".avi"),
    "a sheet that is no PNG": (["a", "--sheet", "sheet.jpg"], "sheet.jpg"),
    "a file where a folder belongs": (["a", "-o", "file/out.mp4"], "cannot write"),
    "an unknown configuration": (["a", "--conf", "techer"], 'did you mean "teacher"?'),
    "an unknown setting": (["a", "stepz=3"], 'did you mean "steps"?'),
    "a setting of the wrong type": (["a", "steps=many"], "steps"),
    "a setting out of range": (["a", "dtype=int4"], "float32"),
    "frames that are not 4k + 1": (["a", "num_frames=16"], "nearest valid: 13 or 17"),
    "a height the model cannot make": (["a", "height=50"], "nearest valid: 48 or 64"),
    "no steps": (["a", "steps=0"], "steps=0"),
    "a grid of no shift": (["a", "shift=0"], "must be above 0"),
    "no such model": (["a", "model=./nowhere"], "nowhere"),
    "no such shipped model": (["a", "model=sprites/techer"], "sprites/"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line_and_a_hint(models, mistake):
    args, said = MISTAKES[mistake]
    Path("file").write_text("")
    if not any(word.startswith("model=") for word in args):
        args = [*args, f"model={models['hunyuan_video']}"]
    before = sorted(Path().rglob("*"))
    result = run(*args)
    assert result.exit_code == 2
    error, hint = result.stderr.strip().split("\n")[-2:]
    assert error.startswith("error: ") and hint.startswith("hint: ")
    assert said in error + hint
    assert not result.stdout
    assert sorted(Path().rglob("*")) == before


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has the device whose absence is tested")
def test_cuda_that_is_not_there(models):
    result = run("a", f"model={models['hunyuan_video']}", "--device", "cuda")
    assert result.exit_code == 2
    assert "CUDA" in result.stderr


def test_an_empty_prompt_file():
    Path("prompts.txt").write_text("\n  \n")
    result = run("--prompts", "prompts.txt")
    assert result.exit_code == 2
    assert "prompts.txt holds no prompt" in result.stderr


def test_ctrl_c_leaves_nothing_and_exits_130(models, monkeypatch):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("vidaccel.data.video._write_mp4", interrupt)
    result = run("a red circle", f"model={models['hunyuan_video']}", "steps=2", "-o", "new/out.mp4")
    assert result.exit_code == 130
    assert list(Path().iterdir()) == []


CASES = Path(__file__).parent / "cases"


def prompts_of(file: str, models) -> list[str]:
    result = run("--prompts", CASES / file, "-o", "videos", f"model={models['hunyuan_video']}", "steps=1", "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)["prompts"]


def test_a_byte_order_mark_is_no_part_of_the_first_prompt(models):
    assert prompts_of("bom.txt", models) == ["a red circle moving right on black", "a blue cross growing on white"]


def test_prompts_end_where_lines_end(models):
    """U+2028 and a form feed stand within prompts, which Python would split there."""
    texts = prompts_of("ls.txt", models)
    assert texts == ["a red circle\u2028moving right on black", "a blue cross growing\x0con white"]
    Path("old.txt").write_bytes(b"one\rtwo\r\n\r\n three \n")
    assert prompts_in(Path("old.txt")) == ["one", "two", "three"]


@pytest.mark.parametrize(
    ("content", "said"),
    [(b"a\nb\xff\n", "line 2 is no UTF-8"), (None, "Is a directory"), (b"\xef\xbb\xbf \n", "holds no prompt")],
)
def test_a_file_that_holds_no_prompts(content, said):
    Path("prompts.txt").mkdir() if content is None else Path("prompts.txt").write_bytes(content)
    result = run("--prompts", "prompts.txt")
    assert result.exit_code == 2 and said in result.stderr


@pytest.mark.parametrize("text", ["E=mc2", "title=the end", "E = mc2", "a.b=c"])
def test_a_prompt_that_looks_like_a_setting_is_a_prompt(models, text):
    result = run(text, f"model={models['hunyuan_video']}", "steps=1", "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["prompts"] == [text]


def test_a_prompt_that_begins_with_a_settings_name_can_be_forced(models):
    own = (f"model={models['hunyuan_video']}", "steps=1", "--json")
    result = run("--prompt", "steps=4 of a dance", *own)
    assert json.loads(result.stdout)["prompts"] == ["steps=4 of a dance"]
    assert "more than one prompt" in run("a dance", "--prompt", "steps=4 of a dance", *own).stderr
    assert 'there is no setting "stepz"' in run("--prompt", "a dance", "stepz=4", *own).stderr


def test_half_a_character_in_a_prompt_is_refused():
    result = run("half \ud83d")
    assert result.exit_code == 2
    assert r'the prompt "half \ud83d" has half of a character' in result.stderr


@pytest.mark.parametrize("family", ["hunyuan_video", "hunyuan_video_15", "wan"])
def test_what_is_dropped_of_a_long_prompt_is_named(models, family, monkeypatch):
    """Each pipeline cuts at a length of its own, the template and two special tokens counted."""
    tokens, repeats = {"hunyuan_video": (16, 5), "wan": (512, 170), "hunyuan_video_15": (1108, 333)}[family]
    monkeypatch.setattr(tiny, "PADDED_15", {})
    prompt = " ".join(["a red circle"] * repeats + ["moving right on black"])
    result = run(prompt, f"model={models[family]}", *QUICK)
    assert result.exit_code == 0, result.output
    (line,) = [line for line in result.stderr.splitlines() if "it drops" in line]
    assert line.startswith(f"warning: a prompt is longer than the {tokens} tokens that tokenizer takes: after ")
    assert "circle a red" in line.partition(" it drops ")[0] and line.endswith('right on black"')
    assert "it drops" not in run("a red circle moving right on black", f"model={models[family]}", *QUICK).stderr
