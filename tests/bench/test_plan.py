"""Plans of the published models: the numbers that method.md reports, and refusals."""

import json
from inspect import signature

import pytest
from torch.utils._python_dispatch import TorchDispatchMode

from tests import tiny
from tests.tiny import tiny_pipeline
from vidaccel.bench.plan import passes, plan
from vidaccel.bench.sizes import meta_transformer, new_transformer, rows
from vidaccel.config.benchmark import BenchmarkConfig, MethodConfig
from vidaccel.config.loader import conf_root, load
from vidaccel.errors import UserError
from vidaccel.families.registry import FAMILIES
from vidaccel.models.grid import Grid
from vidaccel.worlds.sprites import SHIPPED as SHIPPED_MODELS

SHIPPED = sorted(path.stem for path in (conf_root() / "benchmark").glob("*.yaml"))
ADAPTIVE = tuple(f"{on}{name}" for on in ("", "student-") for name in ("tea", "first", "mag", "sea", "faster", "delta"))
PARAMETERS = {"hunyuan_video": 12.821, "hunyuan_video_15": 8.327, "wan_1.3b": 1.419, "wan_14b": 14.288}
PARAMETERS |= {"wan22": 2 * 14.288}
"""Published, 10^9."""


def planned(run: dict) -> bool:
    return run["error"] is None


def benchmark(conf: str, *overrides: str) -> BenchmarkConfig:
    return load("benchmark", BenchmarkConfig, conf, overrides)


@pytest.fixture(scope="module")
def configs() -> dict[str, BenchmarkConfig]:
    return {name: benchmark(name) for name in SHIPPED}


@pytest.fixture(scope="module")
def plans(configs) -> dict[str, dict]:
    return {name: plan(config) for name, config in configs.items()}


@pytest.fixture(scope="module")
def hunyuan(plans) -> dict[str, dict]:
    """Runs of HunyuanVideo at 129 x 704 x 704, by method."""
    runs = plans["hunyuan_video"]["runs"]
    return {run["method"]: run for run in runs if run["size"] == {"num_frames": 129, "height": 704, "width": 704}}


def test_every_family_has_a_plan(configs, plans, schema):
    assert {run["family"] for results in plans.values() for run in results["runs"]} == FAMILIES.keys()
    for name, results in plans.items():
        schema.validate(results)
        config = configs[name]
        assert len(results["runs"]) == len(config.only or config.methods) * len(config.sizes or [FAMILIES])
        assert len({run["id"] for run in results["runs"]}) == len(results["runs"])


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters_are_the_published_ones(plans, name):
    run = plans[name]["runs"][0]
    assert run["parameters"] / 1e9 == pytest.approx(PARAMETERS[name], rel=5e-3)
    assert run["plan"]["weight_bytes"] == 2 * run["parameters"]


def test_the_first_step_of_a_second_transformer_is_planned_in_full(plans):
    (full, *_), (taylor, *_) = (
        [run for run in plans["wan22"]["runs"] if run["method"] == name] for name in ("cfg-50", "taylor-every-3")
    )
    published = [i for i, t in enumerate(Grid.shifted(50, 12.0).times[:-1]) if t >= 0.875]
    assert taylor["full_steps"] == sorted({*range(0, 50, 3), len(published)}) and len(published) % 3
    assert taylor["passes"] == {"full": 36, "predicted": 0, "skipped": 64}
    one = plans["wan_14b"]["runs"][0]  # a pass is of either
    assert full["plan"]["full_pass"] == one["plan"]["full_pass"]


def test_hunyuan_video_as_published(hunyuan):
    run = hunyuan["predictor-8-of-20"]
    assert run["plan"]["tokens"] == {"video": 33 * 44 * 44, "text": 256}
    assert 11.8 <= run["speedup"]["ideal"] <= 12.0
    full, predicted = (sum(run["plan"][kind].values()) for kind in ("full_pass", "other_pass"))
    assert predicted / full == pytest.approx(0.036, abs=0.002)
    assert run["speedup"]["ideal"] == pytest.approx(100 / (8 + 12 * predicted / full), rel=1e-12)
    # Published are the tokens; float32 cosines and sines, and the text, are held beside them.
    held = 33 * 44 * 44 * 128 * 2 * 4 + 256 * 3072 * 2
    assert run["cache_bytes"] - held == pytest.approx(0.39e9, rel=0.02)
    assert hunyuan["predictor-4-of-8"]["speedup"]["ideal"] == pytest.approx(24, rel=0.02)
    predictor = run["parameters"] - hunyuan["cfg-50"]["parameters"]
    assert predictor / hunyuan["cfg-50"]["parameters"] < 0.04


