"""Compiled blocks: the graphs that are made, who shares them, and what goes past them. No code is generated here."""

import copy

import pytest
import torch
from torch._dynamo.utils import counters
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from tests.runtime.test_fuse import CASES, hunyuan_video, hunyuan_video_15, hunyuan_video_inputs, wan, wan_inputs
from tests.runtime.test_fuse import run as call
from vidaccel.cache.trunk import Trunk
from vidaccel.errors import UserError
from vidaccel.families.registry import FAMILIES
from vidaccel.forecasters.learned import new_predictor
from vidaccel.kernels import select
from vidaccel.runtime import compiled
from vidaccel.runtime.compiled import CompiledForward, compile_blocks
from vidaccel.runtime.fuse import fuse
from vidaccel.runtime.text_padding import trim_text

BY_CLASS = {family.transformer: family for family in FAMILIES.values() if not family.conditions}
GRAPHS = {hunyuan_video: 3, hunyuan_video_15: 1, wan: 1}
"""One a kind of block, but the first of HunyuanVideo's single-stream blocks gets whole tensors, the others slices."""


@pytest.fixture(autouse=True)
def traced_only(monkeypatch):
    monkeypatch.setattr(compiled, "BACKEND", "eager")
    torch._dynamo.reset()
    counters.clear()


def graphs() -> int:
    return counters["stats"]["unique_graphs"]


def compile_model(model, **options):
    family = BY_CLASS[type(model).__name__]
    compile_blocks(model, family, **options)
    return family


@pytest.mark.parametrize(
    ("case", "fused"),
    [
        ("hunyuan-video, one text", True),
        ("hunyuan-video-1.5, one text", False),
        ("hunyuan-video-1.5, one text", True),
        ("wan", False),
        ("wan", True),
    ],
)
def test_all_blocks_of_a_kind_share_a_graph(case, fused):
    make, inputs = CASES[case]
    model = make()
    if fused:
        fuse(model, "reference")
    with torch.no_grad():
        expected = call(model, inputs)
        compile_model(model)
        assert torch.equal(call(model, inputs), expected)
        assert graphs() == GRAPHS[make]
        with torch._dynamo.config.patch(error_on_recompile=True):
            assert torch.equal(call(model, inputs), expected)


def test_full_and_predicted_steps_go_from_graph_to_graph():
    model, inputs = hunyuan_video(), hunyuan_video_inputs((5,))
    family = compile_model(model)

    def passes():
        with trunk.full(0.6):
            full = call(model, inputs)
        with trunk.predicted(predictor, 0.5):
            return full, call(model, inputs)

    with torch.no_grad(), Trunk(model, family) as trunk:
        with trunk.full():
            call(model, inputs)
        tokens = trunk.memory()[0].tokens
        predictor = new_predictor(model, family, tokens, tokens, blocks=2)
        expected = passes()
        assert graphs() == GRAPHS[hunyuan_video]
        predictor.run_like(model)
        assert [block.forward for block in predictor.blocks] == [block.compiled for block in predictor.blocks]
        assert all(map(torch.equal, passes(), expected))
        assert graphs() == GRAPHS[hunyuan_video] + 1  # what leaves the fusion lies in memory unlike any block's tokens
        with torch._dynamo.config.patch(error_on_recompile=True):
            assert all(map(torch.equal, passes(), expected))


def test_texts_of_any_length_share_graphs_where_they_are_cut():
    model = hunyuan_video()
    del model.single_transformer_blocks[:]
    family = BY_CLASS[type(model).__name__]
    trim_text(model, family)
    compile_blocks(model, family, dynamic=None)
    with torch.no_grad():
        for length in (5, 6):
            call(model, hunyuan_video_inputs((length,)))
        with torch._dynamo.config.patch(error_on_recompile=True):
            for length in (3, 8):
                call(model, hunyuan_video_inputs((length,)))


