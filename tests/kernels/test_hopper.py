import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_every_kernel_compiles_for_an_h200_without_spilling():
    """In a process of its own: this one may be under Triton's interpreter."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    listing = subprocess.run(
        [sys.executable, "-m", "tests.kernels.hopper", "--first"],
        cwd=Path(__file__).parents[2],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert listing.returncode == 0, listing.stderr[-2000:]
    lines = listing.stdout.splitlines()
    assert {line.split()[0] for line in lines} == {
        "adaln",
        "gated_residual_adaln",
        "qk_norm_rope",
        "attention_jvp",
        "quantize_rows",
    }
    assert all(" 0 spilled" in line for line in lines), listing.stdout
    assert all(("copy engine" in line) == ("'DESCRIBED': True" in line) for line in lines), listing.stdout
    assert any("copy engine" in line for line in lines)
