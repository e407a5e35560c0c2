"""Values of sweeps are chosen on prompts that nothing is reported on, at the speed that a row asks for."""

from dataclasses import replace

import pytest

from vidaccel.bench import choosing, runner
from vidaccel.bench.counterparts import own_run
from vidaccel.config.benchmark import BenchmarkConfig, MethodConfig

TEA = MethodConfig(
    steps=8, cache="teacache", settings={"threshold": 0.1}, sweep={"threshold": [0.2, 0.4, 0.8]}, at_most=4
)
CURVE = replace(TEA, at_most=None)
CONFIG = BenchmarkConfig(
    scorer="sprites",
    scored_seed=7,
    baseline="full",
    methods={"full": MethodConfig(weights="teacher", two_pass=True), "student-8": MethodConfig(steps=8)}
    | {"tea": TEA, "curve": CURVE},
)


def measured(method: str, passes: float, error: float, failed: str | None = None) -> dict:
    return {
        "method": method,
        "error": failed,
        "own_fidelity": {"latent_relative_l2": error},
        "full_pass_equivalents": {"flops": passes},
    }


RESULTS = {
    "runs": [
        measured("student-8", 8, 0),
        measured("tea", 6, 0.1),
        measured("tea threshold=0.2", 4.03, 0.2),
        measured("tea threshold=0.4", 3, 0.3),
        measured("tea threshold=0.8", 2, 0.05, "broke"),
    ]
}


def test_what_chooses_runs_on_other_prompts_and_noise_beside_the_models_own_full_run():
    asked = choosing.to_choose(CONFIG)
    assert (asked.stream, asked.baseline, asked.only) == ("choose", "student-8", ["student-8", "tea"])
    assert (asked.scored_prompts, asked.scored_seed) == (CONFIG.choosing_prompts, 7 + choosing.SEED)
    assert list(asked.wanted(swept=True)) == ["student-8", *(run["method"] for run in RESULTS["runs"][1:])]


def test_a_full_run_that_is_not_among_the_rows_is_added():
    alone = replace(CONFIG, methods={"full": CONFIG.methods["full"], "tea": TEA})
    asked = choosing.to_choose(alone)
    assert asked.methods[asked.baseline] == MethodConfig(steps=8)


@pytest.mark.parametrize("scorer", ["sprites", None])
def test_of_ones_own_prompts_those_choose_that_are_not_scored(scorer):
    own = replace(CONFIG, scorer=scorer, prompts=["a", "b", "c", "d"], scored_prompts=2, choosing_prompts=1)
    asked = choosing.to_choose(own)
    assert (asked.prompts, asked.scored_prompts, asked.scored_seed) == (["c"], 1, 7 + choosing.SEED)
    assert choosing.to_choose(replace(own, choosing_prompts=9)).prompts == ["c", "d"]


def test_a_row_that_cannot_run_is_not_chosen_for(caplog):
    other = replace(TEA, weights="teacher")
    config = replace(CONFIG, methods=CONFIG.methods | {"other": other})
    assert "other" in choosing.to_choose(config).only
    asked = choosing.to_choose(config, {"other": "why"})
    assert (asked.only, asked.baseline) == (["student-8", "tea"], "student-8")
    assert choosing.to_choose(config, {"other", "tea"}) is None
    assert choosing.with_choices(config, RESULTS).methods["other"] == replace(other, sweep={}, at_most=None)
    assert not caplog.text


def test_a_row_chooses_beside_its_own_full_run_with_its_own_decoder():
    """Also one that declines the benchmark's, and does so still when it is reported."""
    declining = replace(TEA, weights="teacher", decoder="own")
    config = replace(CONFIG, decoder="runs/narrow", methods=CONFIG.methods | {"declining": declining})
    rows = choosing.to_choose(config).wanted()
    for name, decoder in (("tea", "runs/narrow"), ("declining", None)):
        assert rows[name].decoder == decoder and own_run(rows[name]) in rows.values()
    reported = choosing.with_choices(config, RESULTS).wanted()
    assert (reported["tea"].decoder, reported["declining"].decoder) == ("runs/narrow", None)


NO_PROMPTS = {"prompts": ["a", "b", "c"], "scored_prompts": 2, "images": "images"}


@pytest.mark.parametrize(
    "changes",
    [
        {"scorer": None},
        {"prompts": ["a cat"]},
        NO_PROMPTS,
        {"stream": "choose"},
        {"sweeps": False},
        {"only": ["curve"]},
    ],
    ids=str,
)
def test_where_nothing_is_chosen_every_value_is_a_row(changes):
    config = replace(CONFIG, **changes)
    assert choosing.to_choose(config) is None
    assert "curve threshold=0.4" in config.wanted(swept=True)


def test_the_nearest_of_those_that_cost_no_more_stands_for_the_sweep():
    chosen = choosing.with_choices(CONFIG, RESULTS)
    assert chosen.methods["tea"] == MethodConfig(steps=8, cache="teacache", settings={"threshold": 0.2})
    assert [name for name in chosen.wanted(swept=True) if name.startswith("tea")] == ["tea"]
    assert chosen.methods["curve"] == CURVE


def test_where_all_cost_more_it_is_the_cheapest(caplog):
    faster = replace(CONFIG, methods=CONFIG.methods | {"tea": replace(TEA, at_most=2)})
    caplog.set_level("INFO")
    assert choosing.with_choices(faster, RESULTS).methods["tea"].settings == {"threshold": 0.4}
    assert "tea: no value of its sweep costs at most 2 full passes" in caplog.text


def test_where_nothing_was_compared_it_is_said_and_the_first_value_stays(caplog):
    blind = {"runs": [run | {"own_fidelity": None} for run in RESULTS["runs"]]}
    assert choosing.with_choices(CONFIG, blind).methods["tea"].settings == TEA.settings
    assert "tea: no value was compared with its model's own full run" in caplog.text


def test_a_benchmark_chooses_before_it_reports(tmp_path, monkeypatch):
    made, with_models = [], []

    class Stub:
        def __init__(self, config, folder, quality, models, command):
            made.append((config, folder))
            with_models.append(models)

        def run(self):
            return RESULTS

    monkeypatch.setattr(runner, "Benchmark", Stub)
    config = replace(CONFIG, model="sprites/teacher", student="sprites/student", dtype="float32")
    runner.run(config, tmp_path, quality=True, device="cpu")
    (asked, aside), (reported, folder) = made
    assert (aside, folder) == (tmp_path / "choosing", tmp_path)
    assert (asked.stream, reported.stream) == ("choose", "report")
    assert reported.methods["tea"].settings == {"threshold": 0.2}
    assert with_models[0] is with_models[1]  # a device may have no room for two of each
    made.clear()
    runner.run(config, tmp_path)
    assert [config for config, _ in made] == [config]  # no quality, nothing to choose by
    made.clear()
    runner.run(replace(config, student=None), tmp_path, quality=True, device="cpu")
    assert [each.stream for each, _ in made] == ["report"]  # nothing that can run is to be chosen for