def test_a_copy_runs_its_own_weights():
    model, inputs = wan(), wan_inputs()
    compile_model(model)
    double = copy.deepcopy(model)
    with torch.no_grad():
        assert torch.equal(call(double, inputs), call(model, inputs))
        for block in double.blocks:
            block.attn1.to_q.weight.zero_()
        assert not torch.equal(call(double, inputs), call(model, inputs))
        stock = wan()
        assert torch.equal(call(stock, inputs), call(model, inputs))


def test_a_derivative_pass_goes_past_the_compiler():
    model, inputs = wan(), wan_inputs()
    x = inputs["hidden_states"]

    def derivative():
        with torch.no_grad(), forward_ad.dual_level(), sdpa_kernel(SDPBackend.MATH):
            return forward_ad.unpack_dual(call(model, inputs | {"hidden_states": forward_ad.make_dual(x, x)}))

    expected = derivative()
    compile_model(model)
    got = derivative()
    assert graphs() == 0
    assert torch.equal(got.primal, expected.primal) and torch.equal(got.tangent, expected.tangent)


def test_gradients_reach_the_weights():
    model, inputs = wan(), wan_inputs()

    def gradient():
        model.zero_grad()
        call(model, inputs).square().mean().backward()
        return model.blocks[0].ffn.net[2].weight.grad.clone()

    expected = gradient()
    compile_model(model)
    torch.testing.assert_close(gradient(), expected)


def test_only_what_a_cache_keeps_is_copied_out_of_cuda_graphs():
    block = torch.nn.Identity()
    x = torch.ones(2)
    with torch.no_grad():
        for graphs_, kept, copied in ((True, True, True), (True, False, False), (False, True, False)):
            output = CompiledForward(block, dynamic=False, graphs=graphs_, kept=kept)(x)
            assert (output.data_ptr() != x.data_ptr()) == copied


def test_hooked_blocks_are_refused():
    model = wan()
    family = BY_CLASS[type(model).__name__]
    with Trunk(model, family), pytest.raises(UserError, match="hooked or compiled already"):
        compile_blocks(model, family)
    compile_blocks(model, family)
    with pytest.raises(UserError, match="hooked or compiled already"):
        compile_blocks(model, family)
    with pytest.raises(UserError, match="already carry hooks"):
        fuse(model, "reference")


def test_it_can_be_undone():
    model = wan()
    before = {name: set(vars(module)) for name, module in model.named_modules()}
    undo = compile_blocks(model, BY_CLASS[type(model).__name__])
    assert {name: set(vars(module)) for name, module in model.named_modules()} != before
    undo()
    assert {name: set(vars(module)) for name, module in model.named_modules()} == before


@pytest.mark.parametrize("own_limit", [compiled.HAS_OWN_LIMIT, False])
def test_the_limit_of_graphs_is_the_users_again_when_it_is_undone(own_limit, monkeypatch):
    """More sizes than torch.compile has graphs for by itself."""
    monkeypatch.setattr(compiled, "HAS_OWN_LIMIT", own_limit)
    model, inputs = wan(), wan_inputs()
    with torch._dynamo.config.patch(recompile_limit=2):
        undo = compile_blocks(model, BY_CLASS[type(model).__name__])
        assert torch._dynamo.config.recompile_limit == (2 if own_limit else compiled.RECOMPILE_LIMIT)
        with torch.no_grad():
            for length in (4, 5, 6, 7):
                call(model, inputs | {"encoder_hidden_states": inputs["encoder_hidden_states"][:, :length]})
        assert graphs() == 4
        undo()
        assert torch._dynamo.config.recompile_limit == 2


def test_a_missing_compiler_is_said(monkeypatch):
    monkeypatch.setattr(select, "HAVE_TRITON", False)
    with pytest.raises(UserError, match="Triton is not installed"):
        compiled.check_compiler(torch.device("cuda"))
    monkeypatch.setattr(compiled, "BACKEND", "inductor")
    monkeypatch.setattr("torch._inductor.config.cpp.cxx", ("nowhere-to-be-found",))
    with pytest.raises(UserError, match="needs a C\\+\\+ compiler"):
        compiled.check_compiler(torch.device("cpu"))
