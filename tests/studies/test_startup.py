"""Seconds to the first step: what is read, how much was cached before, and that all up to the first pass is in it."""

import pytest
from diffusers import HunyuanVideoTransformer3DModel

from studies import startup


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("startup") / "model"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(startup, "HEADS", 4)
        startup.written(folder, 0.02)
    return folder


def test_the_checkpoint_is_of_the_size_asked_for(model):
    transformer = HunyuanVideoTransformer3DModel.from_pretrained(model / "transformer")
    assert sum(2 * weight.numel() for weight in transformer.parameters()) == pytest.approx(20e6, rel=0.05)


def test_a_file_that_was_read_is_cached(model):
    files = sorted(model.rglob("*.safetensors"))
    startup.read(files)
    assert startup.cached(files) == 1
    assert 0 <= startup.made_cold(files) <= 1


def test_rows_hold_seconds_bytes_and_how_warm_it_was(model, monkeypatch):
    def in_this_process(folder):
        told = startup.loaded_from(folder)
        assert told["ended"] - told["began"] > told["session"] > 0
        whole = {"first_step": 9.0, "imports": 8.0}
        return whole | {
            "load": told["ended"] - told["began"],
            "load_cpu": told["cpu"],
            "peak_bytes": told["peak_bytes"],
        }

    monkeypatch.setattr(startup, "in_a_process", in_this_process)
    row = startup.measured(model, "warm", 1)
    assert row["ratio"] == pytest.approx(row["load"] / row["read"])
    assert row["load_cpu"] > row["read_cpu"] > 0
    assert row["bytes"] > 20e6 and row["peak_bytes"] > 20e6 and row["cached"] == 1
    assert "9.0 s from the command, imports 8.0" in startup.line("warm", row)


def test_the_block_ends_when_the_transformer_is_called(model):
    transformer = HunyuanVideoTransformer3DModel.from_pretrained(model / "transformer")
    after = []
    with startup.stopping_at(transformer):
        transformer(None)
        after.append("not reached")
    assert not after and not transformer._forward_pre_hooks
