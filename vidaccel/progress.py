"""A progress bar on stderr with rate and time left; silent where stderr is no terminal, in all processes of torchrun's
but the first, where a bar within another one is silent too: theirs is one bar."""

import sys

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

from vidaccel import ranks


class Progress:
    """`with Progress("sampling", total=50) as bar: bar.advance(loss=0.1)`; keyword values are shown beside the bar."""

    _running = 0

    def __init__(self, title: str, total: int, done: int = 0, live: bool = True):
        """`live=False` draws only when it advances: no thread runs beside what is being timed."""
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[values]}"),
        )
        console = Console(file=sys.stderr)
        silent = not console.is_terminal or ranks.number() > 0 or (ranks.launched() > 1 and Progress._running > 0)
        self._live, self._bar = live, RichProgress(*columns, console=console, disable=silent, auto_refresh=live)
        self._task = self._bar.add_task(title, total=total, completed=done, rate="", values="")

    def __enter__(self) -> "Progress":
        self._bar.start()
        Progress._running += 1
        return self

    def __exit__(self, *exc) -> None:
        self._bar.stop()
        Progress._running -= 1

    def advance(self, by: int = 1, **values: float) -> None:
        task = self._bar.tasks[self._task]
        rate = f"{task.speed:.2f}/s" if task.speed else ""
        shown = " ".join(f"{name} {value:.4g}" for name, value in values.items())
        self._bar.update(self._task, advance=by, rate=rate, values=shown, refresh=not self._live)
