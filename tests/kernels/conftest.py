"""Kernel tests run on the GPU if there is one, else in Triton's interpreter, with uninitialised memory poisoned."""

import importlib
import pkgutil

import pytest
import torch

import vidaccel.kernels

triton = pytest.importorskip("triton", reason="the fused kernels need Triton: pip install vidaccel[gpu]")


@pytest.fixture(autouse=True, scope="session")
def first_configuration():
    """One configuration a kernel: tuning each of the tests' shapes on a GPU would take longer than the tests."""
    for op in pkgutil.iter_modules(vidaccel.kernels.__path__):
        for kernel in vars(importlib.import_module(f"vidaccel.kernels.{op.name}.fused")).values() if op.ispkg else ():
            if isinstance(kernel, triton.runtime.Autotuner):
                kernel.configs = kernel.configs[:1]


@pytest.fixture(autouse=True)
def poisoned_memory():
    """torch.empty returns NaN, so that an element which a kernel forgets to write is seen."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)
