"""How a model is run, on tiny pipelines: what each setting changes, that the default changes nothing, refusals."""

import importlib.util
import logging

import pytest
import torch
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry
from torch import nn

from tests.students import student
from tests.tiny import HUNYUAN_CALL, SIZE, TEXT_TO_VIDEO
from vidaccel.cache.trunk import Trunk
from vidaccel.config.runtime import RuntimeConfig
from vidaccel.errors import UserError
from vidaccel.families.registry import FAMILIES
from vidaccel.kernels import select
from vidaccel.models.calling import call_arguments
from vidaccel.models.loading import load_pipeline
from vidaccel.runtime import compiled
from vidaccel.runtime import prepare as runtime
from vidaccel.runtime.prepare import check, prepare
from vidaccel.runtime.quantized import quantize_blocks

CPU = torch.device("cpu")
EVERYTHING = {"kernels": "fused", "attention": "_native_math", "trim_text": True, "compile": True}


@pytest.fixture(autouse=True)
def traced_only(monkeypatch):
    monkeypatch.setattr(compiled, "BACKEND", "eager")
    torch._dynamo.reset()


def refused(call, *arguments) -> UserError:
    with pytest.raises(UserError) as caught:
        call(*arguments)
    assert "\n" not in caught.value.message and caught.value.hint
    return caught.value


def sampled(loaded) -> torch.Tensor:
    """Latents of a prompt after a step with guidance."""
    arguments = call_arguments(loaded, steps=1, **SIZE)
    if loaded.family.name == "hunyuan_video":
        arguments |= HUNYUAN_CALL
    noise = torch.Generator().manual_seed(0)
    return loaded.pipe("a red circle", output_type="latent", generator=noise, **arguments).frames


def state(transformer: nn.Module) -> dict:
    """Everything that a setting could have changed."""
    return {
        name: (
            type(module),
            set(vars(module)),
            vars(module).get("processor"),
            list(module._forward_pre_hooks) + list(module._forward_hooks),
        )
        for name, module in transformer.named_modules()
    }


@pytest.mark.parametrize("family", TEXT_TO_VIDEO)
def test_the_default_is_the_stock_model(saved, family):
    loaded = load_pipeline(saved(family))
    before = state(loaded.pipe.transformer)
    chosen = prepare(loaded, RuntimeConfig())
    assert state(loaded.pipe.transformer) == before
    assert chosen == {"kernels": "reference", "attention": "native", "trim_text": False} | {
        "quantize": "none",
        "compile": False,
        "decode": "auto",
    }


def test_auto_is_the_stock_model_on_a_cpu_and_says_so(saved, caplog):
    select._say_once.cache_clear()
    loaded = load_pipeline(saved("wan"))
    before = state(loaded.pipe.transformer)
    with caplog.at_level(logging.INFO, logger="vidaccel"):
        assert prepare(loaded, RuntimeConfig(kernels="auto"))["kernels"] == "reference"
    assert state(loaded.pipe.transformer) == before
    assert [record.message.split(" (")[0] for record in caplog.records] == ["kernels: auto is reference on cpu"]


def test_auto_is_the_stock_model_where_no_block_has_a_fused_form(saved, monkeypatch):
    monkeypatch.setattr(select, "choose", lambda kernels, device: "fused")  # as on a GPU
    assert prepare(load_pipeline(saved("ltx_video")), RuntimeConfig(kernels="auto"))["kernels"] == "reference"


def test_all_at_once_samples_the_same_video(saved):
    expected = sampled(load_pipeline(saved("wan")))
    loaded = load_pipeline(saved("wan"))
    assert prepare(loaded, RuntimeConfig(**EVERYTHING)) == EVERYTHING | {
        "quantize": "none",
        "trim_text": False,
        "decode": "auto",
    }
    block = loaded.pipe.transformer.blocks[0]
    assert type(block).__name__ == "FusedWanBlock" and block.compiled is block.forward
    torch.testing.assert_close(sampled(loaded), expected, rtol=1e-3, atol=1e-4)


