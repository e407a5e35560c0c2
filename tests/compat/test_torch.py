"""Each private part of PyTorch that is used, by its name: what fails here has moved in an upgrade."""

import shutil
from copy import deepcopy

import pytest
import torch
from torch import nn
from torch.utils import flop_counter

from vidaccel.compat import torch as compat


def test_forward_hooks_and_forward_pre_hooks():
    module = nn.Linear(2, 2)
    hook, pre_hook = lambda *_: None, lambda *_: None
    handles = module.register_forward_hook(hook), module.register_forward_pre_hook(pre_hook)
    assert list(compat.forward_hooks(module).values()) == [hook]
    assert list(compat.forward_pre_hooks(module).values()) == [pre_hook]
    compat.forward_hooks(module).clear()
    handles[1].remove()
    assert not compat.forward_hooks(module) and not compat.forward_pre_hooks(module)


def test_set_compiled_call_stands_in_for_the_module_and_its_hooks():
    module, x = nn.Linear(2, 2), torch.ones(1, 2)
    calls = []
    module.register_forward_hook(lambda *_: calls.append("hook"))
    expected = module(x)
    compat.set_compiled_call(module, lambda given: given + 1)
    assert torch.equal(module(x), x + 1) and compat.compiled_call(module) is not None and calls == ["hook"]
    assert torch.equal(compat.call_of(module)(x), expected) and calls == ["hook", "hook"]
    before = set(vars(module)) - {"_compiled_call_impl"}
    compat.set_compiled_call(module, None)
    assert compat.compiled_call(module) is None and set(vars(module)) == before
    assert torch.equal(module(x), expected)


def test_uncompiled_is_what_was_compiled():
    module = nn.Linear(2, 2)
    assert compat.uncompiled(torch.compile(module)) is module and compat.uncompiled(module) is module


def test_compiled_call_is_what_compile_sets():
    module = nn.Linear(2, 2)
    assert compat.compiled_call(module) is None
    module.compile(backend="eager")
    assert compat.compiled_call(module) is not None


@pytest.mark.parametrize("cast", [lambda m: m.half(), lambda m: m.to(torch.bfloat16), lambda m: m.double()])
def test_keeps_float32(cast):
    class Kept(compat.KeepsFloat32):
        def __init__(self):
            super().__init__()
            self.register_buffer("mean", torch.full((2,), 1 / 3))

    outer = nn.Sequential(Kept(), nn.Linear(2, 2))
    cast(outer)
    assert outer[0].mean.dtype == torch.float32 and torch.equal(outer[0].mean, torch.full((2,), 1 / 3))
    assert outer[1].weight.dtype != torch.float32
    assert outer.to("meta")[0].mean.is_meta


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_storage_key(device):
    first, second = torch.empty(4, device=device), torch.empty(4, device=device)
    key = compat.storage_key(first.untyped_storage())
    assert key == compat.storage_key(first[1:].untyped_storage()) != compat.storage_key(second.untyped_storage())


def test_lerp_all():
    tensors, towards = [torch.zeros(2), torch.ones(3)], [torch.ones(2), torch.ones(3) * 3]
    compat.lerp_all(tensors, towards, 0.25)
    assert tensors[0].tolist() == [0.25] * 2 and tensors[1].tolist() == [1.5] * 3


def test_scale_all_and_add_all():
    tensors = [torch.ones(2), torch.ones(3) * 2]
    compat.scale_all(tensors, torch.tensor(0.5))
    compat.add_all(tensors, [torch.ones(2), torch.zeros(3)])
    assert tensors[0].tolist() == [1.5] * 2 and tensors[1].tolist() == [1.0] * 3


def test_recompile_limit_is_the_one_that_is_heeded():
    before, seen = compat.recompile_limit(), []

    def backend(graph, inputs):
        seen.append(graph)
        return graph

    torch._dynamo.reset()
    try:
        compat.set_recompile_limit(2)
        assert compat.recompile_limit() == 2
        compiled = torch.compile(lambda x, n: x + n, backend=backend, dynamic=False)
        for number in range(5):
            compiled(torch.ones(1), number)
    finally:
        compat.set_recompile_limit(before)
        torch._dynamo.reset()
    assert 1 <= len(seen) <= 2


def test_has_cpp_compiler():
    from torch._inductor import config

    assert compat.has_cpp_compiler() == (shutil.which("g++") is not None)
    with config.patch({"cpp.cxx": ("no-such-compiler",)}):
        assert not compat.has_cpp_compiler()


