"""Work that two processes share: each thing made once, and nobody waits for one that has gone."""

import multiprocessing
import os
import signal
import time
from pathlib import Path

import pytest
import torch

from tests.train.torchrun import in_two, spawn
from vidaccel import processes as module
from vidaccel import ranks
from vidaccel.data.shards import ShardFolder, write_shards
from vidaccel.errors import FailedAlone, ProcessLost, UserError
from vidaccel.processes import by_all, by_first, exchanged, gathered, processes, rank, sharing
from vidaccel.ranks import Share, refuse_many, share

multiprocessing.set_forkserver_preload(["torch._dynamo", "tests.train.test_parallel", __name__])


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_shares_are_disjoint_and_whole(count):
    items = list(range(6))
    shares = [Share(number, count).of(items) for number in range(count)]
    assert sorted(sum(shares, [])) == items
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_neighbours_that_make_one_thing_have_one_share(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    found = []
    for number in range(4):
        monkeypatch.setenv("RANK", str(number))
        found.append(share(together=2))
    assert found == [Share(0, 2), Share(0, 2), Share(1, 2), Share(1, 2)]


def test_alone_nothing_is_shared(monkeypatch):
    monkeypatch.setenv("RANK", "3")  # of something else than torchrun
    assert (ranks.number(), ranks.launched(), share().of("abc")) == (0, 1, ["a", "b", "c"])
    refuse_many("this")
    with sharing("alone", total=2) as advance:
        advance()
    assert gathered("abc", str.upper) == ["A", "B", "C"]
    assert by_first(lambda: "done") == by_all(lambda: "done") == "done"
    monkeypatch.delenv("RANK")
    monkeypatch.setenv("WORLD_SIZE", "8")  # likewise
    assert ranks.launched() == 1


def collect(folder: Path, count: int = 11) -> None:
    def compute(indices: list[int]) -> list:
        with (folder.parent / f"{folder.name}-{os.getpid()}").open("a") as made:
            made.writelines(f"{index}\n" for index in indices)
        return [({"x": torch.full((3,), float(index))}, {"i": index}) for index in indices]

    write_shards(folder, compute, count=count, kind="k", settings={}, per_shard=3, batch_size=2)


def computed(folder: Path) -> list[int]:
    return sorted(int(line) for file in folder.parent.glob(f"{folder.name}-*") for line in file.read_text().split())


def share_and_fail(folder: Path) -> None:
    assert gathered(list(range(5)), lambda i: (rank(), i * i)) == [(i % 2, i * i) for i in range(5)]
    assert by_first(lambda: rank() + 7) == 7
    assert by_all(lambda: exchanged(rank())) == [0, 1]
    with pytest.raises(ZeroDivisionError):  # in both, of which the first had nothing to wait for
        by_all(lambda: 1 / (1 - rank()))
    collect(folder)
    with pytest.raises(ZeroDivisionError):
        by_first(lambda: 1 / 0)
    with pytest.raises(ProcessLost if rank() == 0 else UserError), sharing("failing", total=2):
        if rank():
            raise UserError("this one fails", "mend it")


def test_shards_are_written_once_and_by_any_number_of_processes(tmp_path):
    collect(tmp_path / "one")
    (tmp_path / "two").mkdir()
    for name in (".settings.json", "shard-00000.tar"):
        (tmp_path / "two" / name).write_bytes((tmp_path / "one" / name).read_bytes())
    first = (tmp_path / "one" / "shard-00001.tar").read_bytes()
    (tmp_path / "two" / "shard-00001.tar.part").write_bytes(first[: 3 * len(first) // 4])
    in_two(share_and_fail, tmp_path / "two")
    files = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert sorted(path.name for path in (tmp_path / "two").iterdir()) == files
    assert all((tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes() for name in files)
    assert computed(tmp_path / "two") == [5, *range(6, 11)]
    assert len(ShardFolder(tmp_path / "two")) == 11


def quick_signs() -> None:
    module.BEAT, module.SILENT = 0.1, 1.0


def wait_for_the_dead(folder: Path) -> None:
    quick_signs()
    with processes():
        if rank():
            time.sleep(2.5)  # more than it may be silent for: who is late is there all the same
        by_all(lambda: None)
        if rank():
            os.kill(os.getpid(), signal.SIGKILL)
        began = time.monotonic()
        with pytest.raises(ProcessLost), sharing("working", total=999) as advance:  # the first has the store
            while True:
                time.sleep(0.05)
                advance()
        with pytest.raises(ProcessLost), sharing("waiting", total=2) as advance:
            advance()
        (folder / "seconds").write_text(str(time.monotonic() - began))
        os._exit(0)


def test_nobody_waits_for_a_process_that_was_killed(tmp_path):
    context = spawn(2, wait_for_the_dead, tmp_path)
    for process in context.processes:
        process.join(60)
    assert float((tmp_path / "seconds").read_text()) < 20


def lose_the_other(folder: Path) -> None:
    quick_signs()

    def fail_or_wait() -> None:
        if rank():
            raise ValueError("as no other does")
        try:
            exchanged("waits")
        except ProcessLost:
            (folder / "said").write_text("lost")
            raise

    with processes():
        try:
            by_all(fail_or_wait)
        except FailedAlone as error:
            (folder / "failed").write_text(str(error))
            os.kill(os.getpid(), signal.SIGKILL)
        except ProcessLost:
            os._exit(0)


def test_one_that_fails_while_another_waits_for_it_ends_both(tmp_path):
    """And an exchange with a process that was killed is told as such."""
    context = spawn(2, lose_the_other, tmp_path)
    for process in context.processes:
        process.join(60)
    said = "process 1 failed, and the others wait for it: ValueError: as no other does"
    assert (tmp_path / "failed").read_text() == said
    assert context.processes[0].exitcode == 0
    assert (tmp_path / "said").read_text() == "lost"