def test_a_student_is_told_its_step_whatever_runs_it(tmp_path):
    folder = student(tmp_path, "hunyuan_video")
    expected = sampled(load_pipeline(folder))
    loaded = load_pipeline(folder)
    assert loaded.hook is not None and loaded.conditioning is not None
    prepare(loaded, RuntimeConfig(attention="_native_math", trim_text=True))
    torch.testing.assert_close(sampled(loaded), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("setting", [{"kernels": "fused"}, {"compile": True}])
def test_after_something_is_attached_it_is_too_late(saved, setting):
    loaded = load_pipeline(saved("wan"))
    with Trunk(loaded.pipe.transformer, loaded.family):
        assert "hook" in refused(prepare, loaded, RuntimeConfig(**setting)).message
    prepare(loaded, RuntimeConfig(**setting))


def test_kernels_that_are_not_there(saved, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert "CUDA device" in refused(check, RuntimeConfig(kernels="fused"), CPU).message


def test_names_of_attention_backends():
    assert refused(check, RuntimeConfig(attention="falsh"), CPU).hint == 'did you mean "flash"?'
    names = {backend.value for backend in AttentionBackendName}
    assert names >= runtime.MASKED_ATTENTION | runtime.CPU_ATTENTION
    if importlib.util.find_spec("flash_attn") is None:
        error = refused(check, RuntimeConfig(attention="flash"), CPU)
        assert "missing package" in error.message and "flash-attn" in error.message
    assert "CUDA" in refused(check, RuntimeConfig(attention="_native_cudnn"), CPU).message


@pytest.mark.parametrize("name", sorted(backend.value for backend in AttentionBackendName))
def test_which_backends_take_a_mask_is_what_diffusers_says(name):
    """Those that do not raise on one, with these words."""
    import inspect

    source = inspect.getsource(_AttentionBackendRegistry._backends[AttentionBackendName(name)])
    assert ("attn_mask` is not supported" in source) == (name not in runtime.MASKED_ATTENTION), source


def test_attention_is_dispatched_to_the_backend(saved):
    loaded = load_pipeline(saved("wan"))
    expected = sampled(loaded)
    prepare(loaded, RuntimeConfig(attention="_native_math"))
    processors = loaded.pipe.transformer.attn_processors.values()
    assert {processor._attention_backend for processor in processors} == {AttentionBackendName._NATIVE_MATH}
    assert _AttentionBackendRegistry._active_backend == AttentionBackendName.NATIVE  # of the next model
    torch.testing.assert_close(sampled(loaded), expected, rtol=1e-4, atol=1e-5)


def test_a_backend_that_cannot_run_the_model(saved):
    in_float32, in_bfloat16 = (load_pipeline(saved("hunyuan_video"), dtype=d) for d in ("float32", "bfloat16"))
    settings = RuntimeConfig(attention="_native_flash")
    error = refused(prepare, in_float32, settings)
    assert "bfloat16 or float16" in error.message and "dtype=bfloat16" in error.hint
    error = refused(prepare, in_bfloat16, settings)
    assert "takes no mask, and HunyuanVideo masks" in error.message and "trim_text=true" in error.hint
    prepare(in_bfloat16, RuntimeConfig(attention="_native_flash", trim_text=True))
    assert sampled(in_bfloat16).isfinite().all()


def test_a_family_without_masks_has_nothing_to_cut(saved, caplog):
    loaded = load_pipeline(saved("wan22"))
    before = state(loaded.pipe.transformer)
    with caplog.at_level(logging.INFO, logger="vidaccel"):
        assert not prepare(loaded, RuntimeConfig(trim_text=True))["trim_text"]
    assert state(loaded.pipe.transformer) == before
    assert caplog.text.count("Wan 2.2 A14B masks no text") == 1  # of two transformers


def test_quantisation_that_is_not_there(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert refused(check, RuntimeConfig(quantize="int8"), CPU).hint == "pip install vidaccel[quant]"
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    assert "needs a CUDA device" in refused(check, RuntimeConfig(quantize="fp8"), CPU).message
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    error = refused(check, RuntimeConfig(quantize="fp8"), torch.device("cuda"))
    assert "8.9, and this GPU has 8.6" in error.message and "int8" in error.hint
    check(RuntimeConfig(quantize="int8"), torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    check(RuntimeConfig(quantize="fp8"), torch.device("cuda"))  # which needs no other package


@pytest.mark.parametrize(("kernels", "quantising"), [("reference", "auto"), ("fused", "fused"), ("auto", "auto")])
def test_fp8_quantises_by_what_is_fastest_unless_fused_is_asked_for(saved, monkeypatch, kernels, quantising):
    told = []
    monkeypatch.setattr(runtime, "check", lambda config, device: None)
    monkeypatch.setattr(runtime, "quantize_blocks", lambda *arguments: told.append(arguments[2:]))
    prepare(load_pipeline(saved("wan"), dtype="bfloat16"), RuntimeConfig(quantize="fp8", kernels=kernels))
    assert told == [("fp8", quantising)]


def test_fp8_goes_with_bfloat16(saved, monkeypatch):
    monkeypatch.setattr(runtime, "check", lambda config, device: None)
    error = refused(prepare, load_pipeline(saved("wan")), RuntimeConfig(quantize="fp8"))
    assert "bfloat16" in error.message and error.hint == "set dtype=bfloat16"


@pytest.mark.parametrize("family", TEXT_TO_VIDEO)
def test_int8_is_for_the_linear_layers_that_tokens_go_through(saved, family):
    pytest.importorskip("torchao", reason="the extra `quant` is not installed")
    loaded = load_pipeline(saved(family))
    transformer = loaded.pipe.transformer
    quiet = {name: module.weight for name, module in transformer.named_modules() if isinstance(module, nn.Linear)}
    taken = quantize_blocks(transformer, loaded.family, "int8")
    changed = {name for name, weight in quiet.items() if transformer.get_submodule(name).weight is not weight}
    assert changed == set(taken) and taken
    lists = tuple(f"{kind.name}." for kind in loaded.family.block_lists)
    assert all(name.startswith(lists) and "norm" not in name for name in taken)
    # Of widths that 8 divides, only modulation stays.
    left = {name for name in quiet if name.startswith(lists)} - changed
    sides = {name: quiet[name].shape for name in left if "norm" not in name}
    assert all(any(side % 8 for side in shape) for shape in sides.values()), sides


def test_an_int8_model_makes_nearly_the_same_video(saved):
    pytest.importorskip("torchao", reason="the extra `quant` is not installed")
    expected = sampled(load_pipeline(saved("wan")))
    loaded = load_pipeline(saved("wan"))
    prepare(loaded, RuntimeConfig(quantize="int8", compile=True))
    difference = (sampled(loaded) - expected).norm() / expected.norm()
    assert 1e-4 < difference < 0.05


def test_a_model_too_narrow_to_quantise(saved):
    transformer = load_pipeline(saved("wan")).pipe.transformer
    assert "multiples of 16" in refused(quantize_blocks, transformer, FAMILIES["wan"], "fp8").message
