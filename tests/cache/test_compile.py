"""Compiled blocks under the hook: a fixed number of graphs, whole, made in the first generation."""

import pytest
import torch

import vidaccel
from tests.cache.test_attach import STEPS, call, predictor_for
from tests.tiny import TEXT_TO_VIDEO, tiny_pipeline

DEEPER = {"hunyuan_video": {"num_layers": 3, "num_single_layers": 4}}
"""As many kinds of place in the trunk as a real model has: a first, other and last block, of either list."""
GRAPHS = {"hunyuan_video": 7, "hunyuan_video_15": 5, "wan": 4}
"""Of a family that is not here only that no generation after the first makes more."""
DETACHED = ("hunyuan_video", "wan")
"""Whose blocks are called again without the hook, for which each is traced anew: with two lists, and with one."""


@pytest.mark.parametrize("name, history", [*((name, 1) for name in (*TEXT_TO_VIDEO, "wan_vace")), ("wan", 2)])
def test_compiled_blocks_have_static_graphs(name, history):
    """One more for a predictor of two full steps, which has had only one when it is first asked."""
    pipe = tiny_pipeline(name)
    config = {key: value for key, value in pipe.transformer.config.items() if not key.startswith("_")}
    torch.manual_seed(0)
    pipe.transformer = pipe.transformer.from_config(config | DEEPER.get(name, {"num_layers": 4})).eval()
    attached = {"predictor": predictor_for(pipe, history=history), "steps": STEPS, "full_steps": [0, 2]}
    plain = call(pipe)
    with vidaccel.attach(pipe, **attached):
        expected = call(pipe), call(pipe, "a green square", seed=1)
    torch._dynamo.reset()
    if pipe.transformer._repeated_blocks:
        pipe.transformer.compile_repeated_blocks(fullgraph=True, backend="eager")
    for block in [] if pipe.transformer._repeated_blocks else pipe.transformer.transformer_blocks:
        block.compile(fullgraph=True, backend="eager")  # as that does, which CogVideoX's class does not say of (0.42)
    with vidaccel.attach(pipe, **attached):
        before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        assert torch.equal(call(pipe), expected[0])
        graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"] - before
        assert graphs == (GRAPHS[name] + history - 1 if name in GRAPHS else graphs) > 0
        with torch._dynamo.config.patch(error_on_recompile=True):
            assert torch.equal(call(pipe), expected[0])
            assert torch.equal(call(pipe, "a green square", seed=1), expected[1])
    if name in DETACHED:
        assert torch.equal(call(pipe), plain)


def test_a_model_is_compiled_under_the_hook():
    """The text refiner with it, whose output a predicted step takes from the full one before."""
    pipe = tiny_pipeline("hunyuan_video")
    plain = call(pipe)
    with vidaccel.attach(pipe, predictor=predictor_for(pipe), steps=STEPS, full_steps=[0, 2]):
        expected = call(pipe)
        torch._dynamo.reset()
        pipe.transformer.compile_repeated_blocks(fullgraph=True, backend="eager")
        assert torch.equal(call(pipe), expected)
        with torch._dynamo.config.patch(error_on_recompile=True):
            assert torch.equal(call(pipe), expected)
    assert torch.equal(call(pipe), plain)  # compiled still
