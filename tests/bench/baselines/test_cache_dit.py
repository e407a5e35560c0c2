"""cache-dit as a row: what it leaves out, what it keeps, and that nothing of it stays on the pipeline."""

import importlib.util

import pytest
import torch
from diffusers.hooks import HookRegistry, ModelHook

from tests.bench.measures.test_counting import run, tiny_loaded
from vidaccel.bench.baselines.registry import lacks, one_at_a_time, switched_on
from vidaccel.bench.measures.counting import Observer
from vidaccel.bench.measures.flops import blocks_flops
from vidaccel.bench.models import Models
from vidaccel.bench.own_model import resolved
from vidaccel.config.benchmark import BenchmarkConfig, MethodConfig
from vidaccel.errors import UserError

MASK = {"Fn_compute_blocks": 1, "steps_computation_mask": "10110", "steps_computation_policy": "static"}


def row(two_pass: bool = False, **settings) -> MethodConfig:
    return MethodConfig(steps=5, two_pass=two_pass, cache="cache_dit", settings=settings)


@pytest.fixture(scope="module", params=["hunyuan_video", "wan"])
def loaded(request):
    pytest.importorskip("cache_dit", reason="pip install vidaccel[peers]")
    return tiny_loaded(request.param)


def observed(loaded, method: MethodConfig) -> tuple[Observer, torch.Tensor]:
    with switched_on(loaded, method, method.settings), Observer(loaded) as seen:
        made = run(loaded, steps=5, two_pass=method.two_pass)
    return seen, made.latents


def tokens(loaded) -> dict[str, int]:
    """Rows of video and text that blocks get, by a hook on the first."""
    kind, found = loaded.family.block_lists[0], {}
    first = loaded.pipe.transformer.get_submodule(kind.name)[0]
    handle = first.register_forward_pre_hook(lambda _, args: found.update(zip(kind.arguments, args, strict=False)))
    run(loaded, steps=1, two_pass=False)
    handle.remove()
    return {name: found[name].shape[1] for name in ("hidden_states", "encoder_hidden_states")}


@pytest.mark.parametrize("two_pass", [False, True])
def test_a_mask_leaves_out_all_blocks_but_the_first_and_keeps_each_pass_apart(loaded, two_pass):
    seen, _ = observed(loaded, row(two_pass, **MASK))
    ways = 1 + two_pass
    assert "".join("F" if full else "." for full in seen.full) == "".join(each * ways for each in "F.FF.")
    found, transformer = tokens(loaded), loaded.pipe.transformer
    video, text = found["hidden_states"], found["encoder_hidden_states"]
    rows = {"one": 1, "video": video, "text": text, "all": video + text}
    width = transformer.config.num_attention_heads * transformer.config.attention_head_dim
    if not two_pass:
        lists = {each.name for each in loaded.family.block_lists}
        left_out = sum(
            sum(layer.flops for layer in each.layers) + each.attention
            for name in lists
            for each in blocks_flops(
                transformer, loaded.family, rows, name, range(1, len(transformer.get_submodule(name)))
            )
        )
        assert seen.passes[0].flops - seen.passes[1].flops == left_out
    # Of each list: what the first block adds to the video, and what the others add to video and text.
    kept = len(loaded.family.block_lists) * (2 * video + text) * width * 4
    assert seen.held == ways * kept


def test_the_calibrator_carries_on_and_keeps_a_derivative(loaded):
    plain, taylor = (observed(loaded, row(**MASK, taylorseer_order=order)) for order in (0, 1))
    assert plain[0].flops == taylor[0].flops and taylor[0].held > plain[0].held
    assert not torch.equal(plain[1], taylor[1])


def test_a_threshold_decides_by_what_it_sees(loaded):
    settings = {"Fn_compute_blocks": 1, "max_warmup_steps": 1}
    skipped = [
        observed(loaded, row(**settings, residual_diff_threshold=threshold))[0].full.count(False)
        for threshold in (1e-9, 1.0)
    ]
    assert skipped == [0, 4]
    assert one_at_a_time(row(**settings)) and not one_at_a_time(row(**MASK))


def test_one_of_its_own_masks(loaded):
    method = MethodConfig(steps=8, cache="cache_dit", settings=MASK | {"steps_computation_mask": "ultra"})
    with switched_on(loaded, method, method.settings), Observer(loaded) as seen:
        run(loaded, steps=8, two_pass=False)
    assert seen.full_steps == [0, 1, 4, 7]
    with pytest.raises(UserError, match="a mask of 5 steps, and the row has 8"):
        observed(loaded, MethodConfig(steps=8, cache="cache_dit", settings=MASK))


@pytest.mark.parametrize("hooked", [False, True])
def test_nothing_of_it_stays(loaded, hooked):
    """Nor where `forward` is no method, as under a hook of diffusers."""
    transformer, call = loaded.pipe.transformer, type(loaded.pipe).__call__
    if hooked:
        HookRegistry.check_if_exists_or_initialize(transformer).register_hook(ModelHook(), "other")
    forward = vars(transformer).get("forward")
    plain = run(loaded, steps=5, two_pass=False).latents
    before = [(name, set(vars(module))) for name, module in transformer.named_modules()]
    for two_pass in (False, True):
        observed(loaded, row(two_pass, **MASK, taylorseer_order=1))
    assert type(loaded.pipe).__call__ is call and "_is_cached" not in vars(type(loaded.pipe))
    assert [(name, set(vars(module))) for name, module in transformer.named_modules()] == before  # in their order
    assert vars(transformer).get("forward") is forward
    assert torch.equal(run(loaded, steps=5, two_pass=False).latents, plain)


def test_without_the_package_its_rows_are_left_out_in_one_line(monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "cache_dit" else found(name))
    why = "cache-dit is not installed: pip install vidaccel[peers]"
    assert (lacks("cache_dit"), lacks("fora"), lacks(None)) == (why, None, None)
    methods = {"peer": row(**MASK), "plain": MethodConfig(steps=5)}
    _, lacking = resolved(methods, Models(BenchmarkConfig(model="a", student="b", methods=methods)))
    assert lacking == {"peer": why}
