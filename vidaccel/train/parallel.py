"""One training in many processes: torchrun's process group, sharded weights, and what the processes agree on.

FSDP2 keeps 1/W of every parameter, its gradient and its moments on each of W processes and gathers a block's weights
when it is called. A sharded parameter is a DTensor. With one process every function here does nothing, or plainly.
"""

import contextlib
import gc
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TypeVar

import torch
from torch import distributed as dist
from torch import nn
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from vidaccel.artefacts import atomic_folder
from vidaccel.compat.torch import forget_groups
from vidaccel.locks import locked

Result = TypeVar("Result")
_meshes: list[DeviceMesh] = []  # that sharded models lie on


@contextlib.contextmanager
def processes() -> Iterator[None]:
    """The process group that torchrun's environment describes, for the time of the block; nothing without torchrun.

    Tensors on the CPU go through gloo, those on a GPU through NCCL; process i of a machine uses its GPU i. What was
    sharded in the block is to be left in it: the group ends with the last that holds it.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        yield
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()
        # Destroyed, it still has its threads until nothing refers to it, and DTensor's caches keep every mesh, with its
        # groups. A thread of gloo's that lets go of a finished tensor while the interpreter ends aborts the process.
        for mesh in _meshes:
            forget_groups(mesh)
        _meshes.clear()
        gc.collect()


def world() -> int:
    """Number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """Number of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def shard(model: nn.Module, blocks: Iterable[nn.Module], device: torch.device | None = None) -> None:
    """Spreads the parameters of `model` over all processes; `blocks` one by one.

    They stay on the device where they are, or go to `device`: no more of the model is whole there than the largest
    block, or what is in none. Every process has the same weights before. From then on call `model`, whose call gathers
    what it needs: the forward of a part of it finds shards. What is to be added to the model (adapters, embeddings) is
    added before.
    """
    if world() == 1:
        return
    mesh = init_device_mesh((device or next(model.parameters()).device).type, (world(),))
    _meshes.append(mesh)
    for module in (*blocks, model):
        fully_shard(module, mesh=mesh)


def reshard(model: nn.Module) -> None:
    """Drops gathered weights: after a pass without gradients the outermost ones stay, and would hide a change."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def full_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """The model's whole state dict; of a sharded model on the CPU and in process 0, empty in the others.

    Every process has to call it.
    """
    if world() == 1:
        return model.state_dict()
    return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))


def mean(values: list[float]) -> list[float]:
    """Each of `values` averaged over the processes, NaN if it is NaN in one of them."""
    if world() == 1:
        return values
    total = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(total)
    return (total / world()).tolist()


def on_first(function: Callable[[], Result]) -> Result:
    """Calls `function` in process 0 alone; every process returns what it returned, or raises what it raised."""
    if world() == 1:
        return function()
    outcome: list = [None, None]
    if rank() == 0:
        try:
            outcome[0] = function()
        except Exception as error:
            outcome[1] = error
    dist.broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


def on_all(function: Callable[[], Result]) -> Result:
    """Calls `function` in every process and returns what it returned here, unless it failed in one of them: then every
    process raises what the first of those raised. One that fails alone would leave the others waiting for it."""
    if world() == 1:
        return function()
    result = failure = None
    try:
        result = function()
    except Exception as error:
        failure = error
    failures = [None] * world()
    dist.all_gather_object(failures, failure)
    for error in failures:
        if error is not None:
            raise error
    return result


@contextlib.contextmanager
def locked_by_first(folder: Path) -> Iterator[None]:
    """`locked` for a folder that all processes write to: process 0 holds the lock for all."""
    with contextlib.ExitStack() as stack:
        on_first(lambda: stack.enter_context(locked(folder)))
        yield


@contextlib.contextmanager
def shared_folder(target: Path) -> Iterator[Path]:
    """`atomic_folder` for a folder on a disk that all processes see, and write to."""
    with contextlib.ExitStack() as stack:
        yield on_first(lambda: stack.enter_context(atomic_folder(target)))
        on_all(lambda: None)  # nobody writes any more
        on_first(stack.close)


def save_sharded(tensors: Mapping[str, torch.Tensor], folder: Path) -> None:
    """Writes each process's shards of `tensors` to a safetensors file of its own in `folder`."""
    writer = dcp.HuggingFaceStorageWriter(str(folder), save_distributed=True)
    with _first_failure():
        dcp.save(dict(tensors), storage_writer=writer)


def load_sharded(tensors: Mapping[str, torch.Tensor], folder: Path) -> None:
    """Reads what `save_sharded` wrote into `tensors`, in place.

    Raises:
        ValueError: the files of `folder` hold no tensor of that name, shape and dtype, or not all of it.
    """
    reader = dcp.HuggingFaceStorageReader(str(folder))

    def check() -> None:
        found = reader.read_metadata().state_dict_metadata
        for name, of in found.items():
            if sum(chunk.sizes.numel() for chunk in of.chunks) != of.size.numel():
                raise ValueError(f"parts of {name} are missing")
        check_fit({name: (of.size, of.properties.dtype) for name, of in found.items()}, tensors)

    on_all(check)
    with _first_failure():
        dcp.load(dict(tensors), storage_reader=reader)


def check_fit(found: Mapping[str, tuple[torch.Size, torch.dtype]], tensors: Mapping[str, torch.Tensor]) -> None:
    """Raises a ValueError unless `found` has the names, shapes and dtypes of `tensors`: loading would cast or skip."""
    wanted = {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()}
    wrong = [name for name in sorted(found.keys() | wanted) if found.get(name) != wanted.get(name)]
    if wrong:
        name = wrong[0]
        there, here = (_described(which.get(name)) for which in (found, wanted))
        raise ValueError(f"{name} is {there} there and {here} here ({len(wrong)} tensors differ)")


def _described(of: tuple[torch.Size, torch.dtype] | None) -> str:
    return "missing" if of is None else f"{list(of[0])} {str(of[1]).removeprefix('torch.')}"


@contextlib.contextmanager
def _first_failure() -> Iterator[None]:
    """torch.distributed.checkpoint gathers the failures of all processes in a BaseException of its own."""
    try:
        yield
    except dcp.CheckpointException as error:
        raise next(iter(error.failures.values()))[0] from error