def test_caches_as_published(hunyuan):
    ideal = {name: run["speedup"]["ideal"] for name, run in hunyuan.items()}
    assert ideal["fora-6"] == pytest.approx(11.1, abs=0.05)
    assert ideal["taylorseer-6"] == pytest.approx(9.09, abs=0.05)
    assert hunyuan["pab-5"]["cache_bytes"] == pytest.approx(24.1e9, rel=0.03)  # what peak memory rose by
    assert hunyuan["taylorseer-6"]["cache_bytes"] == 2 * hunyuan["fora-6"]["cache_bytes"]
    measured = {"pab-5": 5.34, "pab-8": 6.46, "fora-3": 4.35, "fora-6": 8.01, "taylorseer-3": 4.31}
    assert all(0.7 < measured[name] / ideal[name] < 1 for name in measured)


def test_steps_alone_divide_the_baseline(hunyuan):
    expected = {"cfg-50": 1, "cfg-distilled-50": 2, "student-20": 5, "student-10": 10, "student-8": 12.5}
    assert {name: hunyuan[name]["speedup"]["ideal"] for name in expected} == expected
    assert all(hunyuan[name]["cache_bytes"] == 0 and hunyuan[name]["plan"]["other_pass"] is None for name in expected)


def test_steps_by_scalars_cost_no_pass(plans):
    """However many they are, they hold the same: velocities and latents of the last three full ones."""
    expected = {"scalars-4-of-8": 25, "scalars-3-of-8": 100 / 3, "scalars-2-of-8": 50}
    for name in ("sprites", "hunyuan_video"):
        runs = [run for run in plans[name]["runs"] if run["method"] in expected]
        assert {run["method"]: run["speedup"]["ideal"] for run in runs} == pytest.approx(expected)
        for run in runs:
            assert sum(run["plan"]["other_pass"].values()) == 0 and run["passes"]["predicted"] == 0
            assert run["cache_bytes"] == next(r["cache_bytes"] for r in runs if r["size"] == run["size"]) > 0


def test_memory_adds_up(plans):
    for results in plans.values():
        for run in filter(planned, results["runs"]):
            costs = run["plan"]
            parts = costs["weight_bytes"] + costs["activation_bytes"] + run["cache_bytes"]
            assert costs["peak_memory_bytes"] == parts


def test_what_only_a_run_knows_is_not_planned(plans):
    for run in plans["wan_1.3b"]["runs"]:
        assert planned(run) != run["method"].startswith(ADAPTIVE)
        assert planned(run) == (run["flops"] is not None) == (run["passes"] is not None)


def test_a_budget_is_planned_without_its_steps(hunyuan):
    run, listed = hunyuan["predictor-8-searched"], hunyuan["predictor-8-of-20"]
    assert run["full_steps"] is None
    assert {name: run[name] for name in ("passes", "flops")} == {name: listed[name] for name in ("passes", "flops")}


def test_passes():
    def counted(**settings):
        found = passes(MethodConfig(**settings))
        return found.full, found.predicted, found.skipped

    assert counted(steps=50, two_pass=True) == (100, 0, 0)
    assert counted(steps=8, full_steps=[0, 2, 4, 7]) == (4, 4, 0)
    assert counted(steps=8, full_share=0.4) == (3, 5, 0) and counted(steps=2, full_share=0.9) == (1, 1, 0)
    assert counted(steps=8, every=3, on_skipped="reuse") == (3, 0, 5)
    assert counted(steps=8, every=3, on_skipped="attention", two_pass=True) == (6, 0, 10)


