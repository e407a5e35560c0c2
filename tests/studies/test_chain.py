import json
import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from studies.chain import pieces, scoring, stages
from studies.chain.pieces import INDEX, join, pack
from studies.chain.settings import CONF, STAGES, ChainConfig
from studies.late import Late
from vidaccel.artefacts import write_json
from vidaccel.config import loader as configuration
from vidaccel.errors import UserError
from vidaccel.worlds.sprites.settings import SpritesConfig

# Pieces


@pytest.fixture
def made(tmp_path) -> dict:
    """A teacher, two folders that were made of it, and their pieces."""
    teacher = tmp_path / "teacher"
    (teacher / "vae").mkdir(parents=True)
    (teacher / "vae" / "weights").write_bytes(b"v" * 50)
    (teacher / "card.md").write_text("the teacher's")
    student = tmp_path / "work" / "student"
    for name in ("vae", "transformer", "checkpoints/step-1"):
        (student / name).mkdir(parents=True)
    (student / "vae" / "weights").write_bytes(b"v" * 50)
    (student / "card.md").write_text("the student's")
    (student / "transformer" / "weights").write_bytes(bytes(range(256)) * 40)
    (student / "checkpoints" / "step-1" / "weights").write_bytes(b"c" * 10)
    scores = tmp_path / "work" / "scores"
    scores.mkdir()
    (scores / "scores.json").write_text("{}")
    files = pack({"student": student, "scores": scores}, teacher, tmp_path / "out", 4096)
    return {"teacher": teacher, "student": student, "files": files, "new": tmp_path / "new"}


def test_pieces_come_together_again(made):
    assert all(file.stat().st_size <= 4096 for file in made["files"][1:]) and len(made["files"]) > 3
    assert join(made["files"], made["teacher"], made["new"]) == ["scores", "student"]
    for name in ("vae/weights", "card.md", "transformer/weights"):
        assert (made["new"] / "student" / name).read_bytes() == (made["student"] / name).read_bytes()
    assert not (made["new"] / "student" / "checkpoints").exists()


def test_what_the_teacher_has_does_not_travel(made):
    index = json.loads(made["files"][0].read_text())
    assert index["of_teacher"] == {"student/vae/weights": "vae/weights"}
    assert sum(file.stat().st_size for file in made["files"][1:]) < 40 * 1024


def test_a_later_pack_leaves_no_piece_of_an_earlier_one(made, tmp_path):
    out = made["files"][0].parent
    pack({"scores": tmp_path / "work" / "scores"}, made["teacher"], out, 10**6)
    assert sorted(path.name for path in out.iterdir()) == ["part-00", INDEX]


def test_missing_and_damaged_pieces_are_named(made):
    with pytest.raises(UserError, match="part-01 is missing"):
        join([file for file in made["files"] if file.name != "part-01"], made["teacher"], made["new"])
    with pytest.raises(UserError, match=f"{INDEX} is not among"):
        join(made["files"][1:], made["teacher"], made["new"])
    part = made["files"][2]
    part.write_bytes(b"x" + part.read_bytes()[1:])
    with pytest.raises(UserError, match=f"{part} is damaged"):
        join(made["files"], made["teacher"], made["new"])
    assert not made["new"].exists()


def test_a_teacher_that_lacks_a_file_is_refused(made):
    (made["teacher"] / "vae" / "weights").unlink()
    with pytest.raises(UserError, match="has no vae/weights"):
        join(made["files"], made["teacher"], made["new"])
    assert not made["new"].exists()


def test_what_was_made_takes_the_place_of_what_ships(tmp_path, monkeypatch):
    from vidaccel.worlds.sprites import ship as sprites

    made, weights, asked = tmp_path / "made", tmp_path / "weights", []
    for name in ("student", "scalars", "cfg"):
        (made / name).mkdir(parents=True)
    for name in ("student", "predictor", "scalars"):
        (weights / name).mkdir(parents=True)
        (weights / name / "of").write_text("before")

    def shipping(name):
        def ship(*given):
            to = given[4] if name == "student" else given[2] if name == "predictor" else given[1]
            asked.append((name, given))
            to.mkdir(parents=True)
            (to / "of").write_text("now")

        return ship

    for name in ("student", "predictor", "scalars"):
        monkeypatch.setattr(sprites, f"ship_{name}", shipping(name))
    assert pieces.ship(made, weights, "a card") == ["student", "scalars"]
    assert {name: (weights / name / "of").read_text() for name in ("student", "predictor", "scalars")} == {
        "student": "now",
        "predictor": "before",
        "scalars": "now",
    }
    (student,) = (given for name, given in asked if name == "student")
    assert student[:2] == (made / "student", made / "cfg") and student[5] == "a card"


