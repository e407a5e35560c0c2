"""Each private part of diffusers that is used, by its name: what fails here has moved in an upgrade."""

import sys

import pytest
import torch
from diffusers import ContextParallelConfig, WanImageToVideoPipeline, WanPipeline
from diffusers.hooks import HookRegistry, ModelHook
from diffusers.hooks.hooks import BaseState, StateManager

from tests.tiny import tiny_pipeline
from vidaccel.compat import diffusers as compat


def test_do_without_ftfy_takes_prompts_as_they_are(monkeypatch):
    """Of the pipeline that calls it all the same; the other does without by itself."""
    mended, own = (sys.modules[cls.__module__] for cls in (WanImageToVideoPipeline, WanPipeline))
    for module in (mended, own):
        monkeypatch.delattr(module, "ftfy", raising=False)
        monkeypatch.setattr(module, "is_ftfy_available", lambda: False)
    with pytest.raises(NameError, match="ftfy"):
        mended.prompt_clean("a")
    for cls in (WanImageToVideoPipeline, WanPipeline):
        compat.do_without_ftfy(cls)
    assert mended.prompt_clean(" a  cat ") == own.prompt_clean(" a  cat ") == "a cat"
    assert not hasattr(own, "ftfy")


@pytest.fixture
def pipe():
    return tiny_pipeline("wan")


def test_hook_registry_and_remove_hook_registry():
    module = torch.nn.Linear(1, 1)
    before = set(vars(module))
    assert compat.hook_registry(module) is None
    registry = HookRegistry.check_if_exists_or_initialize(module)
    assert compat.hook_registry(module) is registry
    compat.remove_hook_registry(module)
    assert compat.hook_registry(module) is None and set(vars(module)) == before


class Told(ModelHook):
    def __init__(self, stateful):
        super().__init__()
        self.manager = StateManager(BaseState)
        compat.set_stateful(self, stateful)


@pytest.mark.parametrize("stateful", [True, False])
def test_set_stateful_is_what_cache_context_goes_by(pipe, stateful):
    hook = Told(stateful)
    HookRegistry.check_if_exists_or_initialize(pipe.transformer.blocks[0]).register_hook(hook, "told")
    with pipe.transformer.cache_context("cond"):
        assert stateful == _has_context(hook)


def test_forget_listed_hooks_lets_cache_context_find_new_ones(pipe):
    with pipe.transformer.cache_context("cond"):
        pass  # by now it has listed the hooked modules, of which there are none
    hook = Told(True)
    HookRegistry.check_if_exists_or_initialize(pipe.transformer.blocks[0]).register_hook(hook, "told")
    compat.forget_listed_hooks(pipe.transformer)
    with pipe.transformer.cache_context("cond"):
        assert _has_context(hook)
    compat.forget_listed_hooks(torch.nn.Linear(1, 1))  # has no hooks, and gets no registry
    assert compat.hook_registry(torch.nn.Linear(1, 1)) is None


def _has_context(hook: Told) -> bool:
    try:
        return hook.manager.context.name == "cond"
    except ValueError:
        return False


def test_hook_states(pipe):
    class State(BaseState):
        pass

    hook = Told(True)
    hook.manager = StateManager(State)
    HookRegistry.check_if_exists_or_initialize(pipe.transformer.blocks[0]).register_hook(hook, "told")
    compat.forget_listed_hooks(pipe.transformer)
    states = []
    for name in ("cond", "uncond"):
        with pipe.transformer.cache_context(name):
            states.append(hook.manager.get_state())
    assert list(compat.hook_states(hook.manager).values()) == states


def test_execution_device(pipe):
    assert compat.execution_device(pipe) == torch.device("cpu")
    pipe.transformer.to("meta")
    assert compat.execution_device(pipe.to("meta")) == torch.device("meta")


def test_float32_modules(pipe):
    assert compat.float32_modules(pipe.transformer) == {
        *("rope", "time_embedder", "scale_shift_table", "norm1", "norm2", "norm3")
    }
    assert compat.float32_modules(tiny_pipeline("hunyuan_video").transformer) == set()


def test_built_with(pipe):
    built = compat.built_with(pipe.transformer.config)
    assert built and built.keys() < pipe.transformer.config.keys()
    assert compat.built_with(type(pipe.transformer)(**built).config) == built


def test_can_checkpoint(pipe):
    assert compat.can_checkpoint(pipe.transformer)
    assert not compat.can_checkpoint(torch.nn.Linear(1, 1))


def test_set_checkpointing_is_what_the_blocks_are_called_through(pipe):
    transformer, called = pipe.transformer.train(), []
    transformer.enable_gradient_checkpointing()
    inner = compat.checkpointing(transformer)

    def counting(block, *arguments):
        called.append(block)
        return inner(block, *arguments)

    compat.set_checkpointing(transformer, counting)
    latents = torch.randn(1, transformer.config.in_channels, 2, 4, 4, requires_grad=True)
    text = torch.randn(1, 4, transformer.config.text_dim)
    transformer(latents, torch.tensor([500]), text)
    assert called == list(transformer.blocks)


def test_set_process_attention():
    before = compat.process_attention()
    assert before == "native"
    try:
        compat.set_process_attention("_native_math")
        assert compat.process_attention() == "_native_math"
    finally:
        compat.set_process_attention(before)


def test_check_attention_backend():
    compat.check_attention_backend("native")
    with pytest.raises(RuntimeError):
        compat.check_attention_backend("sage")  # which is not installed here


def test_attention_constraints():
    half, single = (torch.empty(1, 1, 1, 8, dtype=dtype) for dtype in (torch.float16, torch.float32))

    def check(name, probe):
        for fits in compat.attention_constraints(name):
            fits(query=probe, key=probe, value=probe, attn_mask=None, is_causal=False)

    check("native", single)
    with pytest.raises(ValueError):
        check("flash", single)
    check("flash", half)


def test_attention_backends_are_what_attention_goes_through(monkeypatch):
    from diffusers.models.attention_dispatch import dispatch_attention_fn

    called = []
    for name, attend in list(compat.attention_backends().items()):
        monkeypatch.setitem(
            compat.attention_backends(),
            name,
            lambda name=name, attend=attend, **given: called.append(name.value) or attend(**given),
        )
    query = torch.randn(1, 3, 2, 8)
    dispatch_attention_fn(query, query, query)
    assert called == ["native"]


def test_enable_context_parallel_counts_one_device_where_there_is_no_accelerator(tmp_path, pipe):
    """A CPU's models raise ZeroDivisionError without; once they do not, it can go."""
    from torch import distributed as dist

    count = torch.accelerator.device_count
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'meeting'}", rank=0, world_size=1)
    try:
        config = ContextParallelConfig(ulysses_degree=2)
        if not count():
            with pytest.raises(ZeroDivisionError):
                pipe.transformer.enable_parallelism(config=config)
        with pytest.raises(RuntimeError, match="(?i)mesh"):  # of two, in one process: it came as far as that
            compat.enable_context_parallel(pipe.transformer, config, None)
    finally:
        dist.destroy_process_group()
    assert torch.accelerator.device_count is count


def test_parallel_of_and_set_parallel(pipe):
    attention = pipe.transformer.blocks[0].attn1
    assert compat.parallel_of(attention.processor) is None and compat.parallel_of(object()) is None
    compat.set_parallel(attention.processor, "how")
    assert compat.parallel_of(attention.processor) == "how"
    assert "_parallel_config" in vars(type(attention.processor)), "diffusers keeps it elsewhere"
