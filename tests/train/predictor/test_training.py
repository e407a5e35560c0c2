"""A predictor's training from a student's folder to a predictor's, on tiny students."""

import json
from dataclasses import replace
from pathlib import Path
from shutil import rmtree

import pytest
import torch

from tests.students import contents
from tests.students import student as save_tiny_student
from tests.train.test_distill import write_features
from tests.train.test_trainer import outcome
from tests.train.torchrun import program
from vidaccel.artefacts import read_run, sha256_file, verify_files
from vidaccel.cache.schedule import read_schedules
from vidaccel.collect.job import collect
from vidaccel.collect.kinds import job_of
from vidaccel.collect.trajectories import trajectory_job
from vidaccel.config.collect import CollectConfig
from vidaccel.config.loader import to_yaml
from vidaccel.config.predictor import DiscriminatorConfig, PredictorConfig
from vidaccel.config.training import TrainConfig
from vidaccel.data.shards import ShardFolder
from vidaccel.errors import TrainingFailed, UserError
from vidaccel.families.wan import WAN
from vidaccel.forecasters.learned import Predictor
from vidaccel.models.grid import Grid
from vidaccel.models.loading import load_pipeline
from vidaccel.models.weight_hashes import student_hash
from vidaccel.train.objective import generator_for
from vidaccel.train.predictor import training as module
from vidaccel.train.predictor import trajectories as runs_module
from vidaccel.train.predictor.task import _sampling, refuse_several, task_of
from vidaccel.train.predictor.training import train_predictor

FAMILIES = ("hunyuan_video", "wan")
STAGE = TrainConfig(steps=3, batch_size=2, learning_rate=1e-3, warmup=0, ema_decay=0.5, log_every=1, save_every=1)
SMALL = DiscriminatorConfig(depths=[0.5, 1.0], scales=[1, 2], width=8)


class Captions:
    """A source of which only the captions are asked for."""

    fingerprint = {"data": "captions"}

    def __len__(self):
        return 3

    def record(self, index):
        return {"caption": ["a red circle", "a blue square", "a green circle on white"][index]}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """`world(family)`: a folder with a student, its teacher, and features made with them."""
    made: dict[str, Path] = {}

    def of(family: str) -> Path:
        if family not in made:
            folder = tmp_path_factory.mktemp(family)
            student = load_pipeline(save_tiny_student(folder, family))
            write_features(folder / "features", student)
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr("vidaccel.collect.kinds.open_source", lambda loaded, config: Captions())
                for name, cache in (("runs", False), ("cached", True)):
                    chosen = CollectConfig(kind="trajectory", store="float32", cache=cache)
                    collect(job_of(student, chosen), folder / name)
            made[family] = folder
        return made[family]

    return of


def settings(world, family: str = "wan", **changes) -> PredictorConfig:
    stages = {"mse": STAGE, "adversarial": replace(STAGE, steps=2), "discriminator": SMALL}
    places = {"student": str(world(family) / "student"), "features": str(world(family) / "features")}
    return PredictorConfig(**places | stages | {"blocks": 1, "search_prompts": 3} | changes)


