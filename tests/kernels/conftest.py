"""Kernel tests run on the GPU if there is one, else in Triton's interpreter, with uninitialised memory poisoned."""

import pytest
import torch

pytest.importorskip("triton", reason="the fused kernels need Triton: pip install vidaccel[gpu]")


@pytest.fixture(autouse=True)
def poisoned_memory():
    """torch.empty returns NaN, so that an element which a kernel forgets to write is seen."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)
