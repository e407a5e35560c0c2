import logging
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from vidaccel.errors import UserError
from vidaccel.kernels import select

CPU = torch.device("cpu")


def test_fused_without_triton_says_what_to_install(monkeypatch):
    monkeypatch.setattr(select, "HAVE_TRITON", False)
    with pytest.raises(UserError) as error:
        select.choose("fused", CPU)
    assert error.value.hint == "pip install vidaccel[gpu]"
    assert select.choose("auto", CPU) == "reference"


def test_fused_on_a_cpu_is_an_error_outside_the_interpreter(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(UserError, match='tensors are on "cpu"'):
        select.choose("fused", CPU)


def test_auto_on_a_cpu_is_the_reference_and_said_once(caplog):
    select._say_once.cache_clear()
    with caplog.at_level(logging.INFO, logger="vidaccel"):
        assert [select.choose("auto", CPU) for _ in range(3)] == ["reference"] * 3
    assert [record.message for record in caplog.records] == ["kernels: auto is reference on cpu"] or (
        len(caplog.records) == 1 and "CUDA" in caplog.records[0].message
    )


def test_an_unknown_choice_is_named():
    with pytest.raises(UserError, match='kernels="fusd"') as error:
        select.choose("fusd", CPU)
    assert error.value.hint == 'did you mean "fused"?'


def test_the_ops_are_there_without_triton():
    """They are defined when they are imported, and Triton is imported when a fused kernel first runs."""
    ops = ("adaln", "gated_residual_adaln", "qk_norm_rope", "attention_jvp")
    imports = "".join(f"import vidaccel.kernels.{op}.op; " for op in ops)
    code = f"import sys; sys.modules['triton'] = None; {imports}import torch; print(torch.ops.vidaccel.adaln.default)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.stdout.strip() == "vidaccel.adaln.default", done.stderr