def logged(folder: Path, stage: str) -> list[dict]:
    return [json.loads(line) for line in (folder / "checkpoints" / stage / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def trained(world, tmp_path_factory):
    """`trained(family)`: a finished predictor's folder, not to be changed."""
    made: dict[str, Path] = {}

    def of(family: str) -> Path:
        if family not in made:
            made[family] = tmp_path_factory.mktemp(family) / "predictor"
            train_predictor(settings(world, family), made[family])
        return made[family]

    return of


# what a training leaves


@pytest.mark.parametrize("family", FAMILIES)
def test_the_folder_is_a_predictor_for_its_student_with_schedules_for_every_budget(world, trained, family):
    folder, student = trained(family), load_pipeline(world(family) / "student")
    run = read_run(folder, "predictor/1")
    verify_files(folder, run)
    assert set(run["files"]) == {"README.md", "config.json", "model.safetensors", "schedule.json"}
    parents = {role: sha256_file(world(family) / role / "run.json") for role in ("student", "features")}
    assert run["parents"] == parents
    assert run["searched_on"] == [{"steps": 4, "shift": 2.0, "guidance": 4.0, "prompts": 3}]
    predictor = Predictor.from_pretrained(folder)
    assert (predictor.config.steps, predictor.config.shift) == (4, 2.0)
    predictor.check_fits(student.pipe.transformer, student.family, student_hash(student))
    schedules = read_schedules(folder / "schedule.json")
    assert [schedule.budget for schedule in schedules] == [1, 2, 3, 4]
    assert schedules[-1].expected_error == 0
    errors = [schedule.expected_error for schedule in schedules]
    assert errors == sorted(errors, reverse=True) and errors[2] > 0


@pytest.mark.parametrize("family", FAMILIES)
def test_the_second_stage_goes_on_from_the_first(trained, family):
    first, second = (logged(trained(family), stage) for stage in ("mse", "adversarial"))
    assert [line["step"] for line in first] == [1, 2, 3] and [line["step"] for line in second] == [1, 2]
    assert "discriminator" not in first[-1]
    assert second[0]["loss"] == pytest.approx(
        second[0]["mse"] + second[0]["discriminator"] + SMALL.weight * second[0]["adversarial"], rel=1e-5
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_training_beats_reuse(world, family, tmp_path):
    long = replace(STAGE, steps=45, learning_rate=5e-3, save_every=100)
    config = settings(world, family, intervals="grid", mse=long, adversarial=replace(STAGE, steps=0))
    train_predictor(config, tmp_path)
    late = logged(tmp_path, "mse")[-10:]
    assert sum(line["mse"] for line in late) < 0.9 * sum(line["reuse"] for line in late)
    assert not (tmp_path / "checkpoints" / "adversarial").exists()


@pytest.mark.parametrize("stage", module.STAGES)
def test_a_killed_training_ends_as_one_that_was_not(world, trained, stage, tmp_path, monkeypatch):
    """Killed in the middle of the second step of a stage."""
    straight = trained("wan")
    plain, calls = module.PredictorLoss.forward, []

    def interrupted(predictor_loss, pair, turn):
        calls.append((stage == "adversarial") == (predictor_loss.discriminator is not None))
        if sum(calls) == 2:
            raise KeyboardInterrupt
        return plain(predictor_loss, pair, turn)

    monkeypatch.setattr(module.PredictorLoss, "forward", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train_predictor(settings(world), tmp_path)
    assert not (tmp_path / "run.json").exists()
    monkeypatch.undo()
    train_predictor(settings(world), tmp_path)
    for name in module.STAGES:
        assert outcome(tmp_path / "checkpoints" / name) == outcome(straight / "checkpoints" / name)
    for name in ("model.safetensors", "config.json", "schedule.json"):
        assert (tmp_path / name).read_bytes() == (straight / name).read_bytes()


def test_bfloat16_with_activations_computed_again(world, tmp_path):
    stage = replace(STAGE, steps=2, precision="bfloat16", checkpointing=True)
    config = settings(world, "hunyuan_video", mse=stage, adversarial=stage)
    assert [schedule.budget for schedule in train_predictor(config, tmp_path)] == [1, 2, 3, 4]
    assert logged(tmp_path, "adversarial")[-1]["skipped"] == 0
    assert all(p.dtype == torch.float32 for p in Predictor.from_pretrained(tmp_path).parameters())


@pytest.mark.parametrize("in_turn", [False, True])
def test_two_processes_train_what_one_does(world, tmp_path, in_turn):
    """Student, predictor and discriminator sharded, half of each batch in each process: the same to rounding."""
    judge = replace(SMALL, in_turn=in_turn)
    own = replace(STAGE, steps=2, learning_rate=1e-5)
    split = replace(own, accumulate=2)
    train_predictor(settings(world, mse=split, adversarial=split, discriminator=judge), tmp_path / "one")
    (tmp_path / "two.yaml").write_text(to_yaml(settings(world, mse=own, adversarial=own, discriminator=judge)))
    own = str(tmp_path / "two.yaml")
    printed = program("train-predictor", "--conf", own, "-o", str(tmp_path / "two"), count=2)
    assert printed.count("the predictor and these schedules") == 1
    for stage in module.STAGES:
        for one, two in zip(*(logged(tmp_path / name, stage) for name in ("one", "two")), strict=True):
            for key in one.keys() - {"seconds"}:
                assert two[key] == pytest.approx(one[key], rel=1e-4), key
    one, two = (Predictor.from_pretrained(tmp_path / name).state_dict() for name in ("one", "two"))
    for name, weight in one.items():
        torch.testing.assert_close(two[name], weight, rtol=1e-4, atol=1e-5)
    one, two = (read_schedules(tmp_path / name / "schedule.json") for name in ("one", "two"))
    for a, b in zip(one, two, strict=True):
        assert b.expected_error == pytest.approx(a.expected_error, rel=1e-3)


# what it learns from


@pytest.mark.parametrize("family", FAMILIES)
def test_trajectories_are_learnt_from_alike_with_and_without_stored_caches(world, family):
    student = load_pipeline(world(family) / "student", dtype="float32")
    drawn = []
    for features in ("runs", "cached"):
        config = settings(
            world, family, pairs="trajectory", features=str(world(family) / features), max_skipped=2, history=2
        )
        task = task_of(student, config, None)
        with task.trunks:
            _, pairs = module._start(task)
            drawn.append(pairs.draw(3, 2, 3, generator_for(0, 3)))
            assert len(drawn[-1].memory) == 2
    for one, other in zip(*drawn, strict=True):
        if isinstance(one, torch.Tensor):
            torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)
    assert drawn[0].g.tolist() == [4.0, 4.0]
    for one, other in zip(*(pair.memory for pair in drawn), strict=True):
        torch.testing.assert_close(one.tokens, other.tokens, atol=1e-5, rtol=1e-4)
        assert torch.equal(one.t, other.t)


@pytest.mark.parametrize("history", [1, 2])
def test_a_predictor_is_trained_on_trajectories(world, tmp_path, history):
    learnt = {"pairs": "trajectory", "features": str(world("wan") / "runs"), "history": history}
    config = settings(world, **learnt, relative=True)
    assert [schedule.budget for schedule in train_predictor(config, tmp_path)] == [1, 2, 3, 4]
    assert read_run(tmp_path, "predictor/1")["searched_on"][0]["guidance"] == 4.0
    assert Predictor.from_pretrained(tmp_path).history == history
    again = settings(world, **learnt | {"history": 1}, stage="search", steps=6)  # the predictor knows its own
    assert {schedule.steps for schedule in train_predictor(again, tmp_path)} == {6}


def test_runs_are_collected_first_where_none_are_given(world, tmp_path):
    """On the captions of the encoded clips, as many as asked for; what was collected is not collected again."""
    config = settings(world, pairs="trajectory", clips=2, history=2)
    train_predictor(config, tmp_path / "one")
    encoded, runs = ShardFolder(config.features), ShardFolder(tmp_path / "one" / "trajectories", "trajectory")
    assert [runs[i][1]["caption"] for i in range(2)] == [encoded[i][1]["caption"] for i in range(2)] and len(runs) == 2
    assert read_run(tmp_path / "one", "predictor/1")["parents"]["features"] == sha256_file(runs.folder / "run.json")
    train_predictor(replace(config, features=str(runs.folder)), tmp_path / "two")
    weights = [sha256_file(tmp_path / name / "model.safetensors") for name in ("one", "two")]
    assert weights[0] == weights[1]
    before = contents(tmp_path / "one")
    train_predictor(config, tmp_path / "one")
    after = contents(tmp_path / "one")
    assert {name for name in before if before[name] != after[name]} <= {"run.json"}
    searched = train_predictor(replace(config, stage="search", steps=6), tmp_path / "one")
    assert {schedule.steps for schedule in searched} == {6}


def test_runs_have_the_size_of_the_clips_they_are_of(world, tmp_path):
    """And the predictor's folder does not vouch for them: a copy without them is whole, and so it was before."""
    student = load_pipeline(world("wan") / "student")
    features = write_features(tmp_path / "features", student, size=(1, 4, 2))
    folder = tmp_path / "predictor"
    train_predictor(settings(world, features=str(features), pairs="trajectory", clips=2), folder)
    assert ShardFolder(folder / "trajectories")[0][0]["x"].shape[-3:] == (1, 4, 2)
    run = read_run(folder, "predictor/1")
    assert set(run["files"]) == {"README.md", "config.json", "model.safetensors", "schedule.json"}
    listed = {f"trajectories/{name}": digest for name, digest in contents(folder / "trajectories").items()}
    (folder / "run.json").write_text(json.dumps(run | {"files": run["files"] | listed}))
    rmtree(folder / "trajectories")
    Predictor.from_pretrained(folder)


@pytest.mark.parametrize("kind", ["encoded", "trajectory"])
def test_damaged_features_are_left_out_where_that_is_asked_for(world, tmp_path, kind, caplog):
    """Of both kinds, and never where it is not."""
    student = load_pipeline(world("wan") / "student")
    whole = write_features(tmp_path / "whole", student, per_shard=2)
    if kind == "trajectory":
        whole = collected_runs(world, tmp_path / "first", whole)
    shard = sorted(whole.glob("*.tar"))[-1]
    shard.write_bytes(shard.read_bytes()[:-1])
    own = {"pairs": "trajectory", "features": str(whole)}
    assert shard.name in refused(world, tmp_path / "stopped", **own)
    train_predictor(settings(world, **own, on_damage="skip"), tmp_path / "skipped")
    assert f"{shard.name}, damaged or missing, with its 1 samples" in caplog.text
    if kind == "encoded":
        assert len(ShardFolder(tmp_path / "skipped" / "trajectories")) == 2


def collected_runs(world, folder: Path, features: Path) -> Path:
    """Runs of the student on these captions, two in a shard."""
    student, asked = load_pipeline(world("wan") / "student"), CollectConfig(kind="trajectory", per_shard=2)
    collect(trajectory_job(student, runs_module.Captions(ShardFolder(features), 3), asked), folder)
    return folder


def test_scales_are_drawn_from_a_range_only_when_asked(world):
    student = load_pipeline(world("wan") / "student", dtype="float32")
    for changes, low, high in (
        ({}, 4.0, 4.0),
        ({"guidance": 2.0}, 2.0, 2.0),
        ({"guidance_range": [1.0, 3.0]}, 1.0, 3.0),
    ):
        task = task_of(student, settings(world, **changes), None)
        with task.trunks:
            _, pairs = module._start(task)
            g = pairs.draw(0, 2, 0, generator_for(0, 0)).g
        assert ((low <= g) & (g <= high)).all()
        assert bool(g[0] == g[1]) == (low == high)


def test_the_widest_interval_is_the_students_own_or_its_grids(world, tmp_path):
    config = settings(world)
    for restrict, expected in ((None, 0.4), (0.1, 0.1)):  # 4 steps of shift 2: 1, 6/7, 2/3, 2/5, 0
        task = task_of(load_pipeline(config.student, dtype="float32"), replace(config, restrict=restrict), None)
        with task.trunks:
            assert module._start(task)[1].restrict == pytest.approx(expected, abs=1e-6)


# search


def test_search_again_changes_the_schedules_and_what_vouches_for_them_only(world, trained, tmp_path, caplog):
    before = contents(trained("wan"))
    config = settings(world, stage="search", search_prompts=1)
    copy = tmp_path / "copy"
    train_predictor(settings(world), copy)
    schedules = train_predictor(config, copy)
    after = contents(copy)
    changed = {name for name in before if name.split("/")[0] != "checkpoints" and before[name] != after[name]}
    assert changed == {"schedule.json", "run.json"}
    run = read_run(copy, "predictor/1")
    verify_files(copy, run)
    assert [on["prompts"] for on in run["searched_on"]] == [1] and run["config"]["search_prompts"] == 3
    assert read_schedules(copy / "schedule.json") == schedules
    caplog.set_level("INFO", logger="vidaccel")
    assert train_predictor(config, copy) == schedules and contents(copy) == after
    assert "already finished" in caplog.text
    assert train_predictor(replace(config, search_prompts=3), copy) == read_schedules(trained("wan") / "schedule.json")


def test_other_grids_can_be_searched_and_stand_beside(world, tmp_path):
    own = train_predictor(settings(world), tmp_path)
    found = train_predictor(settings(world, stage="search", steps=6, shift=1.0), tmp_path)
    assert {(schedule.steps, schedule.shift) for schedule in found} == {(6, 1.0)}
    assert read_schedules(tmp_path / "schedule.json") == own + found
    again = train_predictor(settings(world, stage="search", steps=6, shift=2.0), tmp_path)
    assert read_schedules(tmp_path / "schedule.json") == own + again
    assert [(on["steps"], on["shift"]) for on in read_run(tmp_path, "predictor/1")["searched_on"]] == [(4, 2), (6, 2)]


def test_the_same_training_again_says_so_and_keeps_other_grids(world, tmp_path, caplog, monkeypatch):
    caplog.set_level("INFO", logger="vidaccel")
    own = train_predictor(settings(world), tmp_path)
    found = train_predictor(settings(world, stage="search", steps=6), tmp_path)
    run = (tmp_path / "run.json").read_bytes()
    assert "already finished" not in caplog.text
    with monkeypatch.context() as patched:
        patched.setattr(module, "search_schedules", None)
        assert train_predictor(settings(world), tmp_path) == own
    assert f"{tmp_path} stays as it is" in caplog.text and (tmp_path / "run.json").read_bytes() == run
    (tmp_path / "README.md").write_text("mine")
    assert train_predictor(settings(world), tmp_path) == own and (tmp_path / "README.md").read_text() != "mine"
    assert read_schedules(tmp_path / "schedule.json") == own + found
    verify_files(tmp_path, read_run(tmp_path, "predictor/1"))


def test_a_new_training_drops_the_schedules_of_the_one_before(world, tmp_path):
    train_predictor(settings(world), tmp_path)
    train_predictor(settings(world, stage="search", steps=6), tmp_path)
    rmtree(tmp_path / "checkpoints")
    changed = replace(STAGE, learning_rate=2 * STAGE.learning_rate)
    assert train_predictor(settings(world, mse=changed), tmp_path) == read_schedules(tmp_path / "schedule.json")


# faults


def refused(world, folder: Path, family: str = "wan", **changes) -> str:
    with pytest.raises(UserError) as caught:
        train_predictor(settings(world, family, **changes), folder)
    assert not (folder / "run.json").exists() and caught.value.hint
    return str(caught.value)


def test_what_cannot_be_trained_is_refused(world, tmp_path):
    teacher, runs = str(world("wan") / "teacher"), str(world("wan") / "runs")
    told = {
        "makes two passes a step": {"student": teacher},
        "samples of kind trajectory": {"features": runs},
        "steps=4, not 8": {"pairs": "trajectory", "features": runs, "steps": 8},
        "guidance=4, not 2": {"pairs": "trajectory", "features": runs, "guidance": 2.0},
        "guidance_range": {"student": teacher, "guidance": 1.0, "guidance_range": [1.0, 2.0]},
        "a predictor of 3 blocks": {"blocks": 3},
        "there are no clips": {"features": None},
        "there is no folder": {"stage": "search"},
    }
    for number, (message, changes) in enumerate(told.items()):
        assert message in refused(world, tmp_path / str(number), **changes)


def test_nothing_is_made_before_a_refusal(world, tmp_path):
    """Neither trajectories of a model that cannot have a predictor, nor one with budgets that its grid has not."""
    teacher = str(world("wan") / "teacher")
    assert "makes two passes a step" in refused(world, tmp_path, student=teacher, pairs="trajectory", clips=1)
    assert "budgets=[9], and there are 4 steps" in refused(world, tmp_path, budgets=[9])
    assert not list(tmp_path.iterdir())


def test_features_of_another_student_are_refused(world, tmp_path):
    other = save_tiny_student(tmp_path, "wan", ("r",))
    trajectories = {"pairs": "trajectory", "features": str(world("wan") / "runs")}
    assert "was made with another model" in refused(world, tmp_path / "a", student=str(other), **trajectories)
    foreign = str(world("hunyuan_video") / "features")
    assert "was made with another model" in refused(world, tmp_path / "b", features=foreign)


def test_schedules_are_not_searched_for_another_student(world, trained, tmp_path):
    other = save_tiny_student(tmp_path, "wan", ("r",))
    config = settings(world, student=str(other), guidance=1.0, stage="search")
    with pytest.raises(UserError, match="trained for the student .*, and this is") as caught:
        train_predictor(config, trained("wan"))
    own = settings(world).student
    assert f"{own} (" in caught.value.message and str(other) in caught.value.message and own in caught.value.hint


def test_what_is_fitted_to_one_transformer_is_refused_for_two():
    family = replace(WAN, denoisers=WAN.denoisers * 2)
    with pytest.raises(UserError, match="denoises with 2 transformers, and forecaster=linear is fitted to one"):
        refuse_several(family, PredictorConfig(forecaster="linear"))
    refuse_several(family, PredictorConfig())
    refuse_several(WAN, PredictorConfig(forecaster="linear"))


def test_a_model_without_r_and_guidance_can_have_a_predictor(world, tmp_path):
    """Its sampler's steps end somewhere too, or the discriminator would see no difference."""
    stages = {"adversarial": replace(STAGE, steps=1), "mse": replace(STAGE, steps=1)}
    config = settings(world, student=str(world("wan") / "teacher"), guidance=1.0, steps=3, **stages)
    assert len(train_predictor(config, tmp_path)) == 3
    assert Predictor.from_pretrained(tmp_path).config.shift == 3.0


def test_data_that_are_not_finite_stop_after_ten_steps(world, tmp_path):
    student = load_pipeline(world("wan") / "student")
    features = write_features(tmp_path / "features", student, spoil=float("inf"))
    config = settings(world, features=str(features), mse=replace(STAGE, steps=20, batch_size=3))
    with pytest.raises(TrainingFailed, match="10 steps in a row"):
        train_predictor(config, tmp_path / "predictor")
    assert not (tmp_path / "predictor" / "run.json").exists()


def test_other_settings_do_not_go_on_with_a_run(world, trained, tmp_path):
    with pytest.raises(UserError, match="lag was 0.2, now 0.1"):
        train_predictor(settings(world, lag=0.1), trained("wan"))


@pytest.mark.parametrize("times", [[1.0, 0.9, 0.5, 0.2, 0.0], [1.0, 0.9, 0.5, 0.0]])
def test_a_search_is_of_any_grid_whatever_listed_times_were_learnt_from(times):
    """A training is of the times of its trajectories."""
    stored = [({"times": torch.tensor([1.0, 0.8, 0.4, 0.0])}, {"guidance": 4.0, "steps": 3, "shift": None})]
    grid, config = Grid(tuple(times)), PredictorConfig(pairs="trajectory", stage="search")
    assert _sampling(grid, 4.0, config, stored).grid == grid
    trained = _sampling(grid, 4.0, replace(config, stage="all"), stored)
    assert trained.grid.times == pytest.approx((1.0, 0.8, 0.4, 0.0))
