"""What full passes have left for predicted ones: the latest few of each context, newest first.

Tokens are a pass's own outputs, not copies, so room is made for a full pass before it runs: the oldest is freed then,
and of the ones before what only the newest is asked for, the outputs of static embedders.
"""

from vidaccel.forecasters.base import Cached


class Memory:
    """The `history` latest full passes of every context, which are kept apart by their names."""

    def __init__(self, history: int = 1):
        self.history = history
        self._passes: dict[str, tuple[Cached, ...]] = {}

    @property
    def contexts(self) -> tuple[str, ...]:
        """Of which something is remembered."""
        return tuple(name for name, passes in self._passes.items() if passes)

    def __len__(self) -> int:
        """Passes remembered, of all contexts."""
        return sum(map(len, self._passes.values()))

    def of(self, context: str) -> tuple[Cached, ...]:
        """The passes of a context, newest first."""
        return self._passes.get(context, ())

    def make_room(self, context: str) -> None:
        """For a full pass of this context that is about to run."""
        kept = self.of(context)[: self.history - 1]
        self._passes[context] = tuple(Cached(cached.tokens, cached.t) for cached in kept)

    def advance(self, context: str, cached: Cached) -> None:
        """Remember a full pass that went well; the oldest goes if there was no room."""
        self._passes[context] = (cached, *self.of(context))[: self.history]

    def forget(self, context: str) -> None:
        """Free what is remembered of a context."""
        self._passes.pop(context, None)

    def reset(self) -> None:
        """Free it all."""
        self._passes.clear()
