"""What the command line looks like: consoles, progress bars or lines, tables."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

# Of several processes, as torchrun starts them, the first one speaks.
_IS_QUIET = os.environ.get("RANK", "0") != "0"

console = Console(highlight=False, quiet=_IS_QUIET)
error_console = Console(stderr=True, highlight=False)
EVERY = 30  # seconds between lines where there is no terminal


class Bars:
    """A progress callback (label, done, total): one bar for each label, in order of appearance."""

    def __init__(self, progress: Progress) -> None:
        self.progress = progress
        self._tasks: dict[str, TaskID] = {}

    def __call__(self, label: str, done: int, total: int) -> None:
        # "search: confirm" moves the bar of "search" and says what it is doing
        name = label.partition(":")[0]
        if name not in self._tasks:
            self._tasks[name] = self.progress.add_task(label, total=total)
        self.progress.update(self._tasks[name], description=label, completed=done, total=total)


class Lines:
    """A progress callback for files and pipes, where no bar moves: a line now and then.

    The first and the last of each bar are said, and in between what is told EVERY seconds after
    the line before.
    """

    def __init__(self, console: Console, clock: Callable[[], float] = time.monotonic) -> None:
        self.console, self.clock = console, clock
        self._begun: dict[str, float] = {}
        self._said: tuple[str, int, int] | None = None
        self._at = 0.0

    def __call__(self, label: str, done: int, total: int) -> None:
        name, now = label.partition(":")[0], self.clock()
        is_news = name not in self._begun or now - self._at >= EVERY or done >= total
        begun = self._begun.setdefault(name, now)
        if is_news and (name, done, total) != self._said:
            self._said, self._at = (name, done, total), now
            text = f"{label}: {done} of {total}, {now - begun:.0f} s"
            self.console.print(text, markup=False, soft_wrap=True)


@contextmanager
def bars() -> Iterator[Bars | Lines]:
    """Show progress on stderr, so that a command's output can be piped: bars on a terminal,
    elsewhere lines."""
    if not error_console.is_terminal:
        yield Lines(Console(stderr=True, highlight=False, quiet=_IS_QUIET))
        return
    columns = (
        TextColumn("{task.description:>16}"),
        BarColumn(bar_width=30),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=error_console, disable=_IS_QUIET) as progress:
        yield Bars(progress)


def table(headers: Sequence[str], rows: Sequence[Sequence[str]], *, is_text: bool = False) -> Table:
    """Return a plain table: names to the left, the rest to the right unless it is text."""
    made = Table(box=None, pad_edge=False)
    for i, header in enumerate(headers):
        is_left = i == 0 or is_text
        made.add_column(header, justify="left" if is_left else "right", overflow="fold")
    for row in rows:
        made.add_row(*row)
    return made
