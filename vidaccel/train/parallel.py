"""One training in many processes: weights sharded over them, and files that all of them write to.

FSDP2 keeps 1/W of every parameter, its gradient and its moments on each of W processes and gathers a block's weights
when it is called. A sharded parameter is a DTensor. With one process every function here does nothing, or plainly.
"""

import contextlib
import warnings
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch
from torch import distributed as dist
from torch import nn
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from vidaccel.artefacts import atomic_folder
from vidaccel.processes import group_ends_with, on_all, on_first, world


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
    group_ends_with(mesh)
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
    with _first_failure(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is")  # that one process loads alone
        dcp.load(dict(tensors), storage_reader=reader)


def copy_own(whole: torch.Tensor, tensor: torch.Tensor) -> None:
    """Copies a whole tensor, or this process's shard of it, into `tensor`."""
    if isinstance(tensor, DTensor):
        whole = distribute_tensor(whole.to(tensor.device), tensor.device_mesh, tensor.placements, src_data_rank=None)
    tensor.copy_(whole)


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
