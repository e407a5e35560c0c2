"""Triton reads TRITON_INTERPRET when it is first imported, and diffusers imports it: so it is set before all tests."""

import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
