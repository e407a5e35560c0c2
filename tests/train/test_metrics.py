"""metrics.jsonl, and a tracker of accelerate's kind that is told the same."""

from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import pytest
from accelerate import PartialState
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker, on_main_process
from accelerate.utils import LoggerType

from tests.train.test_trainer import CONFIG, interrupting_at, metrics, outcome, run, spoilt
from vidaccel.errors import TrainingFailed, UserError
from vidaccel.train.metrics import check_trackers


class Notebook(GeneralTracker):
    """A tracker that remembers what it is told."""

    name = "notebook"
    requires_logging_directory = True
    pages: ClassVar[list] = []

    def __init__(self, run_name: str, logging_dir: Path):
        super().__init__()
        self.place = (run_name, logging_dir)

    @property
    def tracker(self):
        return self.pages

    @on_main_process
    def start(self):
        self.pages.append(("start", *self.place))

    @on_main_process
    def store_init_configuration(self, values):
        self.pages.append(("settings", values))

    @on_main_process
    def log(self, values, step=None, **kwargs):
        self.pages.append((step, values))

    @on_main_process
    def finish(self):
        self.pages.append("finish")


@pytest.fixture
def notebook(monkeypatch) -> list:
    monkeypatch.setitem(LOGGER_TYPE_TO_CLASS, "notebook", Notebook)
    monkeypatch.setattr(Notebook, "pages", [])
    yield Notebook.pages
    PartialState._reset_state()


def test_a_tracker_is_told_what_the_file_is_told(tmp_path, notebook):
    run(tmp_path, config=replace(CONFIG, trackers=["notebook"]), settings={"loss": {"p": [1, 2], "name": "huber"}})
    assert notebook[0] == ("start", "vidaccel", tmp_path / "notebook")
    assert notebook[1][1] | {"settings.loss.p": "[1, 2]", "settings.loss.name": "huber", "seed": 3} == notebook[1][1]
    assert notebook[-1] == "finish"
    told = [{"step": step, **values} for step, values in notebook[2:-1]]
    assert all(line.pop("seconds") >= 0 for line in told)
    assert len(told) == 10
    assert told == metrics(tmp_path)


def test_trackers_may_change_between_a_run_and_its_continuation(tmp_path, notebook):
    run(tmp_path / "straight")
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "resumed", interrupting_at(25))
    run(tmp_path / "resumed", config=replace(CONFIG, trackers=["notebook"], sample_every=7))
    assert [page[0] for page in notebook[2:-1]] == [12, 14, 16, 18, 20]
    assert outcome(tmp_path / "resumed") == outcome(tmp_path / "straight")


def test_a_tracker_is_finished_when_training_fails(tmp_path, notebook):
    with pytest.raises(TrainingFailed):
        run(tmp_path, spoilt(*range(40)), replace(CONFIG, trackers=["notebook"]))
    assert notebook[-1] == "finish"


def test_a_tracker_that_fails_costs_a_warning(tmp_path, notebook, monkeypatch, caplog):
    def offline(*args, **kwargs):
        raise ConnectionError("no network")

    monkeypatch.setattr(Notebook, "log", offline)
    monkeypatch.setattr(Notebook, "finish", offline)
    run(tmp_path / "told", config=replace(CONFIG, trackers=["notebook"]))
    assert "telling the tracker notebook of step 4 failed (failure 2); training goes on: no network" in caplog.text
    assert "finishing the tracker notebook failed (failure 11)" in caplog.text
    run(tmp_path / "alone")
    assert outcome(tmp_path / "told") == outcome(tmp_path / "alone")


@pytest.mark.parametrize(
    ("name", "message"),
    [("tensorbord", 'there is no tracker "tensorbord"'), ("wandb", "trackers: wandb is not installed")],
)
def test_a_missing_tracker_stops_before_training(tmp_path, monkeypatch, name, message):
    monkeypatch.setattr("accelerate.tracking._available_trackers", [])
    with pytest.raises(UserError, match=message) as error:
        run(tmp_path, config=replace(CONFIG, trackers=[name]))
    assert {"tensorbord": 'did you mean "tensorboard"', "wandb": "pip install wandb"}[name] in error.value.hint
    assert list(tmp_path.iterdir()) == []


def test_an_installed_tracker_is_accepted(monkeypatch):
    monkeypatch.setattr("accelerate.tracking._available_trackers", [LoggerType.WANDB])
    check_trackers(["wandb"])
