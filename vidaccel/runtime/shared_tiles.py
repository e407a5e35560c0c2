"""The tiles of one video decoded by several processes, a share in each: the frames of one process, bit for bit.

diffusers' `tiled_decode` cuts, decodes and blends, in a way of each class's own, and is left to do so. It runs twice.
The first time the decoder is not called: its calls are noted, and each is answered with what it was given, which blends
and costs nothing. Then a process makes the calls of its own tiles, and all exchange what came out. The second time the
calls are answered with that.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from vidaccel.processes import exchanged, on_all

Call = tuple[tuple[Any, ...], dict[str, Any]]


@contextmanager
def sharing_tiles(vae: Any, devices: DeviceMesh | None) -> Iterator[None]:
    """For the time of the block each process of `devices`, a mesh of one dimension, decodes tiles P apart of those that
    `vae` decodes; all are given the same latents and get all frames. None is one process alone."""
    if devices is None:
        yield
        return
    stock = vae.tiled_decode

    def tiled_decode(*args: Any, **kwargs: Any) -> Any:
        calls: list[Call] = []
        with _answered(vae.decoder, lambda tile, *more, **named: _noted(calls, tile, *more, **named)):
            stock(*args, **kwargs)
        made = iter(_exchanged(vae.decoder, calls, devices))
        with _answered(vae.decoder, lambda *more, **named: next(made)):
            return stock(*args, **kwargs)

    vae.tiled_decode = tiled_decode
    try:
        yield
    finally:
        del vae.tiled_decode


@contextmanager
def _answered(decoder: Any, answer: Callable[..., Tensor]) -> Iterator[None]:
    """The decoder's calls go to `answer`."""
    before = vars(decoder).get("forward")
    decoder.forward = answer
    try:
        yield
    finally:
        if before is None:
            del decoder.forward
        else:
            decoder.forward = before


def _noted(calls: list[Call], tile: Tensor, *more: Any, **named: Any) -> Tensor:
    calls.append(((tile, *more), named))
    return tile.clone()  # blending writes into it


def _exchanged(decoder: Any, calls: list[Call], devices: DeviceMesh) -> list[Tensor]:
    """What the decoder answers to each call, made by the process whose tile it is of. Wan's goes through a tile in
    several, of which the first says so: each needs what the one before left in the tile's cache."""
    group, own, count = devices.get_group(), devices.get_local_rank(), devices.size()
    tile, owners = -1, []
    for _, named in calls:
        tile += named.get("first_chunk", True)
        owners.append(tile % count)
    device = calls[0][0][0].device

    def decoded() -> dict[int, Tensor]:
        made = {}
        for index, owner in enumerate(owners):
            args, named = calls[index]
            calls[index] = (), {}  # a tile's cache goes with its last call
            if owner == own:
                made[index] = decoder(*args, **named).contiguous()
        return made

    made = on_all(decoded, group)
    shapes = exchanged({index: (part.shape, part.dtype) for index, part in made.items()}, group)
    for index, owner in enumerate(owners):
        shape, dtype = shapes[owner][index]
        part = made.setdefault(index, torch.empty(shape, dtype=dtype, device=device))
        dist.broadcast(part, dist.get_global_rank(group, owner), group)
    return [made[index] for index in range(len(owners))]
