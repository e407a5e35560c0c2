"""A progress bar on stderr with rate and time left; silent where stderr is no terminal. A bar within another one is a
line below it. Torchrun's processes have one bar, which the first of them shows."""

import sys
from functools import partial

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

from vidaccel import ranks


class Progress:
    """`with Progress("sampling", total=50) as bar: bar.advance(loss=0.1)`; keyword values are shown beside the bar."""

    _outermost: RichProgress | None = None
    """What is drawn now."""

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
        silent = not console.is_terminal or ranks.number() > 0
        above = getattr(sys.stdout, "isatty", bool)()  # lines that are printed; those that go to a file stay out of it
        self._bar = RichProgress(*columns, console=console, disable=silent, auto_refresh=live, redirect_stdout=above)
        self._live = live
        self._new = partial(RichProgress.add_task, description=title, total=total, completed=done, rate="", values="")
        self._task, self._inner = self._new(self._bar), False

    def __enter__(self) -> "Progress":
        outermost = Progress._outermost
        self._inner = outermost is not None
        if outermost is None:
            Progress._outermost = self._bar
            self._bar.start()
        elif ranks.launched() == 1:  # two that draw on one terminal would draw over each other
            self._bar, self._task = outermost, self._new(outermost)
        return self

    def __exit__(self, *exc) -> None:
        if self._inner:
            self._bar.remove_task(self._task)
        else:
            Progress._outermost = None
            self._bar.stop()

    def advance(self, by: int = 1, **values: float) -> None:
        task = next(task for task in self._bar.tasks if task.id == self._task)
        rate = f"{task.speed:.2f}/s" if task.speed else ""
        shown = " ".join(f"{name} {value:.4g}" for name, value in values.items())
        self._bar.update(self._task, advance=by, rate=rate, values=shown, refresh=not self._live)
