"""How the model is run, in every command that runs one (runtime/prepare.py)."""

from dataclasses import dataclass

from vidaccel.config.checks import require

DECODE = ("auto", "tiled", "whole", "once")


@dataclass
class RuntimeConfig:
    """How the model is run, in every command that runs one (runtime/prepare.py). By default it is the stock one."""

    kernels: str = "reference"
    """Norms, modulation and rotary embedding of the blocks: `reference` (as diffusers writes them), `fused` (Triton) or
    `auto` (fused on a CUDA device)."""
    attention: str = "native"
    """diffusers' attention backend: `native`, `flash`, `sage`, `flash_hub`, ..., or `auto` (on a CUDA device the
    fastest of those that are there and as exact as PyTorch's own, by a short measurement when the model is loaded)."""
    trim_text: bool = False
    """Cut text padding off and drop its mask where a batch allows, which lets flash attention run; changes rounding."""
    quantize: str = "none"
    """Linear layers of the transformer's blocks, weights and activations: `none`, `fp8` (compute capability 8.9) or
    `int8` (torchao, for compile=true). Activations are brought to fp8 by Triton where there is Triton, whichever
    `kernels` says."""
    compile: bool = False
    """torch.compile each transformer block, with CUDA graphs on a CUDA device."""

    decode: str = "auto"
    """How latents become frames: `whole` (in space; in time as diffusers goes through it), `once` (in time too, or in
    chunks as long and tiles as few as there can be), `tiled` (the largest tiles that free memory allows, which blend,
    and which the devices of one video share), or `auto` (on a CUDA device whole where it fits, else tiled; on a CPU as
    the autoencoder is)."""

    def __post_init__(self) -> None:
        kernels, quantize = ("reference", "fused", "auto"), ("none", "int8", "fp8")
        require(self.kernels in kernels, "kernels", self.kernels, f"is one of {', '.join(kernels)}")
        require(self.decode in DECODE, "decode", self.decode, f"is one of {', '.join(DECODE)}")
        require(self.quantize in quantize, "quantize", self.quantize, f"is one of {', '.join(quantize)}")
