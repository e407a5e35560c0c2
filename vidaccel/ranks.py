"""Which of the processes that torchrun started this one is, by its environment alone: nothing here needs torch."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from vidaccel.errors import UserError

Item = TypeVar("Item")


def launched() -> int:
    """Number of processes that were started together; 1 without torchrun, whatever else has set WORLD_SIZE."""
    return int(os.environ.get("WORLD_SIZE", 1)) if "RANK" in os.environ else 1


def number() -> int:
    """Number of this one, from 0."""
    return int(os.environ.get("RANK", 0)) if launched() > 1 else 0


@dataclass(frozen=True)
class Share:
    """Every `count`-th of some items, from the one at `number` on."""

    number: int
    count: int

    def of(self, items: Sequence[Item]) -> list[Item]:
        return list(items[self.number :: self.count])


def share(together: int = 1) -> Share:
    """That of this process, or of the group of so many neighbouring processes that it makes one thing with."""
    return Share(number() // together, launched() // together)


def refuse_many(what: str) -> None:
    """`UserError` where torchrun started more than one process of `what`, which each would do as a whole."""
    if launched() > 1:
        raise UserError(
            f"{what} is the work of one process, and torchrun started {launched()}",
            "start it without torchrun, or with --nproc-per-node=1",
        )
