"""Which training-free cache runs on which family, as diffusers 0.42.1 has them: full (F) and shortened (.) passes."""

from contextlib import contextmanager, nullcontext
from dataclasses import replace

import pytest
import torch
from diffusers.hooks import sea_cache

from tests.bench.measures.test_counting import run, tiny_loaded
from vidaccel.bench.baselines.diffusers_caches import branch_identifiers
from vidaccel.bench.baselines.parts import PartsCache, Unsupported
from vidaccel.bench.baselines.registry import calibrate, check_settings, class_of, lacks, switched_on
from vidaccel.bench.measures.counting import Observer
from vidaccel.config.benchmark import CACHES, BenchmarkConfig, MethodConfig
from vidaccel.config.loader import conf_root, load
from vidaccel.errors import UserError
from vidaccel.families.walk import blocks_of

SETTINGS = {
    "pab": {"spatial_attention_block_skip_range": 2, "spatial_attention_timestep_skip_range": [0, 1001]},
    "fastercache": {"spatial_attention_timestep_skip_range": [-1, 960]},
    "first_block": {"threshold": 9.0},
    "taylorseer": {"cache_interval": 2, "disable_cache_before_step": 2},
    "magcache": {"threshold": 100.0, "retention_ratio": 0.0, "max_skip_steps": 2},
    "seacache": {"threshold": 100.0},
    "fora": {"every": 2},
    "teacache": {"threshold": 1e9},
    "delta_dit": {"every": 2, "share": 0.5},
    "cache_dit": {"Fn_compute_blocks": 1, "max_warmup_steps": 2, "residual_diff_threshold": 1.0},
}
NOT_REGISTERED = "HunyuanVideo15TransformerBlock'> not registered"
ONE_STATE = "keeps one state for both passes of guidance"
RAN = {
    "pab": "F.F.F",
    "fastercache": "F.F.F",
    "first_block": "F....",
    "taylorseer": "FF.F.",
    "magcache": "F..F.",
    "seacache": "F..FF",
    "fora": "F.F.F",
    "teacache": "F...F",
    "delta_dit": "F.F.F",
    "cache_dit": "FF...",
}
HERE = [cache for cache in CACHES if lacks(cache) is None]
"""Those whose package is installed."""
STOPPED = {
    ("hunyuan_video_15", "first_block"): NOT_REGISTERED,
    ("hunyuan_video_15", "magcache"): NOT_REGISTERED,
    ("hunyuan_video_15", "seacache"): NOT_REGISTERED,
}


@pytest.fixture(scope="module", params=["hunyuan_video", "hunyuan_video_15", "wan"])
def loaded(request):
    return tiny_loaded(request.param)


def passes(loaded, cache: str, two_pass: bool = False) -> str:
    method = MethodConfig(steps=5, two_pass=two_pass, cache=cache, settings=SETTINGS[cache])

    def generate():
        run(loaded, steps=5, two_pass=two_pass)

    settings = calibrate(loaded, method, generate)
    with switched_on(loaded, method, settings), Observer(loaded) as seen:
        generate()
    return "".join("F" if full else "." for full in seen.full)


def test_every_cache_runs_or_says_why_not(loaded):
    plain = run(loaded, steps=5, two_pass=False).latents
    for cache in HERE:
        reason = STOPPED.get((loaded.family.name, cache))
        if reason is None:
            assert passes(loaded, cache) == RAN[cache], cache
        else:
            with pytest.raises((Unsupported, ValueError), match=reason):
                passes(loaded, cache)
        assert torch.equal(run(loaded, steps=5, two_pass=False).latents, plain), f"{cache} left something behind"


def test_an_interrupted_row_leaves_nothing_to_the_next(loaded):
    """Left on after an aborted generation, diffusers' caches keep their state and give other videos next time. A row's
    cache is switched off however the row ends, in the middle of a pass as well, so it cannot be left on: the next rows,
    without a cache, with this one and with another, are what they are without the interruption."""
    names = [cache for cache in HERE if (loaded.family.name, cache) not in STOPPED]
    rows = [MethodConfig(steps=5, two_pass=False, cache=cache, settings=SETTINGS[cache]) for cache in names]
    rows = [replace(row, settings=calibrate(loaded, row, lambda: latents(loaded))) for row in rows]
    plain, before = latents(loaded), [latents(loaded, row) for row in rows]
    for i, row in enumerate(rows):
        for block, stop in ((0, KeyboardInterrupt), (-1, RuntimeError)):
            with pytest.raises(stop), interrupted(loaded, 3, block, stop):
                latents(loaded, row)
        assert torch.equal(latents(loaded), plain), row.cache
        assert torch.equal(latents(loaded, row), before[i]), row.cache
        assert torch.equal(latents(loaded, rows[i - 1]), before[i - 1]), (row.cache, rows[i - 1].cache)
    with pytest.raises(KeyboardInterrupt), interrupted(loaded, 3, 0, KeyboardInterrupt):
        passes(loaded, "magcache" if "magcache" in names else "teacache")  # in its calibration
    assert torch.equal(latents(loaded), plain)