# Settings and time


def test_shares_are_of_the_stages_that_run():
    config = ChainConfig(minutes=2, stages=["score", "cfg"], shares={"cfg": 0.3, "score": 0.1, "few_steps": 5.0})
    assert config.ends() == {"cfg": pytest.approx(90.0), "score": pytest.approx(120.0)}


@pytest.mark.parametrize("name", ["sprites", "toy", "lamps", "toy-lamps"])
def test_the_configurations_are_whole(name):
    config = configuration.load(CONF, ChainConfig, name)
    assert config.stages == list(STAGES)
    for conf, overrides in (("sprites/cfg", config.cfg), ("sprites/restricted_meanflow", config.few_steps)):
        words = ["train.steps=null", *overrides, "train.minutes=1"]
        loaded = configuration.load("distill", configuration.SCHEMAS["distill"], conf, words)
        assert loaded.train.minutes == 1 and loaded.train.steps is None


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"minutes": 0}, "minutes"),
        ({"minutes": -1}, "minutes"),
        ({"minutes": math.nan}, "minutes"),
        ({"minutes": math.inf}, "minutes"),
        ({"stages": ["cgf"]}, "stages"),
        ({"stages": []}, "stages"),
        ({"shares": {"cfg": 1.0}}, "shares"),
        ({"world": "pong"}, "world"),
        ({"scenes": 0}, "scenes"),
        ({"scorer": "pong/lamps"}, "scorer"),
    ],
)
def test_bad_settings(given, message):
    with pytest.raises(UserError, match=message):
        ChainConfig(**given)


class Clock:
    def __init__(self, monkeypatch):
        self.now = 0.0
        monkeypatch.setattr(stages.time, "monotonic", lambda: self.now)


@pytest.fixture
def chain(tmp_path, monkeypatch):
    """A chain whose stages take no time and leave a finished folder."""
    clock = Clock(monkeypatch)
    done: list[tuple[str, str]] = []

    def begun(**changes) -> stages.Chain:
        given = {"minutes": 1.0, "work": str(tmp_path / "work"), "output": str(tmp_path / "out"), "device": "cpu"}
        return stages.Chain(ChainConfig(**given | changes), started=clock.now)

    def stage(name: str):
        def run(self):
            done.append((self.round.name, name))
            for folder in stages.MADE_BY[name]:
                end = "scores.json" if folder == "scores" else "run.json"
                write_json(self.round / folder / end, {"by": self.round.name})
            return name

        return run

    for name in STAGES:
        monkeypatch.setattr(stages.Chain, f"_{name}", stage(name))
    return begun, clock, done


def test_a_teacher_is_made_in_calls_of_its_own(tmp_path, monkeypatch):
    Clock(monkeypatch)
    asked: list[SpritesConfig] = []

    def make_model(config, output):
        asked.append(config)
        for name in ("run.json", "score.json", "score-lamps.json"):
            write_json(output / "model" / name, {"lamps": {"mean": 90.0}})

    monkeypatch.setattr(stages, "make_model", make_model)
    opened = []
    monkeypatch.setattr(stages, "open_autoencoder", lambda name: opened.append(name) or torch.nn.Linear(1, 1))
    monkeypatch.setattr(stages, "measured", lambda *given: {"a lamp": Late(2.5, (2.0, 3.0), 0.49)})

    def begun(*names: str) -> stages.Chain:
        words = [f"work={tmp_path / 'work'}", f"output={tmp_path / 'out'}", "device=cpu", f"stages=[{','.join(names)}]"]
        return stages.Chain(configuration.load(CONF, ChainConfig, "lamps", words), started=0.0)

    with pytest.raises(UserError, match="there is no autoencoder yet"):
        begun("teacher").run()
    report = begun("autoencoder").run()["stages"]
    assert report["autoencoder"]["outcome"] == "a lamp: d 2.5, settled at 0.49"
    assert opened == [str(tmp_path / "work" / "round-1" / "autoencoder")]
    first = asked[0]
    assert (first.lamps, first.start, first.teacher.train.steps) == (0.5, "sprites/teacher", 0)
    assert first.text.train.is_on and first.autoencoder.clips.minutes > first.autoencoder.decoder.minutes > 2
    assert begun("teacher").run()["stages"]["teacher"]["outcome"] == "lamps 90.0\nlamps 90.0"
    second, made = asked[1], tmp_path / "work"
    assert second.start == str(made / "round-1" / "autoencoder") and second.teacher.train.minutes > 6
    assert not (second.text.train.is_on or second.autoencoder.clips.is_on or second.autoencoder.decoder.is_on)
    last = begun("few_steps")
    assert last._teacher_name() == str(made / "round-2" / "teacher") and last._start("cfg") is None
    with pytest.raises(UserError, match="no CFG-distilled model yet"):
        last.run()
    with pytest.raises(UserError, match="no student of the new teacher"):
        last._student()
    write_json(last.round / "cfg" / "run.json", {})
    assert last._start("cfg") == str(last.round / "cfg")


