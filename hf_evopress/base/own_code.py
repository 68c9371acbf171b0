"""Whether the code that a model brings may run: said once for a job, and known to all its steps."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar

Made = TypeVar("Made")

_trusted: ContextVar[bool] = ContextVar("trust_remote_code", default=False)


def is_trusted() -> bool:
    """Return whether the code that models bring may run."""
    return _trusted.get()


@contextmanager
def trusting(yes: bool) -> Iterator[None]:
    """Let the code that models bring run for a while, or not."""
    before = _trusted.set(yes)
    try:
        yield
    finally:
        _trusted.reset(before)


def trusts_code(function: Callable[..., Made]) -> Callable[..., Made]:
    """Return a function that takes trust_remote_code= as well, False by default."""

    @functools.wraps(function)
    def run(*args: Any, trust_remote_code: bool | None = None, **kwargs: Any) -> Made:
        with trusting(is_trusted() if trust_remote_code is None else trust_remote_code):
            return function(*args, **kwargs)

    return run
