"""`attention=auto`: what is measured, which is taken. Backends that a CPU has stand in for those of a GPU."""

import logging

import pytest
import torch
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry

from vidaccel.config.benchmark import BenchmarkConfig
from vidaccel.config.generate import GenerateConfig
from vidaccel.config.parallel import ParallelConfig
from vidaccel.config.runtime import RuntimeConfig
from vidaccel.errors import UserError
from vidaccel.models.loading import load_pipeline
from vidaccel.runtime import attention, prepare
from vidaccel.runtime.attention import Attention, Measured, fastest, measured
from vidaccel.session import session

CUDA = torch.device("cuda")


@pytest.fixture(autouse=True)
def measured_anew():
    measured.cache_clear()
    yield
    measured.cache_clear()


def test_candidates_are_backends_of_diffusers_and_those_with_a_mask_take_one():
    assert {backend.value for backend in AttentionBackendName} >= set(attention.CANDIDATES)
    assert attention.TAKE_A_MASK <= prepare.MASKED_ATTENTION
    assert set(attention.CANDIDATES) - attention.TAKE_A_MASK <= {"_native_flash", "flash", "_flash_3", "sage"}


def test_every_backend_that_is_there_is_timed_and_held_against_pytorchs(monkeypatch):
    monkeypatch.setattr(attention, "CANDIDATES", ("native", "_native_math", "_flash_3", "sage", "_native_flash"))
    clock = iter([3.0, 9.0, 2.0, 1.0, 4.0, 1.5])
    monkeypatch.setattr(attention, "_timed", lambda *given: next(clock))
    registry = _AttentionBackendRegistry._backends

    def off(query, key, value, **_):
        return 1.1 * registry[AttentionBackendName.NATIVE](query, key, value)

    monkeypatch.setitem(registry, AttentionBackendName._NATIVE_MATH, off)
    given = Attention(6, 2, 8, torch.float32, False)  # in a type that flash attention does not take
    found = measured(given, torch.device("cpu"))
    assert list(found) == ["native", "_native_math"]
    assert found["native"] == (3.0, 0.0)
    assert found["_native_math"] == (1.5, pytest.approx(0.1, rel=1e-3))
    assert measured(given, torch.device("cpu")) is found  # once a shape


def test_with_a_mask_those_that_take_one_alone(monkeypatch):
    monkeypatch.setattr(attention, "_timed", lambda *given: 1.0)
    assert list(measured(Attention(200, 2, 8, torch.float32, True), torch.device("cpu"))) == ["native"]


def test_the_fastest_of_the_exact_ones_is_taken_and_said(monkeypatch, caplog):
    rows = {"native": Measured(2.0, 0.0), "_native_cudnn": Measured(1.0, 0.003), "sage": Measured(0.5, 0.05)}
    monkeypatch.setattr(attention, "measured", lambda given, device: rows)
    given = Attention(64, 2, 8, torch.bfloat16, False)
    with caplog.at_level(logging.INFO, logger="vidaccel"):
        assert fastest(given, CUDA) == "_native_cudnn"
    assert "attention=_native_cudnn, the fastest at 64 tokens: native 2e+03 ms" in caplog.text
    assert "too far off: sage" in caplog.text
    rows.clear()
    assert fastest(given, CUDA) == "native"
    rows["_native_cudnn"] = Measured(1.0, 0.0)
    caplog.clear()
    with caplog.at_level(logging.INFO, logger="vidaccel"):
        assert fastest(given, torch.device("cpu")) == "native"
    assert "attention: auto is native on cpu" in caplog.text


def test_auto_is_asked_for_the_attention_of_the_video(saved, monkeypatch):
    asked = []

    def answer(given: Attention, device: torch.device) -> str:
        asked.append(given)
        return "_native_math"

    monkeypatch.setattr(prepare, "fastest", answer)
    loaded = load_pipeline(saved("hunyuan_video"))
    config = GenerateConfig(attention="auto", trim_text=True, num_frames=9, height=32, width=64)
    assert prepare.prepare(loaded, config)["attention"] == "_native_math"
    heads, width = (loaded.pipe.transformer.config[name] for name in ("num_attention_heads", "attention_head_dim"))
    assert asked == [Attention(3 * 2 * 4, heads, width, torch.float32, False)]
    processors = loaded.pipe.transformer.attn_processors.values()
    backends = {vars(each).get("_attention_backend") for each in processors}
    assert backends - {None} == {AttentionBackendName._NATIVE_MATH}
    prepare.prepare(load_pipeline(saved("hunyuan_video")), RuntimeConfig(attention="auto"))
    assert asked[1].masked
    several = BenchmarkConfig(attention="auto", sizes=[[5, 32, 32], [9, 32, 64]])
    prepare.prepare(load_pipeline(saved("hunyuan_video")), several)
    assert asked[2].N == asked[0].N  # of the videos that are made, the largest


def test_a_video_on_several_devices_names_its_backend():
    config = GenerateConfig(attention="auto", parallel=ParallelConfig(ulysses=2))
    with pytest.raises(UserError, match="attention=auto came with a video on several devices"), session(config, "cpu"):
        pass