def test_stages_run_in_order_and_rounds_follow(chain):
    begun, _, done = chain
    report = begun(stages=["few_steps", "cfg"]).run()
    assert done == [("round-1", "cfg"), ("round-1", "few_steps")]
    assert list(report["stages"]) == ["cfg", "few_steps"]
    begun(stages=["score"]).run()
    assert done[-1] == ("round-2", "score")
    last = begun()
    assert last.round.name == "round-3" and last.newest("student").parent.name == "round-1"


def test_a_stopped_round_is_gone_on_with(chain, monkeypatch):
    begun, _, done = chain
    whole = stages.Chain._few_steps

    def stopped(self):
        raise KeyboardInterrupt

    monkeypatch.setattr(stages.Chain, "_few_steps", stopped)
    with pytest.raises(KeyboardInterrupt):
        begun().run()
    monkeypatch.setattr(stages.Chain, "_few_steps", whole)
    begun().run()
    assert {name for name, _ in done} == {"round-1"}


def test_a_stage_without_time_is_named_before_it_starts(chain):
    begun, clock, done = chain
    one = begun(stages=["cfg", "few_steps"], reserve=5.0)
    clock.now = 50.0
    with pytest.raises(UserError, match="seconds are left for cfg"):
        one.run()
    assert not done


def test_what_a_stage_made_is_exported_before_the_next(chain, tmp_path, monkeypatch):
    begun, _, _ = chain

    def looking(self):
        assert "cfg/run.json" in names_of(tmp_path / "out")
        return ""

    monkeypatch.setattr(stages.Chain, "_few_steps", looking)
    begun(stages=["cfg", "few_steps"]).run()


def names_of(pieces_folder: Path) -> list[str]:
    import io
    import tarfile

    content = b"".join(path.read_bytes() for path in sorted(pieces_folder.glob("part-*")))
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        return tar.getnames()


# Scores


class Whole:
    """A world whose total is a score itself."""

    def held_out_prompts(self, count):
        return list("abcd")[:count]

    def score(self, frames, prompt):
        return {"one": float(frames)}

    def meaning(self, prompt):
        return prompt

    def totals(self, means):
        return {"total": means["one"]}


def test_differences_are_paired(monkeypatch):
    monkeypatch.setattr(scoring, "scorer_named", lambda name: Whole())
    first = [{"one": x} for x in (0.10, 0.90, 0.50, 0.30)]
    second = [{"one": s["one"] + 0.02} for s in first]
    report = scoring.summary("any", list("abcd"), {"a": first, "b": second})
    assert "paired" not in report["a"] and report["a"]["total"]["mean"] == pytest.approx(45.0)
    assert report["a"]["total"]["high"] - report["a"]["total"]["low"] > 20
    told = report["b"]["paired"]["total"]
    assert [told[name] for name in ("mean", "low", "high")] == pytest.approx([2.0] * 3)  # however prompts differ


def test_scores_of_another_number_of_prompts_are_made_anew(tmp_path, monkeypatch):
    asked = []

    def generate(loaded, prompts, config, seeds):
        asked.append(len(prompts))
        return SimpleNamespace(frames=[0.5] * len(prompts))

    monkeypatch.setattr(scoring, "scorer_named", lambda name: Whole())
    monkeypatch.setattr(scoring, "generate", generate)
    with ThreadPoolExecutor(1) as pool:
        for prompts in (2, 4, 4):
            scores = scoring.score_row(None, None, "any", prompts, 4, tmp_path / "row.jsonl", pool)
            assert scores == [{"one": 0.5}] * prompts
    assert asked == [2, 4]  # those of as many are read


def test_a_config_with_a_share_of_nothing_for_a_stage_that_does_not_run_is_fine():
    config = ChainConfig(stages=["cfg"], shares={"cfg": 1.0})
    assert replace(config, minutes=3.0).ends() == {"cfg": 180.0}
