"""vidaccel: make video diffusion transformers an order of magnitude faster, and measure honestly what it cost."""

__version__ = "0.1.0"
