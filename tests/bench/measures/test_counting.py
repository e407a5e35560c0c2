"""What is counted while a pipeline runs: the formulas' numbers, to the last FLOP and byte."""

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from tests.tiny import CALLS, SIZE, TEXT_TO_VIDEO, calls_of_a_step, tiny_pipeline
from vidaccel.bench.baselines.registry import switched_on
from vidaccel.bench.generation import timed_generation
from vidaccel.bench.measures.counting import FORMULAS, Flops, Observer, held_bytes
from vidaccel.bench.measures.flops import pass_flops, width
from vidaccel.bench.measures.memory import cache_bytes
from vidaccel.bench.measures.peak_memory import PeakMemory
from vidaccel.cache.attach import attach
from vidaccel.config.benchmark import MethodConfig
from vidaccel.families.registry import FAMILIES
from vidaccel.forecasters.learned import new_predictor
from vidaccel.forecasters.reuse import Reuse
from vidaccel.models.loading import LoadedPipeline

STEPS = 4
TIME = 4
"""Bytes of the time that a trunk remembers with its tokens."""
TEXTS = {"prompt": "encoder_hidden_states", "glyphs": "encoder_hidden_states_2", "image": "image_embeds"}


def tiny_loaded(family: str) -> LoadedPipeline:
    call = SIZE | CALLS.get(family, {}) | {"guidance": 3.0}
    return LoadedPipeline(tiny_pipeline(family), FAMILIES[family], family, call, {})


def contexts(loaded: LoadedPipeline) -> int:
    """Of the two passes of guidance: one each, or one of a doubled batch."""
    return calls_of_a_step(loaded.pipe)


def run(loaded: LoadedPipeline, **settings):
    method = MethodConfig(**{"steps": STEPS, "two_pass": True} | settings)
    return timed_generation(loaded, method, tuple(SIZE.values()), ["a red circle"], [0])


@pytest.fixture(scope="module", params=TEXT_TO_VIDEO)
def model(request):
    """(loaded, rows of each stream, FLOPs of a pass by kind, cache bytes by kind)."""
    loaded = tiny_loaded(request.param)
    transformer, family, given, tokens = loaded.pipe.transformer, loaded.family, {}, {}
    names = family.block_lists[0].arguments
    first = transformer.get_submodule(family.block_lists[0].name)[0]

    def note(block, args, kwargs):
        tokens.update(dict(zip(names, args, strict=False)) | kwargs)

    handles = [
        transformer.register_forward_pre_hook(lambda _, args, kwargs: given.update(kwargs), with_kwargs=True),
        # A block may be given its last arguments by name, or not at all.
        first.register_forward_pre_hook(note, with_kwargs=True),
    ]
    run(loaded, steps=1)
    for handle in handles:
        handle.remove()
    video, text = (tokens[name].shape[1] for name in ("hidden_states", "encoder_hidden_states"))
    lengths = {name: given[argument].shape[1] for name, argument in TEXTS.items() if argument in given}
    rows = {"one": 1, "video": video, "text": text, "all": video + text, **lengths}
    costs = {kind: flops.total for kind, flops in pass_flops(transformer, family, rows).items()}
    return loaded, rows, costs, cache_bytes(transformer, family, rows, torch.float32)


def test_a_plain_run_is_all_full_passes(model):
    loaded, _, costs, _ = model
    with Observer(loaded) as seen:
        run(loaded)
    assert [each.flops for each in seen.passes] == [costs["full"]] * 2 * STEPS
    assert [each.step for each in seen.passes] == [step for step in range(STEPS) for _ in range(2)]
    assert seen.full_steps == list(range(STEPS)) and all(seen.full)
    assert (seen.flops, seen.held) == (2 * STEPS * costs["full"], 0)


def test_attention_of_other_libraries_is_counted(model, monkeypatch):
    loaded, _, costs, _ = model

    def foreign(query, key, value, attn_mask=None, **options):
        """Nothing that goes through a function of torch that is counted."""
        return query.clone()

    backends = _AttentionBackendRegistry._backends
    monkeypatch.setitem(backends, AttentionBackendName.NATIVE, foreign)
    with Observer(loaded) as seen:
        run(loaded)
    assert [each.flops for each in seen.passes] == [costs["full"]] * 2 * STEPS
    assert backends[AttentionBackendName.NATIVE] is foreign


def test_a_reused_trunk_leaves_embedders_and_head(model):
    loaded, _, costs, cache = model
    with attach(loaded, predictor=Reuse(), steps=STEPS, full_steps=[0, 2]), Observer(loaded) as seen:
        run(loaded)
    assert [each.flops for each in seen.passes] == [costs[k] for k in ("full", "reuse", "full", "reuse") for _ in "cu"]
    assert seen.full_steps == [0, 2]
    assert seen.held == 2 * sum(cache["reuse"]) + contexts(loaded) * TIME


