"""What the command line looks like: consoles, progress bars with the time left, tables."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
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


@contextmanager
def bars() -> Iterator[Bars]:
    """Show progress on stderr, so that a command's output can be piped."""
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
