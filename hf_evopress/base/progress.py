"""The callbacks through which long work reports progress."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[str, int, int], None]  # (what, done, total)
Tick = Callable[[], None]  # one more piece of work is done


def silent() -> None:
    """The tick of work that nobody follows."""
