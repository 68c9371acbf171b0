"""What long work says of itself: callbacks for progress, a word where one would wonder."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

Progress = Callable[[str, int, int], None]  # (what, done, total)
Tick = Callable[[], None]  # one more piece of work is done


def silent() -> None:
    """The tick of work that nobody follows."""


@contextmanager
def saying(logger: logging.Logger, what: str, *, after: float) -> Iterator[None]:
    """Warn with `what` if the work inside is not done `after` some seconds."""
    notice = threading.Timer(after, logger.warning, [what])
    notice.daemon = True
    notice.start()
    try:
        yield
    finally:
        notice.cancel()
