"""The gates of a student's folder: on the last of a feature folder, and on scenes that nothing was trained on."""

import json
import shutil

import pytest
from typer.testing import CliRunner

from studies import gates
from tests.students import save, student, trained
from tests.train.test_distill import write_features
from vidaccel.models.loading import load_pipeline
from vidaccel.worlds.sprites.world import TRIPLES


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gates")
    student(folder, "hunyuan_video")
    write_features(folder / "features", load_pipeline(folder / "teacher"))
    return folder


def run(*words: object):
    return CliRunner().invoke(gates.app, [str(word) for word in words])


def test_both_gaps_are_computed_printed_and_written(places, tmp_path):
    """Of random embeddings: nothing is closed, and every number is there. 2 % of three clips is one."""
    teacher = save(places / "cfg", loaded := load_pipeline(places / "teacher"), trained(loaded, ("g",)))
    words = [places / "student", "--teacher", places / "teacher", "--distilled", teacher]
    result = run(*words, "--features", places / "features", "-o", tmp_path / "gates.json", "--device", "cpu")
    assert result.exit_code == 0, result.output
    written = json.loads((tmp_path / "gates.json").read_text())
    assert (written["samples"], written["runs"], written["shift"]) == (1, 1, 2.0)
    guidance = written["guidance_gap"]
    assert list(guidance["closed"]) == ["1.5", "2", "3", "4"] and list(guidance["by_time"]) == ["3"]
    assert list(guidance["by_time"]["3"]) == ["1", "0.95", "0.85", "0.7", "0.5", "0.3", "0.1"]
    assert list(written["mean_velocity_gap"]) == ["20", "8", "4", "3"]
    for gate in written["gates"]:
        assert gate["value"] < gate["at_least"]
        assert f"{gate['name']}, below its gate of {gate['at_least']:.2f}" in result.stdout
    assert len(written["gates"]) == 3
    assert "guidance gap closed           g = 1.5: -" in result.stdout


def test_the_teacher_is_guided_away_from_what_the_student_was_distilled_away_from(places, tmp_path, monkeypatch):
    student, told, encode_texts = tmp_path / "student", [], gates.encode_texts
    shutil.copytree(places / "student", student)
    about = json.loads((student / "run.json").read_text())
    about["call"]["negative_prompt"] = "blue"
    (student / "run.json").write_text(json.dumps(about))
    monkeypatch.setattr(gates, "encode_texts", lambda loaded, texts: told.extend(texts) or encode_texts(loaded, texts))
    result = run(student, "--teacher", places / "teacher", "--features", places / "features", "--runs", 0)
    assert result.exit_code == 0 and told == ["blue"], result.output


def test_scenes_are_of_combinations_that_training_never_sees(monkeypatch):
    drawn, render = [], gates.render
    monkeypatch.setattr(gates, "render", lambda scenes: drawn.extend(scenes) or render(scenes))
    loaded = load_pipeline("sprites/teacher")
    rows, again = (gates._scenes(loaded, 6, seed=0) for _ in range(2))
    assert {sprite.triple for scene in drawn for sprite in scene.sprites} <= set(TRIPLES["held_out"])
    assert len(rows) == 6 and [record for _, record in rows] == [record for _, record in again]


def test_the_shipped_students_guidance_gap():
    result = run("sprites/student", "--teacher", "sprites/teacher", "--samples", 2, "--runs", 0, "--device", "cpu")
    assert result.exit_code == 0, result.output
    assert "sprites/student closes 0." in result.stdout and "mean-velocity" not in result.stdout


@pytest.mark.parametrize(
    ("model", "teacher", "said"),
    [
        ("student", "student", "is not guided in two passes"),
        ("teacher", "teacher", "embeds no guidance scale"),
        ("student", "sprites/teacher", "have other text encoders or another autoencoder"),
    ],
)
def test_models_that_do_not_go_together_are_refused(places, model, teacher, said):
    teacher = teacher if "/" in teacher else places / teacher
    result = run(places / model, "--teacher", teacher, "--device", "cpu")
    assert result.exit_code == 2 and said in result.output and "hint:" in result.output


def test_without_scenes_or_features_there_is_nothing_to_take(places):
    result = run(places / "student", "--teacher", places / "teacher", "--device", "cpu")
    assert result.exit_code == 2 and "give encoded clips: --features FOLDER" in result.output
