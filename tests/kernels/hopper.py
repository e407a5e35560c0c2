"""Compiles every fused kernel for an H200 (sm_90) on a machine that may have no GPU, and prints what each costs.

The interpreter runs kernels as numpy and never sees Triton's type checks, its register allocation or its shared memory.
This does: the launch functions of each fused.py run on meta tensors of HunyuanVideo's sizes with the launch itself
replaced by the compiler. `python -m tests.kernels.hopper [--first] [op ...]`, outside the interpreter, prints registers
a thread, bytes of them spilled, shared memory, and whether the copy engine is used; --first takes the first
configuration of each kernel alone, and the first with tensor descriptors.
"""

import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import __file__ as nvidia_backend
from triton.compiler import ASTSource

H200 = GPUTarget("cuda", 90, 32)
POINTERS = {
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.uint8: "*u8",
    torch.float8_e4m3fn: "*fp8e4nv",
}


class Recorder:
    """Stands where a kernel stood: `kernel[grid](...)` notes the arguments and launches nothing."""

    def __init__(self, kernel):
        self.autotuned = isinstance(kernel, triton.runtime.Autotuner)
        self.kernel = kernel.fn if self.autotuned else kernel
        self.configs = kernel.configs if self.autotuned else None
        self.calls: list[tuple[tuple, dict]] = []

    def __getitem__(self, grid):
        return lambda *args, **kwargs: self.calls.append((args, kwargs))


def record(module: ModuleType, launch: Callable[[ModuleType], None]) -> list[Recorder]:
    """The kernels of a fused.py, with the arguments that `launch` gave them."""
    kernels = {
        name: kernel
        for name, kernel in vars(module).items()
        if isinstance(kernel, triton.runtime.Autotuner | triton.runtime.JITFunction)
    }
    recorders = {name: Recorder(kernel) for name, kernel in kernels.items()}
    vars(module).update(recorders)
    launch(module)
    vars(module).update(kernels)
    return [recorder for recorder in recorders.values() if recorder.calls]


def compile_for_hopper(recorder: Recorder) -> Iterator[tuple[str, dict, "triton.compiler.CompiledKernel"]]:
    """Every configuration of every recorded call: name, configuration, compiled kernel."""
    for args, kwargs in recorder.calls:
        launch = {key: kwargs[key] for key in ("num_warps", "num_stages") if key in kwargs}
        constants = {key: value for key, value in kwargs.items() if key not in launch}
        configs = [c.kwargs | {"num_warps": c.num_warps, "num_stages": c.num_stages} for c in recorder.configs or ()]
        for config in configs or [launch]:
            options = {key: value for key, value in config.items() if key in ("num_warps", "num_stages")}
            tile = {key: value for key, value in config.items() if key not in options}
            source = _source(recorder.kernel, args, constants | tile)
            yield recorder.kernel.__name__, config, triton.compile(source, target=H200, options=options)


def _source(kernel, args: tuple, constants: dict) -> ASTSource:
    """The specialisation that a launch with these arguments would compile: pointers and multiples of 16 are aligned."""
    signature, attributes = {}, {}
    constants = {key: getattr(value, "value", value) for key, value in constants.items()}
    # What follows the arguments of a launch are the constants.
    for index, (name, value) in enumerate(zip(kernel.arg_names, args, strict=False)):
        if isinstance(value, Tensor):
            signature[name] = POINTERS[value.dtype]
        elif isinstance(value, float):
            signature[name] = "fp32"
        elif value == 1:
            signature[name], constants[name] = "constexpr", 1
        else:
            signature[name] = "i32"
        if isinstance(value, Tensor) or (isinstance(value, int) and value % 16 == 0):
            attributes[(index,)] = [["tt.divisibility", 16]]
    signature |= dict.fromkeys(constants, "constexpr")
    signature = {name: signature[name] for name in kernel.arg_names}
    indexed = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    return ASTSource(kernel, signature, indexed, attributes)


def resources(compiled) -> tuple[int, int, float]:
    """Registers a thread, bytes spilled a thread, KiB of shared memory a block."""
    tool = Path(nvidia_backend).parent / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        usage = subprocess.run([tool, "--dump-resource-usage", cubin.name], capture_output=True, text=True, check=True)
    registers, stack = (int(re.search(rf"{key}:(\d+)", usage.stdout)[1]) for key in ("REG", "STACK"))
    return registers, stack, compiled.metadata.shared / 1024


def cases() -> dict[str, Callable[[ModuleType], None]]:
    """Op -> a call of every launch function of its fused.py, at HunyuanVideo's widths in bf16."""
    B, N, H, D = 2, 4096, 24, 128
    W = H * D

    def empty(*shape, dtype=torch.bfloat16):
        return torch.empty(shape, dtype=dtype, device="meta")

    x, vector, statistic = empty(B, N, W), empty(B, W), empty(B, N, dtype=torch.float32)

    def adaln(fused):
        fused.forward(x, vector, vector, 1e-6)
        fused.rows(x, vector, vector, 1e-6)
        fused.tangent((x, vector, vector), (x, vector, vector), 1e-6)
        fused.backward(x, x, vector, statistic, statistic)

    def gated_residual_adaln(fused):
        fused.forward(x, x, vector, vector, vector, 1e-6)
        fused.rows(x, x, vector, vector, vector, 1e-6)
        fused.tangent((x, x, vector, vector, vector), (x, x, vector, vector, vector), 1e-6)

    def attention_jvp(fused):
        q = empty(B, N, H, D).transpose(1, 2)
        mask = torch.empty(B, N, dtype=torch.bool, device="meta")[:, None, None, :].expand(B, H, N, N)
        fused.attention_jvp(q, q, q, q, q, q, None, D**-0.5)
        fused.attention_jvp(q, q, q, q, q, q, mask, D**-0.5)

    def qk_norm_rope(fused):
        q, angle = empty(B, N, H, D), empty(N, D, dtype=torch.float32)
        for weight in (empty(D), empty(W)):
            fused.forward([(q, q, weight, weight)], angle, angle, 1e-6)
            fused.tangent([(q, q, q, q, weight, weight)], angle, angle, 1e-6)

    def quantize_rows(fused):
        fused.quantize(empty(N, W), None, False)
        fused.quantize(empty(N, 4 * W), empty(N, W), True)

    ops = (adaln, gated_residual_adaln, qk_norm_rope, attention_jvp, quantize_rows)
    return {op.__name__: op for op in ops}


def main(words: list[str]) -> None:
    launches = cases()
    first_only = "--first" in words
    for op in [word for word in words if word != "--first"] or launches:
        module = __import__(f"vidaccel.kernels.{op}.fused", fromlist=["fused"])
        for recorder in record(module, launches[op]):
            if first_only and recorder.configs:
                kinds = {config.kwargs.get("DESCRIBED", False): config for config in reversed(recorder.configs)}
                recorder.configs = list(kinds.values())
            for name, config, compiled in compile_for_hopper(recorder):
                registers, spilled, shared = resources(compiled)
                engine = "copy engine" if "cp.async.bulk.tensor" in compiled.asm["ptx"] else ""
                print(
                    f"{op:22}{name:12}{registers:4} registers {spilled:5} spilled {shared:6.1f} KiB  "
                    f"{engine:12}{config}"
                )


if __name__ == "__main__":
    main(sys.argv[1:])