def latents(loaded, row: MethodConfig | None = None) -> torch.Tensor:
    """Of a video, by a row with a cache."""
    with switched_on(loaded, row, row.settings) if row else nullcontext():
        return run(loaded, steps=5, two_pass=False).latents


@contextmanager
def interrupted(loaded, at: int, block: int, stop: type[BaseException]):
    """The `at`-th pass ends in this block, or where that is skipped before the next pass begins."""
    seen = []
    transformer = loaded.pipe.transformer

    def count(module, args):
        seen.append(module)
        if len(seen) > at:
            raise stop

    def end(module, args, output):
        if len(seen) == at:
            raise stop

    inner = blocks_of(transformer, loaded.family)[block][1]
    handles = [transformer.register_forward_pre_hook(count), inner.register_forward_hook(end)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def test_caches_with_one_state_are_not_run_under_two_passes(loaded):
    for cache in ("pab", "fastercache"):
        with pytest.raises(Unsupported, match=ONE_STATE):
            passes(loaded, cache, two_pass=True)
    assert passes(loaded, "fora", two_pass=True) == "FF..FF..FF"
    assert passes(loaded, "taylorseer", two_pass=True) == "FFFF..FF.."


def test_a_cache_that_finds_nothing_is_not_run():
    loaded = tiny_loaded("wan")
    with pytest.raises(Unsupported, match="TaylorSeerCacheConfig finds nothing in a WanTransformer3DModel"):
        method = MethodConfig(steps=5, cache="taylorseer", settings={"cache_identifiers": ["no such module"]})
        with switched_on(loaded, method, method.settings):
            pass
    assert not loaded.pipe.transformer.is_cache_enabled


def test_seacache_that_gives_up_is_not_run():
    loaded, method = tiny_loaded("wan"), MethodConfig(steps=5, cache="seacache")
    with pytest.raises(Unsupported, match="in fail-open mode"), switched_on(loaded, method, {}):
        sea_cache.logger.warning("running in fail-open mode")


def test_given_calibrations_are_kept():
    for cache, setting in (("teacache", "coefficients"), ("magcache", "mag_ratios")):
        method = MethodConfig(cache=cache, settings={"threshold": 0.1, setting: [1.0, 0.0]})
        assert calibrate(None, method, None) == method.settings


def test_taylorseer_is_on_every_branch():
    found = branch_identifiers(tiny_loaded("hunyuan_video").family)
    assert found == {
        "cache_identifiers": [
            r"transformer_blocks\.\d+\.(attn|ff|ff_context)",
            r"single_transformer_blocks\.\d+\.(proj_out)",
        ],
        "skip_predict_identifiers": [r"single_transformer_blocks\.\d+\.(attn|proj_mlp)"],
    }


def test_every_name_is_a_cache():
    own = {name for name in CACHES if issubclass(class_of(name), PartsCache)}
    assert own == {"fora", "teacache", "delta_dit"}
    others = CACHES.keys() - own - {"cache_dit"}
    assert all(class_of(name).__module__.startswith("diffusers.hooks.") for name in others)


@pytest.mark.parametrize("conf", [path.stem for path in (conf_root() / "benchmark").glob("*.yaml")])
def test_every_shipped_row_has_settings_that_its_cache_takes(conf):
    for name, method in load("benchmark", BenchmarkConfig, conf).wanted(swept=True).items():
        if method.cache is not None:
            check_settings(name, method)


@pytest.mark.parametrize(
    ("cache", "settings", "message"),
    [
        ("pab", {"block_skip": 2}, 'pab has no setting "block_skip"'),
        ("teacache", {}, "missing 1 required positional argument: 'threshold'"),
        ("teacache", {"threshold": -1}, "TeaCache with threshold=-1"),
        ("delta_dit", {"every": 2, "share": 2}, "share=2"),
        ("seacache", {"residual_order": 3}, "`residual_order` must be 0 or 1"),
        ("fora", {"pipe": 1}, 'fora has no setting "pipe"'),
        ("cache_dit", {"threshold": 0.1}, 'cache_dit has no setting "threshold"'),
        ("cache_dit", {"steps_computation_mask": [0, 1]}, "cache-dit with steps_computation_mask=[0, 1]"),
        ("cache_dit", {"steps_computation_policy": "static"}, "cache-dit with steps_computation_mask=None"),
    ],
)
def test_settings_that_a_cache_refuses(cache, settings, message):
    with pytest.raises(UserError) as error:
        check_settings("row", MethodConfig(cache=cache, settings=settings))
    assert error.value.message.startswith("row: ") and message in error.value.message