@pytest.mark.parametrize("kernels", ["reference", "fused"])
def test_a_predictor_costs_what_is_planned(model, kernels):
    loaded, _, costs, cache = model
    tokens = {name: torch.randn(1, 8, width(loaded.pipe.transformer)) for name in loaded.family.block_lists[-1].returns}
    predictor = new_predictor(loaded.pipe.transformer, loaded.family, tokens, tokens, blocks=2).eval()
    predictor.kernels = kernels
    with attach(loaded, predictor=predictor, steps=STEPS, full_steps=[0, 2]), Observer(loaded) as seen:
        run(loaded)
    assert {each.flops for each in seen.passes if each.step in (1, 3)} == {costs["predictor"]}
    assert seen.held == 2 * sum(cache["predictor"]) + contexts(loaded) * TIME


@pytest.mark.parametrize("cache", ["fora", "taylorseer"])
def test_caches_of_branches_leave_modulation(model, cache):
    loaded, _, costs, sizes = model
    settings = {"every": 2} if cache == "fora" else {"cache_interval": 2, "disable_cache_before_step": 1}
    method = MethodConfig(steps=STEPS, two_pass=True, cache=cache, settings=settings)
    with switched_on(loaded, method, settings), Observer(loaded) as seen:
        run(loaded)
    skipped = [each.flops for each, full in zip(seen.passes, seen.full, strict=True) if not full]
    assert set(skipped) == {costs["branches"]} and len(skipped) == 4
    # FORA frees a context with its last step; diffusers keeps the derivative too, once it has one
    assert seen.held == 2 * sizes["branches"].each * (1 if cache == "fora" else 2)


def test_pab_leaves_attention(model):
    loaded, rows, costs, sizes = model
    every, where = {"block_skip_range": 2, "timestep_skip_range": [0, 1001]}, ("spatial", "cross")
    settings = {f"{which}_attention_{name}": value for which in where for name, value in every.items()}
    method = MethodConfig(weights="student", steps=STEPS, cache="pab", settings=settings)
    with switched_on(loaded, method, settings), Observer(loaded) as seen:
        run(loaded, two_pass=False)
    assert seen.full_steps == [0, 2]
    assert seen.passes[0].flops == costs["full"]
    # its pattern for blocks finds the attention of the one refiner block of the text as well
    L, D = rows["prompt"] if loaded.family.costs.attentions else 0, width(loaded.pipe.transformer)
    assert seen.passes[1].flops == costs["attention"] - (2 * L * 4 * D**2 + 4 * L**2 * D)
    assert seen.held == sizes["attention"].each + 4 * L * D


def counted(call) -> int:
    """As PyTorch counts, also where operations are seen before they are taken apart."""
    for mode in (torch.no_grad, torch.inference_mode):
        with mode(), FlopCounterMode(display=False, custom_mapping=FORMULAS) as counter:
            call()
        with mode(), Flops() as flops:
            call()
        assert flops.total == counter.get_total_flops()
    return flops.total


def test_counted_operations():
    x, w, b = torch.randn(2, 3, 4), torch.randn(5, 4), torch.randn(5)
    assert counted(lambda: F.linear(x, w, b)) == counted(lambda: x @ w.mT) == 2 * 6 * 4 * 5
    video, kernel = torch.randn(1, 2, 4, 4, 4), torch.randn(3, 2, 1, 2, 2)
    assert counted(lambda: F.conv3d(video, kernel, stride=(1, 2, 2))) == 2 * (2 * 1 * 2 * 2) * 3 * (4 * 2 * 2)
    bytes = torch.ones(32, 16, dtype=torch.int8), torch.ones(16, 24, dtype=torch.int8)
    assert counted(lambda: torch._int_mm(*bytes)) == 2 * 32 * 16 * 24


def test_what_cannot_be_counted_is_refused():
    x, branches = torch.ones(4, 4), (lambda a: (a @ a,), lambda a: (a,))
    with pytest.raises(NotImplementedError, match="no rule registered for HigherOrderOperator cond"), Flops():
        torch.ops.higher_order.cond(torch.tensor(True), *branches, (x,))


@pytest.mark.parametrize("backend", [SDPBackend.MATH, SDPBackend.FLASH_ATTENTION])
def test_attention_is_counted_however_it_is_computed(backend):
    q, k = torch.randn(1, 2, 3, 4), torch.randn(1, 2, 7, 4)
    with sdpa_kernel(backend):
        assert counted(lambda: F.scaled_dot_product_attention(q, k, k)) == 2 * (2 * 3 * 7 * 4) * 2


class Holder:
    """A hook with things in it."""

    def __init__(self, *things):
        self.things, self.again = list(things), {"same": things}


def test_held_bytes_are_of_storages_and_not_of_weights():
    module, base = nn.Linear(4, 4), torch.zeros(10)
    hook = Holder(base[:2], base[5:], torch.zeros(3, dtype=torch.float64), module.weight, module, print)
    module._diffusers_hook = Holder()
    module._diffusers_hook.hooks = {"name": hook}
    assert held_bytes(module) == 40 + 24
    assert held_bytes(module, but=(base,)) == 24


def test_peak_memory_is_weights_and_what_is_gone_again():
    weights = nn.Linear(8, 8, bias=False)  # 256 bytes
    with PeakMemory(torch.device("cpu"), [weights, nn.ModuleList([weights])]) as nothing:
        pass
    with PeakMemory(torch.device("cpu"), [weights]) as peak:
        for _ in range(3):
            weights(torch.ones(10, 8))  # 320 bytes in, 320 out
    assert (nothing.bytes, peak.bytes) == (256, 256 + 640)