def test_two_passes_a_step_keep_two_caches():
    methods = {
        name: MethodConfig(steps=4, every=2, on_skipped="branches", two_pass=two_pass)
        for name, two_pass in (("one", False), ("two", True))
    }
    shallow = {"num_layers": 1, "num_single_layers": 1}
    config = BenchmarkConfig(transformer=shallow, methods=methods, baseline="two", sizes=[[5, 64, 64]])
    two, one = plan(config)["runs"]
    assert two["cache_bytes"] == 2 * one["cache_bytes"] > 0
    assert one["speedup"]["ideal"] == 2


def test_a_predictor_that_looks_back_on_two_full_steps_holds_both():
    def cache(**settings):
        methods = {"cfg-50": MethodConfig(two_pass=True), "row": MethodConfig(steps=8, every=2, **settings)}
        shallow = {"num_layers": 1, "num_single_layers": 1}
        configs = (
            BenchmarkConfig(transformer=shallow, methods=methods, sizes=[[5, 64, 64]], predictor_history=history)
            for history in (1, 2)
        )
        return [plan(config)["runs"][1]["cache_bytes"] for config in configs]

    one, two = cache()
    assert two - one == (2 * 8 * 8 // 4 + 256) * 3072 * 2  # [video; text] in bfloat16, and nothing of embedders again
    assert cache(on_skipped="reuse") == [one, one]
    assert cache(on_skipped="taylor") == cache(on_skipped="taylor", order=1) == [two, two]


def test_the_shipped_model_is_planned_as_it_is_called():
    config, folder = benchmark("sprites"), SHIPPED_MODELS / "teacher"
    call = json.loads((folder / "run.json").read_text())["call"]
    vae = json.loads((folder / "vae" / "config.json").read_text())
    assert config.sizes == [[call["num_frames"], call["height"], call["width"]]]
    assert config.text_tokens == {"prompt": call["max_sequence_length"]}
    assert config.compression == [vae["temporal_compression_ratio"], vae["spatial_compression_ratio"]]
    transformer = json.loads((folder / "transformer" / "config.json").read_text())
    assert meta_transformer(config).config.num_single_layers == transformer["num_single_layers"]


class Draws(TorchDispatchMode):
    """How often weights are filled with random numbers."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func.__name__.partition(".")[0] in ("uniform_", "normal_")
        return func(*args, **(kwargs or {}))


def test_a_plan_draws_no_weights():
    small = {"num_layers": 1, "num_single_layers": 1, "num_refiner_layers": 1, "num_attention_heads": 2}
    config = BenchmarkConfig(transformer=small | {"attention_head_dim": 8, "rope_axes_dim": [2, 2, 4]})
    with Draws() as on_meta:
        model = meta_transformer(config)
    with Draws() as on_cpu:
        weights = dict(new_transformer(config, "cpu").named_parameters())
    assert on_meta.count == 0 < on_cpu.count
    assert {name: p.shape for name, p in model.named_parameters()} == {name: p.shape for name, p in weights.items()}
    assert all(bool(p.isfinite().all()) and p.abs().max() < 10 for p in weights.values())


@pytest.mark.parametrize("name", PARAMETERS)
def test_published_models_are_planned_as_their_pipelines_call_them(name, monkeypatch):
    monkeypatch.setattr(tiny, "PADDED_15", {})
    config = benchmark(name)
    pipe, defaults = tiny_pipeline(config.family), FAMILIES[config.family].defaults
    if config.family == "hunyuan_video_15":
        lengths = (pipe.tokenizer_max_length, pipe.tokenizer_2_max_length, pipe.vision_num_semantic_tokens)
        expected = dict(zip(("prompt", "glyphs", "image"), lengths, strict=True))
    else:
        expected = {"prompt": signature(type(pipe).__call__).parameters["max_sequence_length"].default}
    assert config.text_tokens == expected
    assert config.compression == [pipe.vae_scale_factor_temporal, pipe.vae_scale_factor_spatial]
    assert [defaults.num_frames, defaults.height, defaults.width] in config.sizes


def test_sweeps_are_rows_behind_their_own():
    method = MethodConfig(
        cache="teacache", settings={"threshold": 0.1, "coefficients": [1, 0]}, sweep={"threshold": [0.1, 0.2]}
    )
    config = BenchmarkConfig(methods={"cfg-50": MethodConfig(), "tea": method, "last": MethodConfig(steps=3)})
    assert list(config.wanted()) == ["cfg-50", "tea", "last"]
    rows = config.wanted(swept=True)
    assert list(rows) == ["cfg-50", "tea", "tea threshold=0.2", "last"]
    assert rows["tea threshold=0.2"].settings == {"threshold": 0.2, "coefficients": [1, 0]}
    assert not rows["tea threshold=0.2"].sweep


def test_the_baseline_is_always_there():
    assert list(benchmark("hunyuan_video", "only=[student-8]").wanted()) == ["cfg-50", "student-8"]


@pytest.mark.parametrize(
    ("overrides", "message", "hint"),
    [
        (["only=[studnt-8]"], 'there is no method "studnt-8"', 'did you mean "student-8"?'),
        (["baseline=cfg"], 'there is no method "cfg"', 'did you mean "cfg-50"?'),
        (["baseline=seacache"], "the baseline seacache cannot be planned", "take another"),
        (["family=hunyuan"], "no model family is called hunyuan", "hunyuan_video"),
        (["sizes=[[129, 704, 700]]"], "width=700 does not fit: this HunyuanVideo makes multiples of 16", "688 or 704"),
        (["sizes=[[128, 704, 704]]"], "num_frames=128 does not fit", "125 or 129"),
        (["transformer={num_layer: 3}"], "takes no num_layer", 'did you mean "num_layers"?'),
        (["transformer={num_layers: many}"], "cannot be built", "mend"),
        (["text_tokens={glyphs: 3}"], "text_tokens is for prompt, glyphs; HunyuanVideo has prompt", "prompt: 256"),
        (["model=nowhere"], "nowhere/transformer/config.json is missing", "copy"),
    ],
)
def test_refusals(overrides, message, hint):
    with pytest.raises(UserError) as error:
        plan(benchmark("hunyuan_video", *overrides))
    assert message in error.value.message
    assert hint in error.value.hint


@pytest.mark.parametrize(
    "settings",
    [
        {"steps": 0},
        {"every": 0},
        {"order": -1},
        {"on_skipped": "magic"},
        {"on_skipped": "linear", "two_pass": True},
        {"weights": "pupil"},
        {"steps": 4, "full_steps": []},
        {"steps": 4, "full_steps": [1, 2]},
        {"steps": 4, "full_steps": [0, 2, 1]},
        {"steps": 4, "full_steps": [0, 1, 1]},
        {"steps": 4, "full_steps": [0, 4]},
        {"full_steps": [0], "every": 2},
        {"steps": 4, "budget": 5},
        {"budget": 2, "every": 2},
        {"budget": 2, "on_skipped": "branches"},
        {"cache": "fora", "at_most": 4},
        {"full_share": 1.0},
        {"full_share": 0.4, "budget": 2},
        {"full_share": 0.4, "on_skipped": "reuse"},
        {"cache": "magic"},
        {"settings": {"threshold": 1}},
        {"sweep": {"threshold": [1]}},
        {"shift": 0.0},
        {"guidance": 0.5},
    ],
    ids=str,
)
def test_settings_of_a_method(settings):
    with pytest.raises(UserError, match="is not possible"):
        MethodConfig(**settings)


@pytest.mark.parametrize(
    "settings",
    [
        {"sizes": []},
        {"sizes": [[5, 64]]},
        {"sizes": [[5, 64, 0]]},
        {"height": 0},
        {"compression": [4]},
        {"predictor_blocks": 0},
        {"predictor_history": 3},
        {"text_tokens": {"prompt": 0}},
        {"dtype": "float8"},
        {"rounds": 1},
        {"timed_prompts": 0},
        {"scorer": "vbench"},
        {"seed": -1},
        {"guidance": 0.5},
    ],
    ids=str,
)
def test_settings_of_the_benchmark(settings):
    with pytest.raises(UserError, match="is not possible"):
        BenchmarkConfig(**settings)


def test_frames_that_patches_of_time_split_evenly():
    config = benchmark("wan_1.3b")
    assert rows(config, meta_transformer(config), (81, 480, 832))["video"] == 21 * 30 * 52
