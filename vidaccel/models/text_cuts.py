"""Prompts that are longer than a tokenizer of the pipeline takes: what of them no model ever sees.

Pipelines cut prompts in silence, each at a length and with a template of its own. So nothing here knows lengths: for
the time of a block the pipeline's tokenizers notice when they are told to cut, and what falls off.
"""

import contextlib
import logging
from collections import Counter
from collections.abc import Callable, Iterator

from diffusers import DiffusionPipeline
from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)
SHOWN = 200
"""Characters of what was dropped that a warning repeats."""
BEFORE = 8
"""Tokens before it that say which prompt it was."""


class TextCuts:
    """Warns of prompts that are cut, of the first `most` alone, and counts them all."""

    def __init__(self, most: int | None = None):
        self.most = most
        self.counts: Counter[tuple[str, int]] = Counter()
        """Prompts by the tokenizer that cut them and the tokens that it takes."""

    @contextlib.contextmanager
    def noticed(self, pipe: DiffusionPipeline) -> Iterator[None]:
        """Those of the encoding that happens within the block."""
        with contextlib.ExitStack() as stack:
            for name, part in pipe.components.items():
                if isinstance(part, PreTrainedTokenizerBase):
                    stack.enter_context(_noticing(part, name, self._tell))
            yield

    def summarise(self) -> None:
        """Say how many there were, if more than was told of each."""
        for (name, most), count in self.counts.items():
            if self.most is not None and count > self.most:
                log.warning("%d prompts in all are longer than the %d tokens that %s takes", count, most, name)

    def _tell(self, name: str, tokens: int, before: str, dropped: str) -> None:
        self.counts[name, tokens] += 1
        if self.most is None or self.counts[name, tokens] <= self.most:
            shown = dropped if len(dropped) <= SHOWN else dropped[:SHOWN] + "..."
            said = 'a prompt is longer than the %d tokens that %s takes: after "...%s" it drops "%s"'
            log.warning(said, tokens, name, before, shown)


@contextlib.contextmanager
def _noticing(
    tokenizer: PreTrainedTokenizerBase, name: str, tell: Callable[[str, int, str, str], None]
) -> Iterator[None]:
    """For the time of the block the tokenizer, and no other, is of a class that looks at what it is asked for."""
    plain = type(tokenizer)

    class Noticing(plain):
        def __call__(self, text=None, *args, **kwargs):
            encoded = super().__call__(text, *args, **kwargs)
            if kwargs.get("truncation") is True and kwargs.get("max_length"):
                for each in [text] if isinstance(text, str) else text or []:
                    special = kwargs.get("add_special_tokens", True)
                    before, dropped = self._parted(each, kwargs["max_length"], special)
                    if dropped:
                        tell(name, kwargs["max_length"], before, dropped)
            return encoded

        def _parted(self, text: str, tokens: int, special: bool) -> tuple[str, str]:
            """The last words before the cut, and what is behind it, without a template's tokens."""
            whole = super().__call__(text, add_special_tokens=special).input_ids
            if len(whole) <= tokens:
                return "", ""
            kept = super().__call__(text, add_special_tokens=special, truncation=True, max_length=tokens).input_ids
            same = next((i for i, (a, b) in enumerate(zip(kept, whole, strict=False)) if a != b), len(kept))
            before, dropped = whole[max(0, same - BEFORE) : same], whole[same:]
            return self._words(before), self._words(dropped)

        def _words(self, tokens: list[int]) -> str:
            return str(self.decode(tokens, skip_special_tokens=True)).strip()

    tokenizer.__class__ = Noticing
    try:
        yield
    finally:
        tokenizer.__class__ = plain
