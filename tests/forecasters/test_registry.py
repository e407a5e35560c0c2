"""The table of forecasters: what every entry's class says of itself, and that a new one is a file and a line."""

import json
import subprocess
import sys
import textwrap
from dataclasses import replace

import pytest
import torch
from typer.testing import CliRunner

from tests.tiny import SIZE, tiny_pipeline
from vidaccel.bench.plan import plan
from vidaccel.cache.attach import attach
from vidaccel.cli.main import app
from vidaccel.config.benchmark import BenchmarkConfig, MethodConfig
from vidaccel.errors import UserError
from vidaccel.families.registry import FAMILIES
from vidaccel.forecasters.base import Making, PlannedTrunk
from vidaccel.forecasters.registry import FORECASTERS, Entry, attachable, forecaster_class

TRUNK = PlannedTrunk(width=4, rows=(10, 3), linear=2000, attention=200, parameters=100)

AVERAGE = '''
    """The mean of the last full passes."""

    import torch

    from vidaccel.forecasters.base import ForecasterCosts


    class Average:
        history = 2

        @classmethod
        def make(cls, making):
            return cls()

        @staticmethod
        def costs(trunk):
            return ForecasterCosts(history=2)

        def __call__(self, arguments, memory, t):
            return {
                name: torch.stack([cached.tokens[name] for cached in memory]).mean(0) for name in memory[0].tokens
            }
'''


@pytest.fixture
def average(tmp_path, monkeypatch):
    """A forecaster as anyone would add one: its file, and its line in the table."""
    (tmp_path / "average_forecaster.py").write_text(textwrap.dedent(AVERAGE))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(FORECASTERS, "average", Entry("average_forecaster:Average"))
    yield "average"
    sys.modules.pop("average_forecaster", None)


def latents(pipe, **predicted):
    with attach(pipe, steps=4, full_steps=[0, 1], **predicted) as attachment:
        made = pipe(
            "a red circle",
            num_inference_steps=4,
            output_type="latent",
            generator=torch.Generator().manual_seed(0),
            **SIZE,
        ).frames
    assert (attachment.full_passes, attachment.predicted_passes) == (4, 4)
    return made


def test_a_new_forecaster_is_attached_by_its_name(average):
    pipe = tiny_pipeline("wan")
    found = latents(pipe, predictor=average)
    assert torch.equal(found, latents(pipe, predictor=forecaster_class(average)()))
    assert not torch.equal(found, latents(pipe, predictor="reuse"))


def test_a_new_forecaster_is_generated_with(average, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ["a red circle on black", "steps=4", "full_steps=[0,1]", "num_frames=5", "--json"]

    def made(name):
        result = CliRunner().invoke(app, ["generate", *words, f"predictor={name}"])
        assert result.exit_code == 0, result.output
        return json.loads(result.stdout), (tmp_path / "out.mp4").read_bytes()

    (report, video), (_, reused) = made(average), made("reuse")
    assert (report["predictor"], report["passes"]) == ("average", {"full": 2, "predicted": 2})
    assert video != reused


def test_a_new_forecaster_is_planned_and_refused_as_any(average):
    methods = {
        "full": MethodConfig(steps=8),
        "reuse": MethodConfig(steps=8, every=2, on_skipped="reuse"),
        "average": MethodConfig(steps=8, every=2, on_skipped=average),
    }
    shallow = {"num_layers": 1, "num_single_layers": 1}
    config = BenchmarkConfig(transformer=shallow, methods=methods, baseline="full", sizes=[[5, 64, 64]])
    _, reuse, mine = plan(config)["runs"]
    assert mine["flops"] == reuse["flops"] and mine["speedup"] == reuse["speedup"]
    tokens = (2 * 8 * 8 // 4 + 256) * 3072 * 2
    assert mine["cache_bytes"] - reuse["cache_bytes"] == tokens
    with pytest.raises(UserError, match="average"):  # it is named among those that there are
        MethodConfig(on_skipped="no such")
    with pytest.raises(UserError, match="no folder") as caught:
        attach(tiny_pipeline("wan"), predictor="no such", steps=2, every=2)
    assert "average" in caught.value.hint


@pytest.mark.parametrize("name", FORECASTERS)
def test_every_entry_says_what_it_costs(name):
    costs = forecaster_class(name).costs(TRUNK)
    assert costs.history >= 1 and min(costs) >= 0


def test_costs_by_hand():
    costs = {name: forecaster_class(name).costs(TRUNK) for name in FORECASTERS}
    assert tuple(costs["reuse"]) == (1, 0, 0, 0, False)
    assert tuple(costs["taylor"]) == (2, 0, 0, 0, False)
    assert tuple(costs["multistep"]) == (3, 0, 0, 0, True)
    assert forecaster_class("taylor").costs(replace(TRUNK, order=2)).history == 3
    assert tuple(costs["linear"]) == (1, 2 * 13 * 9 * 4, 0, 0, False)  # [9 features] -> [4], for 13 tokens
    # two blocks; for each of two fusions [8] -> [4] -> [4] with two biases of 4
    assert tuple(costs["predictor"]) == (1, 2 * 1000 + 2 * 13 * 48, 2 * 100, 2 * 50 + 2 * (48 + 8), False)
    assert forecaster_class("predictor").costs(replace(TRUNK, history=2)).history == 2


@pytest.mark.parametrize("name", attachable())
def test_what_is_made_by_name_looks_back_as_it_is_planned(name):
    making = Making(tiny_pipeline("wan"), FAMILIES["wan"])
    cls = forecaster_class(name)
    assert cls.make(making).history == cls.costs(TRUNK).history


def test_a_linear_map_is_not_made_without_a_generation():
    with pytest.raises(UserError, match="fitted to a generation"):
        forecaster_class("linear").make(Making(tiny_pipeline("wan"), FAMILIES["wan"]))
    assert "linear" not in attachable() and "predictor" not in attachable()


def test_reading_the_table_imports_no_torch():
    code = "import sys, vidaccel.forecasters.registry; sys.exit('torch' in sys.modules or 'diffusers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