@pytest.mark.parametrize("rows", [1, 7, 16])
def test_scaled_product_with_fast_accumulation(rows, monkeypatch):
    """On a CPU too, whose sums are in float32 whatever `use_fast_accum` says."""
    told, product = [], torch._scaled_mm

    def watched(*args):
        told.append(args[-1])
        return product(*args)

    monkeypatch.setattr(torch, "_scaled_mm", watched)
    draw = torch.Generator().manual_seed(rows)
    a, b = (torch.randn(n, 32, generator=draw).to(torch.float8_e4m3fn) for n in (rows, 48))
    scale_a, scale_b, bias = (torch.rand(n, generator=draw) + 0.5 for n in ((rows, 1), (1, 48), (48,)))
    wanted = (a.double() * scale_a) @ (b.double() * scale_b.t()).t()
    for added in (None, bias):
        got = compat.scaled_product(a, b.t(), scale_a, scale_b, torch.float32, added)
        expected = wanted if added is None else wanted + added
        torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-5)
    assert told == [True, True]


def test_fp8_product_is_what_scaled_product_runs():
    class Seen(compat.TorchDispatchMode):
        packets = ()

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.packets = (*self.packets, func.overloadpacket)
            return func(*args, **(kwargs or {}))

    a, b = (torch.ones(16, 16).to(torch.float8_e4m3fn) for _ in range(2))
    with Seen() as seen:
        compat.scaled_product(a, b.t(), torch.ones(16, 1), torch.ones(1, 16), torch.bfloat16)
    assert compat.FP8_PRODUCT in seen.packets


def test_torch_dispatch_mode_sees_operations():
    class Seen(compat.TorchDispatchMode):
        names = ()

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.names = (*self.names, str(func))
            return func(*args, **(kwargs or {}))

    with Seen() as seen:
        torch.ones(2) + 1
    assert any("add" in name for name in seen.names)


def test_is_traceable_wrapper_subclass():
    from torch.testing._internal.two_tensor import TwoTensor

    assert compat.is_traceable_wrapper_subclass(TwoTensor(torch.ones(2), torch.ones(2)))
    assert not compat.is_traceable_wrapper_subclass(torch.ones(2))


def test_composite():
    assert compat.composite(torch.ops.aten.matmul.default) and not compat.composite(torch.ops.aten.mm.default)


def test_is_sharded():
    linear = nn.Linear(2, 2)
    linear.__class__ = type("FSDPLinear", (type("FSDPModule", (), {}), nn.Linear), {})  # as fully_shard does
    assert compat.is_sharded(linear) and not compat.is_sharded(nn.Sequential(linear))


def test_forget_groups():
    class Mesh:
        pass

    mesh = Mesh()
    compat.forget_groups(mesh)  # an older torch's has none
    mesh._pg_registry = {"world": object()}
    compat.forget_groups(mesh)
    assert mesh._pg_registry == {}


def test_a_mesh_keeps_its_groups_where_forget_groups_looks(tmp_path):
    from torch import distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'meeting'}", rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        kept = vars(mesh).get("_pg_registry")
        assert kept, "torch keeps a mesh's groups elsewhere: see compat.forget_groups"
        compat.forget_groups(mesh)
        assert not kept
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("operation", ["CPU_ATTENTION", "INT8_PRODUCT"])
def test_operations_that_the_counter_has_no_formula_for(operation):
    """Once it has one, ours can go."""
    assert getattr(compat, operation) not in flop_counter.flop_registry


def test_what_runs_on_a_cpu_is_what_is_counted():
    query, bytes = torch.randn(1, 2, 3, 4), torch.ones(32, 16, dtype=torch.int8)
    with Recorded() as seen:
        torch.nn.functional.scaled_dot_product_attention(query, query, query)
        torch._int_mm(bytes, bytes.mT.contiguous())
    assert {compat.CPU_ATTENTION, compat.INT8_PRODUCT} <= seen.packets


class Recorded(compat.TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.packets = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.packets.add(func.overloadpacket)
        return func(*args, **(kwargs or {}))


def test_set_convolution_reaches_classes_that_pad_first_and_copies():
    class Padded(nn.Conv3d):
        def forward(self, x):
            return super().forward(nn.functional.pad(x, (1, 1)))

    conv, x = Padded(2, 3, (1, 1, 3)), torch.randn(1, 2, 2, 2, 4)
    expected = conv(x)
    compat.set_convolution(conv, lambda *given: compat.convolved(*given) + 1)
    copied = deepcopy(conv)
    with torch.no_grad():
        copied.bias += 1
    assert torch.equal(conv(x), expected + 1) and torch.allclose(copied(x), expected + 2, atol=1e-6)


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="PyTorch was built without oneDNN")
@pytest.mark.parametrize(
    "settings", [{}, {"stride": 2, "padding": (1, 0, 1)}, {"dilation": 2, "groups": 2, "bias": False}]
)
def test_convolved_by_onednn_is_the_convolution(settings):
    conv, x = nn.Conv3d(4, 6, 3, **settings), torch.randn(1, 4, 5, 6, 7)
    made = compat.convolved_by_onednn(conv, x, conv.weight, conv.bias)
    torch.testing.assert_close(made, conv(x), rtol=1e-5, atol=1e-5)
