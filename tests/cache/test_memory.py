"""A memory of two passes, worked out by hand: pass n leaves the number n."""

import gc
import weakref

import torch

from vidaccel.cache.memory import Memory
from vidaccel.forecasters.base import Cached


def left(n: int, **held: object) -> Cached:
    return Cached({"hidden_states": torch.full((1, 1, 1), float(n))}, torch.tensor(n / 10), held)


def numbers(memory: Memory, context: str) -> list[int]:
    return [int(cached.tokens["hidden_states"]) for cached in memory.of(context)]


def test_the_latest_of_each_context_are_kept_newest_first():
    memory = Memory(history=2)
    assert numbers(memory, "cond") == [] and len(memory) == 0 and memory.contexts == ()
    for n, context in ((1, "cond"), (2, "uncond"), (3, "cond"), (4, "cond")):
        memory.make_room(context)
        memory.advance(context, left(n))
    assert numbers(memory, "cond") == [4, 3] and numbers(memory, "uncond") == [2]
    assert len(memory) == 3 and memory.contexts == ("cond", "uncond")
    memory.forget("cond")
    assert numbers(memory, "cond") == [] and numbers(memory, "uncond") == [2] and memory.contexts == ("uncond",)
    memory.forget("cond")
    memory.reset()
    assert numbers(memory, "uncond") == [] and len(memory) == 0


def test_no_more_is_kept_without_room():
    memory = Memory()
    for n in (1, 2):
        memory.advance("cond", left(n))
    assert numbers(memory, "cond") == [2]


def test_room_is_made_before_a_pass_runs():
    """The oldest is freed, and what static embedders gave in all but the newest."""
    memory = Memory(history=2)
    oldest = left(1, rope="1")
    freed = weakref.ref(oldest.tokens["hidden_states"])
    memory.advance("cond", oldest)
    memory.advance("cond", left(2, rope="2"))
    assert [dict(cached.held) for cached in memory.of("cond")] == [{"rope": "2"}, {"rope": "1"}]
    del oldest
    memory.make_room("cond")
    gc.collect()
    assert freed() is None
    assert numbers(memory, "cond") == [2] and not memory.of("cond")[0].held and memory.of("cond")[0].t == 0.2
    memory.advance("cond", left(3, rope="3"))
    assert numbers(memory, "cond") == [3, 2] and dict(memory.of("cond")[0].held) == {"rope": "3"}


def test_with_room_for_one_nothing_of_before_is_there_while_a_pass_runs():
    memory = Memory()
    memory.advance("cond", left(1))
    memory.make_room("cond")
    assert numbers(memory, "cond") == [] and memory.contexts == ()
