"""Private parts of accelerate."""

from torch import nn


def is_offloaded(module: nn.Module) -> bool:
    """Whether accelerate moves the module to its device for each call; the mark it leaves is all that tells."""
    return hasattr(module, "_hf_hook")
