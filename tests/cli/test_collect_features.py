"""`vidaccel collect-features` through real files: what it writes, what it says, and how it refuses."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

from tests.collect.conftest import CAPTIONS, clips, model, whole_clips  # noqa: F401
from vidaccel.cli.main import app
from vidaccel.data.shards import ShardFolder
from vidaccel.models.loading import load_pipeline

# ruff: noqa: F811 (fixtures)


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def run(*args):
    return CliRunner().invoke(app, ["collect-features", *map(str, args)])


def test_a_folder_of_videos_becomes_features(model, clips):
    result = run(f"model={model}", f"data={clips}", "-o", "features")
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("features: 5 samples of ")
    assert "features=features -o cfg` learns from them" in result.stdout
    features = ShardFolder("features", kind="encoded")
    assert [features[i][1]["caption"] for i in range(5)] == CAPTIONS
    assert json.loads(Path("features/run.json").read_text())["config"]["data"] == str(clips)
    before = {path: path.stat().st_mtime_ns for path in Path("features").glob("*.tar")}
    again = run(f"model={model}", f"data={clips}", "-o", "features")
    assert again.exit_code == 0 and again.stdout == result.stdout and "info: already finished" in again.stderr
    assert before == {path: path.stat().st_mtime_ns for path in before}


def test_what_learns_from_a_model_with_lora_is_told_of_it(monkeypatch):
    monkeypatch.setattr("vidaccel.api.collect_features", lambda *args, **more: SimpleNamespace(count=3))
    result = run("model=wan", "lora=[a.safetensors:0.5]", "kind=trajectory", "-o", "runs")
    said = """`vidaccel train-predictor student=wan 'lora=["a.safetensors:0.5"]' features=runs` learns from them"""
    assert said in result.stdout, result.output


def test_rendered_scenes_of_the_shipped_model():
    result = run("clips=2", "-o", "features")
    assert result.exit_code == 0, result.output
    tensors, record = ShardFolder("features", kind="encoded")[1]
    loaded = load_pipeline("sprites/teacher")
    channels = loaded.pipe.transformer.config.in_channels
    assert tensors["latent"].shape == (channels, 5, 8, 8) and record["fps"] == 8
    assert tensors.keys() == {"latent", "prompt_embeds", "prompt_mask", "pooled"}


def test_runs_of_the_model_on_the_captions(model, clips):
    result = run(f"model={model}", f"data={clips}", "kind=trajectory", "steps=2", "batch_size=3", "-o", "runs")
    assert result.exit_code == 0, result.output
    runs = ShardFolder("runs", kind="trajectory")
    tensors, record = runs[4]
    assert len(runs) == 5 and record["caption"] == CAPTIONS[4]
    assert (record["seed"], record["steps"], record["guidance"], record["shift"]) == (4, 2, 3.0, 5.0)
    assert tensors["x"].shape == tensors["velocity"].shape == (2, 4, 2, 4, 4) and tensors["times"].shape == (3,)


def test_a_dry_run_says_how_much_and_writes_nothing(model, clips, tmp_path):
    result = run(f"model={model}", f"data={clips}", "--dry-run")
    assert result.exit_code == 0 and result.stdout.startswith("5 samples of "), result.output
    result = run(f"model={model}", f"data={clips}", "--dry-run", "-o", "features")
    assert result.exit_code == 0
    assert not (tmp_path / "features").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "no place was given for the features"),
        (["-o", "file/features"], "cannot write"),
        (["--dry-run", "stray"], '"stray" is neither a flag nor a key=value setting'),
        (["--dry-run", "clip=3"], 'did you mean "clips"?'),
        (["--dry-run", "store=float8"], "store is one of float32, bfloat16, float16"),
        (["--dry-run", "clips=0"], "clips must be at least 1"),
        (["--dry-run", "kind=both"], "kind is encoded or trajectory"),
        (["--dry-run", "cache=true"], "cache goes with kind=trajectory"),
        (["--dry-run", "guidance=0.5"], "guidance is a number from 1 up"),
        (["--dry-run", "model=nowhere/at-all"], "nowhere/at-all"),
        (["--dry-run", "data=missing"], "missing is not a folder of clips: there is none"),
        (["--dry-run", "max_gigabytes=1e-9"], "are more than max_gigabytes"),
    ],
)
def test_mistakes_end_with_a_line_and_a_hint(words, message, tmp_path):
    (tmp_path / "file").write_text("")
    result = run(*words)
    assert result.exit_code == 2
    assert message in result.stderr and "\nhint: " in result.stderr
    assert "Traceback" not in result.output


def test_print_conf_is_a_conf(tmp_path):
    printed = run("--print-conf", "clips=7").stdout
    (tmp_path / "mine.yaml").write_text(printed)
    assert run("--conf", "mine.yaml", "--print-conf").stdout == printed


def test_captions_that_are_cut_are_named_and_counted(model, clips):
    """HunyuanVideo's second tokenizer takes 77 tokens here, its first 16."""
    lines = [json.loads(line) for line in (clips / "captions.jsonl").read_text().splitlines()]
    long = [line | {"caption": "a red circle " * 5 + line["caption"]} for line in lines]
    (clips / "captions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in long))
    result = run(f"model={model}", f"data={clips}", "-o", "features")
    assert result.exit_code == 0, result.output
    cut = [line for line in result.stderr.splitlines() if "it drops" in line]
    assert len(cut) == 3 and cut[0].endswith(f'{CAPTIONS[0]}"')
    assert "5 prompts in all are longer than the 16 tokens that tokenizer takes" in result.stderr
